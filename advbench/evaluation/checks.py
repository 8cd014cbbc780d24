"""Checks of a model before it is attacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.base import Clean, attackable
from advbench.attacks.random import KeyedRandom
from advbench.defenses.base import Surrogate, Traits
from advbench.devices import kept, out_of_memory
from advbench.errors import UserError, reason_of
from advbench.evaluation.samples import Samples

PROBE = 16
"""Images that are looked at alone, and beside others."""

OFF_GRID = 0.05
"""Of the pixel range: noise that takes images off the grid of 8-bit values."""

ROUNDING = 1e-3
"""Of the spread of a row's logits: what another kernel may change. Noise is orders larger."""

ULPS = 8
"""Steps of float32 at the size of a row's logits, by which rounding may move them besides."""


@torch.no_grad()
def probe(
    model: nn.Module, samples: Samples, traits: Traits, batch_size: int = PROBE
) -> tuple[int, list[str]]:
    """Check the model's outputs on a few images before the attack.

    Repeated passes, single images and the batch size of the search are compared, on images as they
    are and off the grid of 8-bit values, relative to the spread of the logits within a row.

    Args:
        model: takes (N, C, H, W) in [0, 1], returns logits (N, K).
        samples: that will be attacked.
        traits: what is declared of the model.
        batch_size: images that the search attacks side by side.

    Returns:
        The number of classes, and what a person should know, a line each.

    Raises:
        UserError: The model is in training mode, has weights that are not finite, can't take the
            images, does not return (N, K) logits, writes into its input, or its predictions are
            stochastic, batch-dependent or probabilities and ``traits`` deny it.
    """
    _check_state(model)
    clean = samples.fetch(samples.ids[:PROBE])
    logits = _checked_logits(model, clean.x)
    classes, highest = logits.shape[1], int(samples.split.labels.max())
    if highest >= classes:
        raise UserError(
            f"the data has labels up to {highest} and the model has {classes} classes (0 to "
            f"{classes - 1}): choose the data that the model was trained for"
        )
    if traits.output == "logits" and are_shares(logits):
        raise UserError(
            "the model returns probabilities, along which an attack soon has no gradient: return "
            "the logits, or set traits.output=probabilities"
        )
    notes = []
    if traits.output == "logits" and bool(((logits >= 0) & (logits <= 1)).all()):
        notes.append(
            "all outputs lie in [0, 1] and do not sum to 1, as independent sigmoids do: along them "
            "an attack soon has no gradient; return what is before the sigmoid"
        )
    repeats = [(x, _ask(model, x), _ask(model, x)) for x in (clean.x, off_the_grid(clean))]
    same = all(agree(first, second) for _, first, second in repeats)
    if traits.stochastic:  # rows that differ say nothing then
        if same:
            notes.append(
                "the model is declared stochastic, and two forward passes of the same images agree"
            )
        return classes, notes
    if not same:
        raise UserError(
            "two forward passes of the same images differ, so the model is stochastic: say "
            "traits.stochastic=true, or remove the noise"
        )
    if not traits.batch_dependent:
        for x, logits, _ in repeats:
            alone = torch.cat([_ask(model, row) for row in x.split(1)])
            beside = _beside_others(model, samples, x, min(batch_size, len(samples)))
            if not (agree(logits, alone) and agree(logits, beside)):
                raise UserError(
                    "the model's output for an image depends on the other images of its batch: say "
                    "traits.batch_dependent=true traits.batch_size=NUMBER, the size of the batches "
                    "that it is deployed with, or remove the dependence"
                )
    return classes, notes


def off_the_grid(clean: Clean) -> Tensor:
    """The images with noise that takes them off the grid of 8-bit values, (N, C, H, W)."""
    noise = KeyedRandom(0, "probe", clean.ids, torch.zeros_like(clean.ids)).uniform(clean.x)
    return (clean.x + OFF_GRID * (2 * noise - 1)).clamp(0, 1)


def _check_state(model: nn.Module) -> None:
    """Raise UserError for modules in training mode, and for weights that are not numbers."""
    training = [name for name, module in model.named_modules() if module.training]
    if training and not model.training:
        raise UserError(
            f"the model's '{training[0]}' stays in training mode after eval(): put it into "
            "evaluation mode, or correct its train()"
        )
    if training:
        raise UserError("the model is in training mode: call model.eval() before evaluating it")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"the model's weights are not finite: '{name}' holds NaN or infinity")
    for name, tensor in model.named_buffers():  # infinity has its use there: attention masks
        if tensor.is_floating_point() and torch.isnan(tensor).any():
            raise UserError(f"the model's weights are not finite: '{name}' holds NaN")


@torch.no_grad()
def check_outputs(model: nn.Module, samples: Samples) -> None:
    """Raise UserError unless a model returns finite logits (N, K) for the first of the images."""
    _checked_logits(model, samples.fetch(samples.ids[:PROBE]).x)


