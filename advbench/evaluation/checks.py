"""A look at a model before it is attacked: whether its answers mean what they should."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advbench.defenses.base import Surrogate, Traits
from advbench.devices import out_of_memory
from advbench.errors import UserError, reason_of
from advbench.evaluation.samples import Samples

PROBE = 16  # images


@torch.no_grad()
def probe(model: nn.Module, samples: Samples, traits: Traits) -> int:
    """Look at the model's answers on a few images; returns the number of classes.

    Raises UserError if the model is in training mode or has weights that are not finite, can't take
    the images, does not return (N, K) logits or writes into its input, and if its predictions are
    stochastic, batch-dependent or probabilities and ``traits`` deny it.
    """
    if any(module.training for module in model.modules()):
        raise UserError("the model is in training mode: call model.eval() before evaluating it")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"the model's weights are not finite: '{name}' holds NaN or infinity")
    clean = samples.fetch(samples.ids[:PROBE])
    shape, x = tuple(clean.x.shape[1:]), clean.x.clone()
    logits = _ask(model, clean.x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"the model must return logits of shape (N, K), K >= 2, for images {shape}, not {got}"
        )
    if not torch.equal(clean.x, x):
        raise UserError("the model writes into its input: let forward work on a copy (x.clone())")
    classes, highest = logits.shape[1], int(samples.split.labels.max())
    if highest >= classes:
        raise UserError(
            f"the data has labels up to {highest} and the model has {classes} classes (0 to "
            f"{classes - 1}): choose the data that the model was trained for"
        )
    if are_shares(logits) and traits.output == "logits":
        raise UserError(
            "the model returns probabilities, along which an attack soon has no gradient: return "
            "the logits, or say traits.output=probabilities"
        )
    # Kernels round differently from call to call and shape to shape; noise is orders larger.
    slack = 1e-3 * (1 + logits.abs().max())
    if not traits.stochastic and (_ask(model, x) - logits).abs().max() > slack:
        raise UserError(
            "two forward passes of the same images differ, so the model is stochastic: a protocol "
            "that judges by one prediction can't be trusted; remove the noise"
        )
    if traits.stochastic:
        return classes  # rows that differ say nothing then
    alone = torch.cat([_ask(model, row) for row in x.split(1)])
    if not traits.batch_dependent and (alone - logits).abs().max() > slack:
        raise UserError(
            "the model's output for an image depends on the other images of its batch: the robust "
            "accuracy of a sample is not defined for it"
        )
    return classes


def are_shares(outputs: Tensor) -> bool:
    """Whether outputs, (N, K), look like probabilities."""
    sums = outputs.float().sum(1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())


def learns(model: nn.Module) -> bool:
    """Whether a part of it is in training mode that draws, or remembers what it has seen."""
    kinds = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd
    return any(module.training and isinstance(module, kinds) for module in model.modules())


def check_gradient(model: nn.Module, samples: Samples) -> None:
    """Raise UserError if the model's output has no gradient in its input."""
    x = samples.fetch(samples.ids[:1]).x.requires_grad_()
    with torch.enable_grad():
        if not _ask(model, x).requires_grad:
            raise UserError(
                "the model's output has no gradient in its input: remove torch.no_grad() or "
                "detach() from its forward, or say traits.gradient=none"
            )


def probe_surrogate(name: str, surrogate: Surrogate, samples: Samples, classes: int) -> None:
    """Raise UserError unless a surrogate answers as it says, with a gradient in its input."""
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
    """The model's answer; whatever somebody else's forward raises becomes a UserError."""
    try:
        return model(*x)
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
