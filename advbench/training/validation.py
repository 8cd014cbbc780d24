"""Accuracy on the validation split, clean and under a cheap attack: to choose, not to claim."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advbench.attacks.base import Clean, craft
from advbench.attacks.pgd import PGD
from advbench.attacks.random import KeyedRandom
from advbench.attacks.threat import Threat
from advbench.data.base import Split, filled_batches
from advbench.defenses.base import Traits
from advbench.devices import full_float32
from advbench.recipes.base import frozen
from advbench.training.processes import gather
from advbench.training.randomness import derive, permutation


def accuracies(
    model: nn.Module,
    split: Split,
    threat: Threat | None,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    fabric: Fabric,
    traits: Traits,
) -> tuple[float, float | None]:
    """Shares in [0, 1] of samples that are classified right: as they are, and after PGD as well.

    The samples are dealt over the processes. Random starts are keyed by sample and everything else
    random by batch, so the numbers depend on neither the training nor its randomness.

    Args:
        threat: None and l1 (where PGD is not defined) measure no robust accuracy.
        steps: of PGD, one search from a random start.
        batch_size: per process.
        traits: of the model. One that is judged in batches of a fixed size is validated in such,
            see ``fixed_batches``, whatever ``batch_size`` and the number of processes are.
    """
    attack = PGD(steps=steps) if threat is not None and threat.norm != "l1" else None
    rank, ranks = fabric.global_rank, fabric.world_size
    if traits.batch_dependent and traits.batch_size is not None:
        chunks = fixed_batches(len(split), traits.batch_size)[rank::ranks]
    else:
        ids = torch.arange(len(split))[rank::ranks]
        chunks = [(chunk, len(chunk)) for chunk in ids.split(batch_size)]
    correct = torch.zeros(2, device=fabric.device)
    with frozen(model), full_float32():
        for (chunk, own), (x, y) in zip(
            chunks, _read(split, [chunk for chunk, _ in chunks], fabric), strict=True
        ):
            torch.manual_seed(derive(seed, "validation", int(chunk[0])))  # stochastic defenses
            with torch.no_grad():
                right = (model(x).argmax(1) == y)[:own]
            correct[0] += right.sum()
            if attack is not None and threat is not None:
                chunk = chunk.to(x.device)
                random = KeyedRandom(seed, "validation", chunk, torch.zeros_like(chunk))
                point = craft(attack, model, Clean(chunk, x, y), threat, random)
                with torch.no_grad():
                    correct[1] += (right & (model(point).argmax(1) == y)[:own]).sum()
    clean, robust = (count / len(split) for count in gather(correct, fabric).sum(0).tolist())
    return clean, robust if attack is not None else None


def fixed_batches(total: int, size: int) -> list[tuple[Tensor, int]]:
    """The batches in which a batch-dependent model meets a split of ``total`` samples.

    As in its evaluation they are cut from one order, the same in every training, and the last one
    is filled up with the first samples; here, with all of them again and again where there are
    fewer than ``size``.

    Returns:
        The ids of each batch, (size,), and how many of these, from the first on, have not been met
        before.
    """
    filled = filled_batches(permutation(total, 0, 0, "validation"), size)
    return [(ids, min(size, total - i * size)) for i, ids in enumerate(filled)]


def _read(split: Split, chunks: list[Tensor], fabric: Fabric) -> Iterable[tuple[Tensor, Tensor]]:
    """Images and classes of each chunk; all but the last have one size."""
    if not chunks:  # more processes than batches
        return ()
    return split.batches(torch.cat(chunks), len(chunks[0]), fabric.device)
