"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083); FGSM is its single step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advbench.attacks.base import (
    Answer,
    Attack,
    Clean,
    Oracle,
    Rows,
    need_classes,
    started,
    untargeted,
)
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, per_row, pixels, unit
from advbench.errors import UserError


@dataclass(frozen=True)
class PGD(Attack):
    """PGD with a fixed step in linf or l2.

    Raises:
        UserError: for values out of these ranges.
    """

    steps: int = 10
    """Steps per search, at least 1."""
    step_size: float | str | None = None
    """In pixel units, ``2/255`` or a number; None is 2.5 eps / steps (Madry et al., app. B), and
    eps for a single step."""
    restarts: int = 1
    """Searches per sample, at least 1."""
    loss_name: str = "ce"
    """``ce``, ``margin`` or ``dlr``."""
    random_start: bool = True
    """Start uniformly in the linf ball; for l2 in a uniform direction, at a uniform radius."""

    def __post_init__(self) -> None:
        untargeted(self.loss_name)
        if self.steps < 1 or self.restarts < 1:
            raise UserError("PGD needs steps >= 1 and restarts >= 1")
        if self.step_size is not None:
            object.__setattr__(self, "step_size", pixels(self.step_size, "step_size"))

    @property
    def starts(self) -> int:
        return self.restarts

    @property
    def queries(self) -> int:
        return self.steps

    def check(self, num_classes: int, threat: Threat) -> None:
        need_classes(self.loss_name, num_classes)
        if threat.norm == "l1":
            raise UserError("PGD's step is not defined for l1: use protocol=apgd")

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        x = clean.x
        point = x.clone()
        if self.random_start and threat.norm == "linf":
            point = threat.project(x + threat.radius * (2 * random.uniform(x) - 1), x)
        elif self.random_start:
            radius = random.uniform(x[:, :1, :1, :1], iteration=1).flatten() * threat.radius
            point = threat.project(x + per_row(radius, x) * unit(random.normal(x), "l2"), x)
        return Rows(**started(clean, point, restart))

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        return untargeted(self.loss_name)(logits, rows.y)

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> None:
        assert answer.gradient is not None
        default = threat.radius if self.steps == 1 else 2.5 * threat.radius / self.steps
        size = default if self.step_size is None else float(self.step_size)
        gradient = answer.gradient
        step = gradient.sign() if threat.norm == "linf" else unit(gradient, "l2")
        rows.point = threat.project(rows.point + size * step, rows.x)
        rows.iteration += 1