def _checked_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits (N, K) for the images; UserError for anything else."""
    shape, x = tuple(images.shape[1:]), images.clone()
    logits = _ask(model, x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"the model must return logits of shape (N, K), K >= 2, for images {shape}, not {got}"
        )
    if logits.is_complex():
        raise UserError("the model's logits are complex numbers: return real ones")
    if not torch.equal(images, x):
        raise UserError("the model writes into its input: let forward work on a copy (x.clone())")
    refuse_not_finite(logits)
    return logits.float()


def refuse_not_finite(logits: Tensor) -> None:
    """Raise UserError if logits (N, K) are NaN or infinite."""
    odd = int((~logits.isfinite()).any(1).sum())
    if odd:
        masked = bool((logits == -torch.inf).all(0).any())
        cure = (
            "a class that is masked with -inf needs a large negative number, such as -1e4"
            if masked
            else "correct the model's forward pass (a logarithm of 0, a division by 0, an overflow)"
        )
        raise UserError(
            f"the model's logits are not finite for {odd} of {len(logits)} clean images: {cure}"
        )


def _beside_others(model: nn.Module, samples: Samples, x: Tensor, size: int) -> Tensor:
    """Logits of images (N, C, H, W) at the end of a batch of the size that the search uses."""
    while size > len(x):
        try:
            others = samples.fetch(samples.ids[len(x) : size]).x
            return model(torch.cat([others, x]))[len(others) :]
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise UserError(
                    f"the model can't take {size} images at once: {reason_of(problem):.300}"
                ) from problem
        size //= 2  # as the search will
    return _ask(model, x)


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits (N, K) are the same up to rounding, beside the spread within their rows.

    What all logits of a row have in common decides nothing, so it is taken off first.
    """
    sound = ours.isfinite().all(1)
    if not torch.equal(sound, theirs.isfinite().all(1)):
        return False
    ours, theirs = ours[sound], theirs[sound]
    ulp = torch.finfo(torch.float32).eps * ours.double().abs().amax(1)
    gap, spread = _gap_and_spread(ours, theirs)
    return bool((gap <= ROUNDING * spread + ULPS * ulp + 1e-6).all())


def gaps(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far apart logits (N, K) are, as a share of the spread within their rows: (N,).

    What ``agree`` calls the same is 0. A row that is not finite in either is infinitely far.
    """
    gap, spread = _gap_and_spread(ours, theirs)
    same = torch.tensor([agree(a[None], b[None]) for a, b in zip(ours, theirs, strict=True)])
    share = (gap / spread.clamp_min(1e-12)).nan_to_num(torch.inf)
    return share.masked_fill(same.to(share.device), 0.0)


def _gap_and_spread(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference of two rows without their means, and the spread within ours, (N,)."""
    ours, theirs = ours.double(), theirs.double()
    gap = (ours - ours.mean(1, keepdim=True)) - (theirs - theirs.mean(1, keepdim=True))
    return gap.abs().amax(1), ours.amax(1) - ours.amin(1)


def are_shares(outputs: Tensor) -> bool:
    """Whether outputs, (N, K), look like probabilities."""
    sums = outputs.float().sum(1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())


def learns(model: nn.Module) -> bool:
    """Whether a part of it is in training mode that draws, or remembers what it has seen."""
    kinds = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd
    return any(module.training and isinstance(module, kinds) for module in model.modules())


def check_gradient(model: nn.Module, samples: Samples) -> list[str]:
    """Run one backward pass under the search's own conditions.

    Returns:
        What a person should know of the gradient, a line each.

    Raises:
        UserError: The model's output has no gradient in its input, or its backward pass fails.
    """
    size = PROBE
    while True:  # with fewer images where memory ends, as the search does
        clean = samples.fetch(samples.ids[:size])
        try:
            dead = _has_dead_gradient(model, clean)
            break
        except UserError as refusal:
            if size == 1 or refusal.__cause__ is None or not out_of_memory(refusal.__cause__):
                raise
        size //= 2
    if not dead:
        return []
    return [
        f"the gradient is zero on all {len(clean.x)} images looked at: searches along it find "
        "nothing, and what they leave says little"
    ]


def _has_dead_gradient(model: nn.Module, clean: Clean) -> bool:
    """Whether the gradients of cross-entropy and margin are zero in every pixel of the images."""
    lost = (
        "the model's output has no gradient in its input: remove torch.no_grad(), detach(), numpy "
        "or uint8 steps from its forward, or set traits.gradient=none"
    )
    x, dead = clean.x.clone().requires_grad_(), True
    with attackable(model), torch.enable_grad():
        logits = _ask(model, x)
        if not logits.requires_grad:
            raise UserError(lost)
        for loss in (losses.ce, losses.margin):
            try:
                (gradient,) = torch.autograd.grad(
                    loss(logits.float(), clean.y).sum(), x, retain_graph=True, allow_unused=True
                )
            except Exception as problem:
                raise UserError(
                    f"the model's backward pass fails with its parameters frozen: "
                    f"{reason_of(problem):.300}; use checkpoint(..., use_reentrant=False) where "
                    "it is gradient checkpointing, or set traits.gradient=none"
                ) from problem
            if gradient is None:
                raise UserError(lost)
            dead = dead and not bool(gradient.any())
    return dead


def probe_surrogate(name: str, surrogate: Surrogate, samples: Samples, classes: int) -> None:
    """Raise UserError unless a surrogate returns what it declares, with a gradient in its input."""
    x = samples.fetch(samples.ids[:PROBE]).x
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        answer = _ask(surrogate.model, point, *([x] if surrogate.needs_clean_input else []))
    parts = answer if isinstance(answer, tuple) else (answer,)
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    wanted = [(len(x), classes), (len(x),)][: 1 + surrogate.auxiliary_loss]
    if shapes != wanted:
        raise UserError(
            f"surrogate '{name}' must return {wanted} for {len(x)} images, not {shapes}"
        )
    if not any(part.requires_grad for part in parts):
        raise UserError(f"surrogate '{name}' has no gradient in its input")


def _ask(model: nn.Module, *x: Tensor) -> Any:
    """The model's output; an exception of its forward becomes a UserError."""
    try:
        return kept(model(*x))
    except Exception as problem:
        if out_of_memory(problem):
            raise UserError(
                f"the device has no memory for {len(x[0])} images of the data, "
                f"{tuple(x[0].shape[1:])}"
            ) from problem
        raise UserError(
            f"the model can't take the data's images, {tuple(x[0].shape[1:])} (C, H, W): "
            f"{reason_of(problem):.300}"
        ) from problem
