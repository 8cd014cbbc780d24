"""Iterative FGSM without a budget, the attack of the JumpReLU paper (arXiv 1904.03750)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advbench.attacks import losses
from advbench.attacks.base import Answer, Attack, Clean, Oracle, Rows, started
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, pixels
from advbench.errors import UserError


@dataclass(frozen=True)
class IFGSM(Attack):
    """Steps of ``step_size`` along the sign of the gradient of the cross-entropy, from x, until the
    sample is fooled. Points are kept inside [0, 1], and never brought back into a ball.

    Where all steps together fit into the radius this is an attack inside the threat; with more of
    them it may leave it, and what it finds outside does not count.

    Raises:
        UserError: for values out of these ranges.
    """

    steps: int = 100
    """The largest number of steps, at least 1."""
    step_size: float | str = 0.01
    """In pixel units, "2/255" or a number above 0."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError("IFGSM needs steps >= 1")
        size = pixels(self.step_size, "step_size")
        if not size:
            raise UserError("IFGSM needs step_size above 0")
        object.__setattr__(self, "step_size", size)

    @property
    def starts(self) -> int:
        return 1

    @property
    def queries(self) -> int:
        return self.steps

    def stays_inside(self, threat: Threat) -> bool:
        # 35 steps of 0.01 are 0.35, whatever floating point makes of the product.
        return self.steps * float(self.step_size) <= threat.radius * (1 + 1e-6)

    def check(self, num_classes: int, threat: Threat) -> None:
        if threat.norm != "linf":
            raise UserError("IFGSM is an attack in linf: give threat=linf_8")

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        return Rows(**started(clean, clean.x.clone(), restart))

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return losses.ce(logits, rows.y)

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> None:
        assert answer.gradient is not None
        step = float(self.step_size) * answer.gradient.sign()
        rows.point = (rows.point + step).clamp(0.0, 1.0)
        rows.iteration += 1
