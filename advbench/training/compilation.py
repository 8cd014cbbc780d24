"""``torch.compile`` for the model of a training."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from advbench.backbones.base import Classifier
from advbench.recipes.base import frozen
from advbench.surgery import buffers_kept, modes_kept


def compiled(
    model: Classifier,
    mode: str,
    x: Tensor,
    y: Tensor,
    cast: torch.autocast,
) -> list[str]:
    """Compiles trunk and head in place, so that no name of a weight changes, and tries them.

    Args:
        mode: of ``torch.compile``.
        x: (N, C, H, W) in [0, 1], of the shape that training will have: it compiles for that alone.
        y: (N,) classes.
        cast: the autocast of training.

    Returns:
        Nothing, or in a line why it runs as it was.
    """
    parts = [model.trunk, model.head]
    for part in parts:
        part.compile(mode=mode, dynamic=False)
    try:
        with warnings.catch_warnings():  # of the compiler, of itself
            warnings.simplefilter("ignore")
            _try(model, x, y, cast)
    # A compiler fails in any way: no C++ compiler, a module that it can't trace, a bug of its own.
    except Exception as problem:
        for part in parts:
            part._compiled_call_impl = None
        torch.compiler.reset()
        reason = " ".join(str(problem).split())
        return [
            f"trainer.compile={mode} fails here and training continues without it: "
            f"{type(problem).__name__}: {reason:.200}"
        ]
    return []


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, a model runs as if it were not compiled: for batches of another shape than a step's,
    for each of which it would be compiled again.
    """
    return torch.compiler.set_stance("force_eager")


def _try(model: Classifier, x: Tensor, y: Tensor, cast: torch.autocast) -> None:
    """One pass as the attack makes them and one as training does, without a trace in the model."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), buffers_kept(model), modes_kept(model):
        with frozen(model), cast:
            point = x.detach().clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(point), y), point)
        model.train()
        weights = [p for p in model.parameters() if p.requires_grad]
        with cast:
            loss = F.cross_entropy(model(x), y)
        torch.autograd.grad(loss, weights, allow_unused=True)
