"""Express: a cross-entropy search and a few targeted ones, with steps that fall by a cosine.

AutoAttack spends nine targets of 100 steps on what three targets of 20 find, if the targets are
the likeliest wrong classes at the best point so far (compare Gao et al. 2022, arXiv 2206.07314).
Steps and momentum are APGD's (Croce & Hein 2020, arXiv 2003.01690), without its checkpoints. In l1
its steps are sparse (2021, arXiv 2103.01208); ours leave alone the pixels that [0, 1] holds, and
have no momentum, which would spread them over more pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advbench.attacks import losses
from advbench.attacks.base import Answer, Attack, Clean, Oracle, Rows, need_targets, started
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, edge_point, per_row, projection, unit
from advbench.attacks.waits import rows_of, surely_none
from advbench.errors import UserError

MOMENTUM = 0.75
SPREAD = 4
"""Pixels per unit of eps that the first l1 step touches; their number falls with the step size."""


@dataclass
class ExpressRows(Rows):
    """State of Express."""

    previous: Tensor
    """The point before the last move, (N, C, H, W)."""
    margin_best: Tensor
    """The largest margin so far: best wrong logit minus the true one, (N,)."""
    logits_best: Tensor
    """The logits at that point, (N, K)."""
    target: Tensor
    """The class of the targeted search, (N,)."""
    used: Tensor
    """Classes that are no targets any more, (N, K) bool; the true class from the start."""


@dataclass(frozen=True)
class Express(Attack):
    """``steps`` on the cross-entropy, then ``steps`` on the margin of each of ``targets`` classes.

    Each search starts at a random point of its own. Its step size falls from 2 eps to 0.

    Raises:
        UserError: for values out of these ranges.
    """

    steps: int = 20
    """Steps of each search, at least 2."""
    targets: int = 3
    """Targeted searches, at least 1; the next target is the likeliest wrong class that was none
    yet, at the point with the largest margin so far."""

    def __post_init__(self) -> None:
        if self.steps < 2 or self.targets < 1:
            raise UserError("Express needs steps >= 2 and targets >= 1")

    @property
    def starts(self) -> int:
        return 1

    @property
    def queries(self) -> int:
        return self.steps * (1 + self.targets)

    def check(self, num_classes: int, threat: Threat) -> None:
        need_targets(self.targets, num_classes)

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> ExpressRows:
        logits = oracle.logits(clean.x)
        rows = ExpressRows(
            **started(clean, edge_point(clean.x, threat.norm, threat.radius, random), restart),
            previous=clean.x,
            margin_best=losses.margin(logits, clean.y),
            logits_best=logits,
            target=clean.y,
            used=torch.zeros_like(logits, dtype=torch.bool).scatter(1, clean.y[:, None], True),
        )
        rows.forwards += oracle.samples
        return rows

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        assert isinstance(rows, ExpressRows)
        targeted = losses.margin_targeted(logits, rows.y, rows.target)
        untargeted = losses.ce_rescaled(logits, rows.y)
        return torch.where(rows.iteration < self.steps, untargeted, targeted)

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> None:
        assert isinstance(rows, ExpressRows) and answer.gradient is not None
        margin = losses.margin(answer.logits, rows.y)
        improved = margin > rows.margin_best
        rows.margin_best = torch.where(improved, margin, rows.margin_best)
        rows.logits_best = torch.where(improved[:, None], answer.logits, rows.logits_best)
        step = rows.iteration % self.steps
        next_point = self._move(rows, step, answer.gradient, threat)
        rows.previous, rows.point = rows.point, next_point
        rows.iteration += 1
        finished = (step == self.steps - 1) & (rows.iteration < self.queries)
        if not surely_none(finished):
            self._aim(rows, finished, threat, random)

    def _move(self, rows: ExpressRows, step: Tensor, gradient: Tensor, threat: Threat) -> Tensor:
        x, point = rows.x, rows.point
        share = 0.5 * (1 + torch.cos(math.pi / (self.steps - 1) * step)).to(x.dtype)
        into_threat = projection(x, threat.norm, threat.radius)
        size = per_row(2 * threat.radius * share, x)
        if threat.norm == "l1":
            step_end = torch.addcmul(point, size, _sparse(point, gradient, threat.radius * share))
            return into_threat(step_end)
        direction = gradient.sign() if threat.norm == "linf" else unit(gradient, "l2")
        step_end = into_threat(torch.addcmul(point, size, direction))
        weight = per_row(torch.where(step == 0, 1.0, MOMENTUM), x)
        # alpha (ahead - point) + (1 - alpha) (point - previous), added to the point
        return into_threat(torch.lerp(2 * point - rows.previous, step_end, weight))

    def _aim(self, rows: ExpressRows, finished: Tensor, threat: Threat, random: Random) -> None:
        """Give the rows in a mask (N,) their next target, and a new start."""
        logits = rows.logits_best.nan_to_num(torch.finfo(rows.logits_best.dtype).min)
        target = logits.masked_fill(rows.used, -torch.inf).argmax(1)
        rows.target = torch.where(finished, target, rows.target)
        rows.used = rows.used.scatter(1, rows.target[:, None], True)
        index = rows_of(finished)
        x, eps = rows.x[index], threat.radius
        start = edge_point(x, threat.norm, eps, random.of(index), rows.iteration[index])
        rows.point[index] = torch.where(per_row(finished[index], x), start, rows.point[index])


def _sparse(point: Tensor, gradient: Tensor, eps: Tensor) -> Tensor:
    """A sign step of l1 norm one on the pixels with the largest gradients that can move: (N, ...).

    Args:
        point: images in [0, 1], (N, ...); a pixel at the edge moves inwards alone.
        gradient: (N, ...).
        eps: SPREAD times so many pixels are touched, (N,); one at least, all at most.
    """
    movable = torch.where(gradient > 0, point < 1, point > 0)
    slope = torch.where(movable, gradient, 0.0).flatten(1)
    size = slope.abs()
    num_pixels = (SPREAD * eps).long().clamp(1, size.shape[1])
    threshold = size.sort(dim=1, descending=True).values.gather(1, num_pixels[:, None] - 1)
    return unit(torch.where(size >= threshold, slope.sign(), 0.0).view_as(point), "l1")
