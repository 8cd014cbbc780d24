"""JumpReLU: a threshold in the ReLUs of a finished net (Erichson et al., arXiv 1904.03750)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbench.config.roles import Role
from advbench.data.base import Split, Splits
from advbench.defenses.base import Defense, PartName, Surrogate, Traits
from advbench.errors import UserError
from advbench.surgery import probe_images, replace_modules, split_sites, twin

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
BATCH = 256  # images per pass over the validation split
GRID = [*(i / 100 for i in range(1, 11)), 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0]


class Jump(nn.Module):
    """J(z) = z if z > jump else 0, elementwise, and at most ``cap``. Its gradient is 1[z > jump].

    Args:
        jump: a number, at least 0; a buffer.
        chosen: the jump is chosen on data, and so belongs to the state. Otherwise it is a
            parameter of the defense, and weights from a file leave it alone.
        cap: 6 in the place of a ReLU6; None means no cap.

    Attributes:
        slope: whose gradient goes backwards, through the same values: ``own``; ``relu``, 1[z > 0];
            ``half``, 1[z > jump / 2]; ``sigmoid``, sigmoid((z - jump) / t), t = softness * jump >
            0. None of them lets anything through above the cap.
    """

    jump: Tensor

    def __init__(self, jump: float, *, chosen: bool = False, cap: float | None = None) -> None:
        super().__init__()
        self.register_buffer("jump", torch.tensor(float(jump)), persistent=chosen)
        self.cap = cap
        self.slope = "own"
        self.softness = 1.0

    def forward(self, z: Tensor) -> Tensor:
        capped = z if self.cap is None else z.clamp(max=self.cap)
        value = torch.where(z <= self.jump, 0.0, capped)  # NaN stays NaN
        if self.slope == "own":
            return value
        soft = self._soft(capped)
        return value.detach() + (soft - soft.detach())

    def _soft(self, z: Tensor) -> Tensor:
        """A function whose gradient is the slope."""
        if self.slope == "relu":
            return z.relu()
        if self.slope == "half":
            return torch.where(z <= self.jump / 2, 0.0, z)
        t = self.softness * self.jump
        return t * F.softplus((z - self.jump) / t)

    def extra_repr(self) -> str:
        return f"cap={self.cap}, slope={self.slope}"


@dataclass(frozen=True)
class JumpReLU(Defense):
    """A ``Jump`` in the place of every ReLU and ReLU6, with one jump for all.

    In the paper a retrofit: the net is trained without it. So is it here with an automatic jump,
    which is chosen when the training is finished; a jump that is a number acts in training too.

    Raises:
        UserError: for values out of range.
    """

    jump: float | str = field(default="auto", metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """A number, at least 0 (0 is ReLU), or ``auto``: the largest of ``grid`` that costs at most
    ``max_drop`` points of clean validation accuracy, chosen by ``finish``; 0 if none does."""
    max_drop: float = 1.0
    """Points of 100 of clean validation accuracy that ``auto`` may cost, at least 0."""
    grid: list[float] = field(default_factory=lambda: list(GRID))
    """The jumps that ``auto`` chooses from, each at least 0."""

    def __post_init__(self) -> None:
        if isinstance(self.jump, str) and self.jump != "auto":
            raise UserError(f"defense.jump={self.jump} is not a number from 0 on, or auto")
        numbers = {"max_drop": [self.max_drop], "grid": self.grid}
        numbers["jump"] = [] if isinstance(self.jump, str) else [self.jump]
        for name, values in numbers.items():
            for value in values:
                if not 0 <= value < math.inf:
                    raise UserError(f"defense.{name}={value:g} is not a number from 0 on")
        if not self.grid:
            raise UserError("defense.grid=[] has no jump to choose: give defense.grid=[0.1,0.2]")

    @property
    def auto(self) -> bool:
        """The jump is chosen on the validation split."""
        return self.jump == "auto"

    def traits(self, model: nn.Module) -> Traits:
        jumps = jump_of(model) > 0
        return Traits(gradient="discontinuous" if jumps else "exact", retrofit=True)

    def apply(self, model: Any) -> Any:
        """Replaces the activations; each call gets a module of its own first.

        Args:
            model: a Classifier, or any nn.Module with an ``input_shape``, (C, H, W).

        Returns:
            The model with ``Jump`` modules; an automatic jump is 0 until ``finish``.

        Raises:
            UserError: for a model without ReLUs, or whose calls can't be separated.
        """
        x = probe_images(model.input_shape).to(_device(model))
        model = split_sites(model, ACTIVATIONS, x)
        jump = 0.0 if self.auto else float(self.jump)

        def make(old: nn.Module, name: str) -> nn.Module:
            cap = 6.0 if isinstance(old, nn.ReLU6) else None
            return Jump(jump, chosen=self.auto, cap=cap).to(_device(model))

        replace_modules(model, ACTIVATIONS, make)
        return model

    def before_part(self, model: Any, part: PartName) -> None:
        """Training is without an automatic jump, also where the weights to begin from have one."""
        if self.auto:
            _set(model, 0.0)

    def finish(self, model: Any, data: Splits) -> dict[str, Any]:
        """Choose the automatic jump.

        Raises:
            UserError: for an empty validation split.
        """
        if not self.auto:
            return {}
        if not len(data.val):
            raise UserError("the validation split is empty: give defense.jump=NUMBER")
        _set(model, 0.0)
        before = _right(model, data.val)
        for jump in sorted(self.grid, reverse=True):
            _set(model, jump)
            if 100 * (before - _right(model, data.val)) <= self.max_drop * len(data.val):
                return {"jump": jump}
        _set(model, 0.0)
        return {"jump": 0.0}

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        """The same values with other gradients, and other jumps; none where the jump is 0."""
        if (jump := jump_of(model)) <= 0:
            return {}
        slopes = {
            "bpda_relu": ("relu", 1.0, "1[z > 0]"),
            "bpda_half": ("half", 1.0, "1[z > jump / 2]"),
            "bpda_sigmoid-quarter": ("sigmoid", 0.25, "sigmoid((z - jump) / t), t = jump / 4"),
            "bpda_sigmoid-full": ("sigmoid", 1.0, "sigmoid((z - jump) / t), t = jump"),
        }
        factors = {
            "base": (0.0, f"the net without its jump of {jump:g}, as in the paper's gray box"),
            "half": (0.5, "half the jump: fewer dead units, nearly the same net"),
            "double": (2.0, "twice the jump: only the largest units count"),
        }
        surrogates = {}
        for name, (slope, softness, reason) in slopes.items():
            copy = twin(model)
            for site in _sites(copy):
                site.slope, site.softness = slope, softness
            why = f"backwards {reason}, where the jump itself has no gradient"
            surrogates[name] = Surrogate(copy, exact=True, loss="ce", why=why)
        for name, (factor, why) in factors.items():
            copy = twin(model)
            for site in _sites(copy):
                site.jump = factor * site.jump  # a new buffer: the old one is the model's too
            surrogates[name] = Surrogate(copy, exact=False, loss="ce", why=why)
        return surrogates


def jump_of(model: nn.Module) -> float:
    """The largest jump in the model; 0 where there is none."""
    return max((float(site.jump) for site in _sites(model)), default=0.0)


def _sites(model: nn.Module) -> list[Jump]:
    return [module for module in model.modules() if isinstance(module, Jump)]


def _set(model: nn.Module, jump: float) -> None:
    for site in _sites(model):
        site.jump.fill_(jump)


@torch.no_grad()
def _right(model: nn.Module, split: Split) -> int:
    """How many samples the model classifies right."""
    batches = split.batches(torch.arange(len(split)), BATCH, _device(model))
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)


def _device(model: nn.Module) -> torch.device:
    """Where the model is; the CPU if nothing of it is anywhere."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
