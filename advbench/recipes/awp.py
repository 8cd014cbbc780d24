"""AWP: adversarial weight perturbation around another recipe (Wu et al. 2020, arXiv 2004.05884)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from advbench.defenses.base import PartName, Step
from advbench.devices import in_company
from advbench.errors import UserError
from advbench.recipes.base import Recipe
from advbench.surgery import buffers_kept

TINY = 1e-20  # as in the authors' code: a gradient of zero displaces nothing


@dataclass(frozen=True)
class AWP(Recipe):
    """Another recipe, whose step takes its gradient at weights that raise its loss: w + v.

    v = gamma |w| g / |g| for each weight tensor by itself, g the gradient of the step's loss at w:
    one step of the paper's inner maximum. The authors get g by an SGD step of a proxy model, whose
    learning rate the normalisation cancels. As there, x' is found at w, what is displaced are the
    parameters named weight of two dimensions and more, and the running statistics are those of the
    pass at w + v. Unlike there, weights come back before the optimizer's step and not after it:
    weight decay acts on w.

    It remembers nothing from step to step. Everything else is the other recipe's.

    ``label_smoothing`` is the other recipe's: here it must be 0.

    Raises:
        UserError: for values out of range.
    """

    of: Any = None
    """The recipe that is displaced, any but another AWP. A config names it, or gives {NAME: {KEY:
    VALUE}}."""
    gamma: float | None = None
    """The largest displacement as a share of a layer's weights, at least 0; None is the authors'
    0.01 where the recipe trains on x' alone, and 0.005 where on x as well (theirs for TRADES)."""
    warmup: int = 0
    """Epochs without displacement at the start."""

    def __post_init__(self) -> None:
        if not isinstance(self.of, Recipe) or isinstance(self.of, AWP):
            raise UserError("recipe=awp works on another recipe: give recipe.of=pgd_at")
        object.__setattr__(self, "threat", self.of.threat)
        super().__post_init__()
        if self.label_smoothing:
            raise UserError(
                "recipe.label_smoothing is that of the other recipe: give "
                "'recipe.of={pgd_at: {label_smoothing: 0.1}}'"
            )
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise UserError(f"recipe.gamma={self.gamma:g} is not a number from 0 on")
        if self.warmup < 0:
            raise UserError(f"recipe.warmup={self.warmup} is not a number of epochs")

    @property
    def reach(self) -> float:
        """|v| / |w|."""
        if self.gamma is not None:
            return self.gamma
        return 0.005 if "clean" in self.of.parts else 0.01

    @contextmanager
    def displaced(self, model: nn.Module, loss: Callable[[], Tensor], epoch: int) -> Iterator[None]:
        if epoch < self.warmup:
            yield
            return
        weights = [
            parameter
            for name, parameter in model.named_parameters()
            if "weight" in name and parameter.dim() > 1 and parameter.requires_grad
        ]
        gradients = _gradients(model, weights, loss)
        before = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    size = self.reach * weight.norm() / (gradient.norm() + TINY)
                    weight.add_(size * gradient)
            yield
        finally:
            with torch.no_grad():  # copied back: subtracting would round
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)

    # Everything else is the other recipe's.

    @property
    def parts(self) -> tuple[PartName, ...]:
        return self.of.parts

    def check(self, num_classes: int) -> None:
        self.of.check(num_classes)

    def memory(self) -> nn.Module | None:
        return self.of.memory()

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.of.perturb(model, x, y)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        return self.of.loss_terms(model, step)

    def after_step(self, model: nn.Module, step: Step) -> None:
        self.of.after_step(model, step)


def _gradients(
    model: nn.Module, weights: list[nn.Parameter], loss: Callable[[], Tensor]
) -> list[Tensor]:
    """The gradient of the loss in each weight, summed over processes; zero where it has none.

    Leaves no trace: buffers, gradients and random generators are as before, so that the pass that
    follows draws the same noise.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with buffers_kept(model), torch.random.fork_rng(devices):
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True, materialize_grads=True)
    if not in_company():
        return list(gradients)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)  # a sum will do: only the direction counts
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
