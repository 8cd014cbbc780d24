"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690; for l1: Croce & Hein 2021, arXiv 2103.01208)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from advbench.attacks import losses
from advbench.attacks.base import (
    Answer,
    Attack,
    Clean,
    Oracle,
    Rows,
    need_classes,
    need_targets,
    started,
    untargeted,
    wrong_class,
)
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, edge_point, per_row, project, projection, unit
from advbench.attacks.waits import overwrite, surely_none
from advbench.errors import UserError, did_you_mean

MOMENTUM = 0.75  # alpha, 2020, eq. 2


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values on a device, sent there once."""
    return torch.tensor(values, device=device, dtype=dtype)


@dataclass
class APGDRows(Rows):
    """State of APGD."""

    previous: Tensor
    """The point before the last move, (N, C, H, W)."""
    point_best: Tensor
    """The best point so far, (N, C, H, W)."""
    gradient_best: Tensor
    """The gradient at the best point."""
    loss_best: Tensor
    """The loss at the best point, (N,)."""
    loss_last: Tensor
    """The loss at the last point, (N,)."""
    step: Tensor
    """The step size, (N,), in pixel units."""
    period: Tensor
    """Queries between two checkpoints, (N,)."""
    since: Tensor
    """Queries after the last checkpoint, (N,)."""
    rises: Tensor
    """How many of these raised the loss, (N,)."""
    best_at_check: Tensor
    """The best loss as of the last checkpoint, (N,)."""
    halved_at_check: Tensor
    """Whether the last checkpoint halved the step, (N,)."""
    phase: Tensor
    """Index into the schedule of radii, (N,)."""
    phase_iteration: Tensor
    """Queries in the phase, (N,)."""
    sparsity: Tensor
    """The share of pixels that an l1 step touches, (N,)."""
    support: Tensor
    """The l0 norm of the perturbation at the last checkpoint, (N,)."""
    target: Tensor
    """The class of a targeted search, (N,)."""


@dataclass(frozen=True)
class APGD(Attack):
    """APGD in linf, l2 and l1.

    Raises:
        UserError: for values out of these ranges.
    """

    steps: int = 100
    """Steps per search, at least 1."""
    restarts: int = 1
    """Searches per sample, and per target for a targeted loss."""
    loss_name: str = "ce"
    """``ce``, ``margin``, ``dlr``, ``margin_targeted`` or ``dlr_targeted``."""
    targets: int = 9
    """Of a targeted loss: the classes with the largest wrong logits, one after the other."""
    rho: float = 0.75
    """The share of steps that must raise the loss, in (0, 1] (2020, sec. 3.2)."""
    large_radius: bool = False
    """Begin at three and two times eps (2021, sec. 4.2; l1 only)."""

    def __post_init__(self) -> None:
        if self.loss_name not in losses.NAMES:
            hint = did_you_mean(self.loss_name, losses.NAMES)
            raise UserError(f"no attack loss '{self.loss_name}'{hint}")
        if min(self.steps, self.restarts, self.targets) < 1:
            raise UserError("APGD needs steps >= 1, restarts >= 1 and targets >= 1")

    @property
    def targeted(self) -> bool:
        return self.loss_name in losses.TARGETED

    @property
    def starts(self) -> int:
        return self.restarts * (self.targets if self.targeted else 1)

    @property
    def _schedule(self) -> tuple[tuple[float, int], ...]:
        """(multiple of eps, steps) of each phase."""
        if not self.large_radius:
            return ((1.0, self.steps),)
        third = math.ceil(0.3 * self.steps)
        return ((3.0, third), (2.0, third), (1.0, max(self.steps - 2 * third, 1)))

    @property
    def queries(self) -> int:
        # Each phase but the last also queries its last point: the next begins at the best one.
        return sum(steps for _, steps in self._schedule) + len(self._schedule) - 1

    def stays_inside(self, threat: Threat) -> bool:
        return not self.large_radius

    def check(self, num_classes: int, threat: Threat) -> None:
        need_classes(self.loss_name, num_classes)
        if self.targeted:
            need_targets(self.targets, num_classes)

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> APGDRows:
        x = clean.x
        eps = threat.radius * self._schedule[0][0]
        point = edge_point(x, threat.norm, eps, random)
        rows = APGDRows(
            **started(clean, point, restart),
            previous=point.clone(),
            point_best=point.clone(),
            gradient_best=torch.zeros_like(x),
            **{name: x.new_zeros(len(x)) for name in ("step", "sparsity", "support")},
            **{name: x.new_full((len(x),), -torch.inf)
               for name in ("loss_best", "loss_last", "best_at_check")},
            halved_at_check=torch.ones_like(clean.y, dtype=torch.bool),
            **{name: torch.zeros_like(clean.ids)
               for name in ("period", "since", "rises", "phase", "phase_iteration")},
            target=clean.y,
        )  # fmt: skip
        if self.targeted:
            rows.target = wrong_class(oracle, rows, restart // self.restarts)
        all_rows = torch.ones_like(rows.halved_at_check)
        self._begin_phase(rows, all_rows, threat, fresh=not self.large_radius)
        return rows

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        if self.targeted:
            assert isinstance(rows, APGDRows)
            return losses.TARGETED[self.loss_name](logits, rows.y, rows.target)
        return untargeted(self.loss_name)(logits, rows.y)

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> None:
        assert isinstance(rows, APGDRows) and answer.gradient is not None
        loss, first = answer.loss, rows.phase_iteration == 0
        point, gradient = rows.point, answer.gradient
        improved = first | (loss > rows.loss_best)
        rows.loss_best = torch.where(improved, loss, rows.loss_best)
        overwrite(rows.point_best, improved, point)
        overwrite(rows.gradient_best, improved, gradient)
        rows.best_at_check = torch.where(first, loss, rows.best_at_check)
        rows.rises += ~first & (loss > rows.loss_last)
        rows.since += ~first
        rows.loss_last = loss

        check = rows.since == rows.period
        if not surely_none(check):
            restore = self._checkpoint_l1(rows, check, threat) if threat.norm == "l1" else (
                self._checkpoint(rows, check)
            )  # fmt: skip
            overwrite(point, restore, rows.point_best)
            overwrite(gradient, restore, rows.gradient_best)
            rows.since = torch.where(check, 0, rows.since)
            rows.rises = torch.where(check, 0, rows.rises)

        next_point = self._move(rows, point, gradient, threat)
        rows.previous, rows.point = point, next_point
        rows.iteration += 1
        rows.phase_iteration += 1
        if self.large_radius:
            self._next_phase(rows, answer.age, threat)

    def _eps(self, rows: APGDRows, threat: Threat) -> Tensor | float:
        """The radius of each row's phase, (N,), or that of all."""
        if threat.norm == "linf" and not self.large_radius:
            return threat.radius
        multiples = tuple(multiple for multiple, _ in self._schedule)
        return _constant(multiples, rows.x.device, rows.x.dtype)[rows.phase] * threat.radius

    def _checkpoint(self, rows: APGDRows, check: Tensor) -> Tensor:
        """Conditions 1 and 2 of 2020, sec. 3.2. Returns which rows go back to their best point."""
        few_rises = rows.rises <= self.rho * rows.period
        no_progress = ~rows.halved_at_check & (rows.best_at_check >= rows.loss_best)
        halve = check & (few_rises | no_progress)
        rows.step = torch.where(halve, rows.step / 2, rows.step)
        rows.halved_at_check = torch.where(check, halve, rows.halved_at_check)
        rows.best_at_check = torch.where(check, rows.loss_best, rows.best_at_check)
        period = (rows.period - max(int(0.03 * self.steps), 1)).clamp_min(
            max(int(0.06 * self.steps), 1)
        )
        rows.period = torch.where(check, period, rows.period)
        return halve

    def _checkpoint_l1(self, rows: APGDRows, check: Tensor, threat: Threat) -> Tensor:
        """Sparsity follows the best point's support; 2021, alg. 1.

        Ours: a search that has stopped improving at its smallest step continues with fewer pixels.
        Equal steps on a support that has several pixels are a fixed point of the paper's rule, even
        on a linear model, whose optimum is a single pixel.
        """
        size = rows.x[0].numel()
        support = (rows.point_best != rows.x).flatten(1).sum(1).to(rows.x.dtype)
        sparser = support / rows.support.clamp_min(1) < 0.95
        eps = self._eps(rows, threat)
        min_step = eps / 10
        no_progress = (rows.step <= min_step) & (rows.loss_best <= rows.best_at_check)
        share = torch.where(
            no_progress, torch.minimum(rows.sparsity, support / size), support / size
        )
        step = torch.where(sparser, eps, (rows.step / 1.5).clamp_min(min_step))
        rows.step = torch.where(check, step, rows.step)
        rows.sparsity = torch.where(check, share / 1.5, rows.sparsity)
        rows.support = torch.where(check, support, rows.support)
        rows.best_at_check = torch.where(check, rows.loss_best, rows.best_at_check)
        return check & sparser

    def _move(self, rows: APGDRows, point: Tensor, gradient: Tensor, threat: Threat) -> Tensor:
        x, norm, step = rows.x, threat.norm, per_row(rows.step, rows.x)
        into_threat = projection(x, norm, self._eps(rows, threat))
        if norm == "l1":
            size = gradient.flatten(1).abs()
            rank = ((1 - rows.sparsity) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
            threshold = size.sort(dim=1).values.gather(1, rank[:, None])
            sparse = torch.where(size >= threshold, gradient.flatten(1).sign(), 0.0)
            return into_threat(point + step * unit(sparse.view_as(x), "l1"))
        direction = gradient.sign() if norm == "linf" else unit(gradient, norm)
        step_end = into_threat(torch.addcmul(point, step, direction))
        weight = per_row(torch.where(rows.phase_iteration == 0, 1.0, MOMENTUM), x)
        # alpha (ahead - point) + (1 - alpha) (point - previous), added to the point. The previous
        # point is needed no more: its memory takes the result.
        carried = rows.previous.neg_().add_(point, alpha=2)
        return into_threat(carried.lerp_(step_end, weight))

    def _begin_phase(self, rows: APGDRows, mask: Tensor, threat: Threat, fresh: bool) -> None:
        """Set the rows of ``mask`` to the beginning of their phase, at their point."""
        eps = self._eps(rows, threat)
        if threat.norm == "l1":
            num_pixels = rows.x[0].numel()
            changed_pixels = (rows.point != rows.x).flatten(1).sum(1).to(rows.x.dtype)
            support = torch.full_like(changed_pixels, num_pixels) if fresh else changed_pixels
            sparsity = (
                torch.full_like(changed_pixels, 0.2) if fresh else changed_pixels / num_pixels / 1.5
            )
            rows.support = torch.where(mask, support, rows.support)
            rows.sparsity = torch.where(mask, sparsity, rows.sparsity)
            lengths = tuple(max(int(0.04 * n), 1) for _, n in self._schedule)
            period = _constant(lengths, rows.period.device, rows.period.dtype)[rows.phase]
            step = eps
        else:
            period = torch.full_like(rows.period, max(int(0.22 * self.steps), 1))
            step = 2 * eps
        rows.step = torch.where(mask, step, rows.step)
        rows.period = torch.where(mask, period, rows.period)
        for name in ("since", "rises", "phase_iteration"):
            setattr(rows, name, torch.where(mask, 0, getattr(rows, name)))
        rows.previous = torch.where(per_row(mask, rows.x), rows.point, rows.previous)

    def _next_phase(self, rows: APGDRows, age: Tensor | None, threat: Threat) -> None:
        """Hand the best point of a finished phase on to the next, smaller radius.

        age: of the rows before this query, on the host, if it is known.
        """
        lengths = tuple(steps + 1 for _, steps in self._schedule)
        ends = torch.tensor(lengths[:-1]).cumsum(0)
        if age is not None and not torch.isin(age + 1, ends).any():
            return
        last_phase = len(self._schedule) - 1
        length = _constant(lengths, rows.phase.device, rows.phase.dtype)[rows.phase]
        finished = (rows.phase < last_phase) & (rows.phase_iteration == length)
        if surely_none(finished):
            return
        rows.phase = torch.where(finished, rows.phase + 1, rows.phase)
        start = project(rows.point_best, rows.x, threat.norm, self._eps(rows, threat))
        rows.point = torch.where(per_row(finished, rows.x), start, rows.point)
        self._begin_phase(rows, finished, threat, fresh=False)
