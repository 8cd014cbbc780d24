"""Accuracy on the validation split, clean and under a cheap attack: to choose, not to claim."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import nn

from advbench.attacks.base import Clean, craft
from advbench.attacks.pgd import PGD
from advbench.attacks.random import KeyedRandom
from advbench.attacks.threat import Threat
from advbench.data.base import Split
from advbench.recipes.base import frozen
from advbench.training.processes import gather
from advbench.training.randomness import derive


def accuracies(
    model: nn.Module,
    split: Split,
    threat: Threat | None,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    fabric: Fabric,
) -> tuple[float, float | None]:
    """Shares in [0, 1] of samples that are classified right: as they are, and after PGD as well.

    The samples are dealt over the processes. Random starts are keyed by sample and everything else
    random by batch, so the numbers depend on neither the training nor its randomness.

    threat: None and l1 (where PGD is not defined) measure no robust accuracy.
    steps: of PGD, one search from a random start.  batch_size: per process.
    """
    attack = PGD(steps=steps) if threat is not None and threat.norm != "l1" else None
    ids = torch.arange(len(split))[fabric.global_rank :: fabric.world_size]
    correct = torch.zeros(2, device=fabric.device)
    with frozen(model):
        for chunk, (x, y) in zip(
            ids.split(batch_size), split.batches(ids, batch_size, fabric.device), strict=True
        ):
            torch.manual_seed(derive(seed, "validation", int(chunk[0])))  # stochastic defenses
            with torch.no_grad():
                right = model(x).argmax(1) == y
            correct[0] += right.sum()
            if attack is not None and threat is not None:
                chunk = chunk.to(x.device)
                random = KeyedRandom(seed, "validation", chunk, torch.zeros_like(chunk))
                point = craft(attack, model, Clean(chunk, x, y), threat, random)
                with torch.no_grad():
                    correct[1] += (right & (model(point).argmax(1) == y)).sum()
    clean, robust = (count / len(split) for count in gather(correct, fabric).sum(0).tolist())
    return clean, robust if attack is not None else None
