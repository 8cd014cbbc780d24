"""FAB, the fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044), in linf, l2, l1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advbench.attacks import losses
from advbench.attacks.base import (
    Answer,
    Attack,
    Clean,
    Oracle,
    Rows,
    need_targets,
    started,
    wrong_class,
)
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, norm_of, per_row, unit
from advbench.attacks.waits import must_wait
from advbench.errors import UserError

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
FIRST_COORDINATES = 128  # coordinates that most l1 projections get by with
NEWTON_PASSES = 50  # Newton needs 2 to 4, and less than 20 for inputs made to be slow
NEWTON_PASSES_QUEUED = 6  # where looking at the outcome of each would wait for the device
TINY, HUGE = 1e-37, 1e30  # in float32


@dataclass
class FABRows(Rows):
    """State of FAB."""

    target: Tensor
    """The class of a targeted search, (N,)."""


@dataclass(frozen=True)
class FAB(Attack):
    """Walks along the decision boundary towards x; alg. 1 of the paper.

    The model is taken to be linear around the point, and both the point and x are projected onto
    its boundary there. The next point lies between the two projections, a bit beyond the boundary;
    if it is misclassified, it is pulled back towards x. So the search needs no budget: it looks for
    the nearest error, wherever that is.

    Raises:
        UserError: for values out of these ranges.
    """

    steps: int = 100
    """Steps per search, at least 1."""
    restarts: int = 1
    """Searches per sample, and per target for a targeted search. The first one starts at x."""
    targeted: bool = True
    """One boundary per search (FAB-T; arXiv 2003.01690); if False, at each step the nearest one,
    for one backward pass per wrong class."""
    targets: int = 9
    """Of a targeted search: the classes with the largest wrong logits, one after the other."""
    alpha_max: float = 0.1
    """The largest weight of x's projection (the paper's biased step)."""
    eta: float = 1.05
    """Length of a step, in distances to the boundary."""
    beta: float = 0.9
    """How much of the way from x a misclassified point keeps (backward step)."""

    peeks = True
    joint = False  # it looks for the nearest boundary of each row by itself

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts, self.targets) < 1:
            raise UserError("FAB needs steps >= 1, restarts >= 1 and targets >= 1")
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta <= 1):
            raise UserError("FAB needs alpha_max in [0, 1], eta >= 1 and beta in (0, 1]")

    @property
    def averages(self) -> bool:
        return self.targeted

    @property
    def starts(self) -> int:
        return self.restarts * (self.targets if self.targeted else 1)

    @property
    def queries(self) -> int:
        return self.steps

    def stays_inside(self, threat: Threat) -> bool:
        return False

    def check(self, num_classes: int, threat: Threat) -> None:
        if self.targeted:
            need_targets(self.targets, num_classes)

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> FABRows:
        x = clean.x
        restarted = (restart % self.restarts > 0).to(x.dtype)
        point = x.clone()
        if self.restarts > 1:
            noise = 2 * random.uniform(x) - 1 if threat.norm == "linf" else random.normal(x)
            radius = per_row(restarted * threat.radius / 2, x)
            point = (x + radius * unit(noise, threat.norm)).clamp(0.0, 1.0)
        rows = FABRows(**started(clean, point, restart), target=clean.y)
        if self.targeted:
            rows.target = wrong_class(oracle, rows, restart // self.restarts)
        return rows

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        assert isinstance(rows, FABRows)
        return losses.margin_targeted(logits, rows.y, rows.target)

    def ask(self, oracle: Oracle, rows: Rows, threat: Threat) -> Answer:
        """Logits, and the nearest boundary's margin and its gradient.

        The distance of a boundary is |margin| over the dual norm of its gradient.
        """
        if self.targeted:
            return super().ask(oracle, rows, threat)
        logits, margins, gradients = oracle.boundaries(rows)
        nearest = torch.full_like(margins[:, 0], torch.inf)
        loss, gradient = margins[:, 0], torch.zeros_like(rows.x)
        usable = torch.zeros_like(nearest, dtype=torch.bool)
        for margin, (margin_gradient, is_finite) in zip(margins.unbind(1), gradients, strict=True):
            usable |= is_finite
            distance = margin.abs() / (norm_of(margin_gradient, DUAL[threat.norm]) + 1e-12)
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            loss = torch.where(closer, margin, loss)
            gradient = torch.where(per_row(closer, margin_gradient), margin_gradient, gradient)
        return Answer(logits, loss, gradient, usable)

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> None:
        assert answer.gradient is not None
        x, point, normal = rows.x, rows.point, answer.gradient
        gap = -answer.loss
        drift = (normal * (point - x)).flatten(1).sum(1)
        images = torch.stack((point, x))
        moves = hyperplane_moves(images, normal, torch.stack((gap, gap + drift)), threat.norm)
        length = norm_of(moves.flatten(0, 1), threat.norm).view(2, -1).clamp_min(1e-8)
        alpha = (length[0] / length.sum(0)).clamp_max(self.alpha_max)
        beyond, x_beyond = moves.mul_(self.eta).add_(images)
        rows.point = torch.lerp(beyond, x_beyond, per_row(alpha, x)).clamp_(0.0, 1.0)
        rows.iteration += 1

    def settle(self, rows: Rows, logits: Tensor, threat: Threat) -> None:
        wrong = logits.argmax(1) != rows.y
        beta = rows.x.new_ones(len(rows)).masked_fill_(wrong, self.beta)
        rows.point = torch.lerp(rows.x, rows.point, per_row(beta, rows.x))


def hyperplane_moves(start: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """The smallest moves that take images onto a hyperplane and keep them in [0, 1].

    Exact up to rounding. Entry i of an image moves by m_i in [0, room_i], which closes m_i |w_i| of
    the gap. In linf and l2, m = min(lam u, room) with u = 1 and u = |w|; what that closes is a
    concave, piecewise linear function of lam, so Newton's method from zero climbs to the root in a
    few passes and then stands still. In l1 the entries with the largest |w_i| come first.

    Args:
        start: (P, N, ...), P images per hyperplane, in [0, 1].
        normal: (N, ...).
        gap: (P, N), by how much <normal, image> has to change; its sign says on which side of the
            hyperplane the image is.

    Returns:
        (P, N, ...). An image that can't get there goes as far as the box allows; one whose normal
        is zero stays.
    """
    shape, start = start.shape, start.flatten(2)
    size = normal.flatten(1).abs()
    scale = size.amax(1, keepdim=True).clamp_min(TINY)
    size = size.div_(scale)
    sign = normal.flatten(1).sign() * gap.sign()[..., None]
    room = torch.gt(sign, 0, out=torch.empty_like(sign)).sub_(start).abs_()
    goal = torch.nan_to_num(gap.abs()[..., None] / scale, 0.0, HUGE)
    if norm == "l1":
        moves = _greedy(size, room, goal)
    elif norm == "l2":
        most = size * _newton(size**2, size * room, room / size.clamp_min(TINY), goal)
        moves = torch.minimum(room, most, out=room)
    else:
        most = _newton(size, size * room, room, goal)
        moves = torch.minimum(room, most, out=room)
    return moves.mul_(sign).view(shape)


def _newton(slope: Tensor, full: Tensor, stops: Tensor, goal: Tensor) -> Tensor:
    """The smallest lam with sum_i min(lam slope_i, full_i) = goal, or a large one if there is none.

    slope: (N, d).  full: (P, N, d), zero where the slope is.  stops: (P, N, d), where full is
    reached.  goal: (P, N, 1).  Returns (P, N, 1).
    """
    mask = torch.empty_like(full)
    total_slope = torch.gt(stops, 0, out=mask).mul_(slope).sum(2, keepdim=True).clamp_min_(TINY)
    lam = goal / total_slope
    for _ in range(1, NEWTON_PASSES_QUEUED if must_wait(goal) else NEWTON_PASSES):
        last_slope = total_slope
        total_slope = torch.gt(stops, lam, out=mask).mul_(slope).sum(2, keepdim=True)
        total_slope.clamp_min_(TINY)
        # Nothing stopped on the way: lam is the root, and stays it in further passes.
        if not must_wait(goal) and torch.equal(total_slope, last_slope):
            break
        closed = torch.le(stops, lam, out=mask).mul_(full).sum(2, keepdim=True)
        lam = torch.maximum(lam, (goal - closed).div_(total_slope))
    return lam.clamp_max_(HUGE)


def _greedy(size: Tensor, room: Tensor, goal: Tensor) -> Tensor:
    """The moves in [0, room] with the smallest sum and sum_i size_i move_i = goal.

    size: (N, d).  room: (P, N, d).  goal: (P, N, 1).  Returns (P, N, d): all of the room where size
    is above a threshold, and the rest of the goal shared out where it is at the threshold.
    """
    full = size * room
    k = size.shape[1] if must_wait(goal) else min(FIRST_COORDINATES, size.shape[1])
    threshold, unreached = _threshold(size, full, goal, k)
    rows = unreached.any(0).squeeze(1)
    if k < size.shape[1] and rows.any():
        threshold[:, rows], _ = _threshold(size[rows], full[:, rows], goal[:, rows], size.shape[1])
    above, at = (size > threshold).to(size.dtype), (size == threshold).to(size.dtype)
    rest = goal - (above * full).sum(2, keepdim=True)
    share = (rest / (at * full).sum(2, keepdim=True).clamp_min(TINY)).clamp(0.0, 1.0)
    return room * (above + at * share)


def _threshold(size: Tensor, full: Tensor, goal: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The size at which the k largest entries, in order, reach the goal; and where they don't."""
    largest, order = size.topk(k, dim=1)
    closed = full.gather(2, order.expand(len(full), -1, -1)).cumsum(2)
    needed = (closed < goal).sum(2, keepdim=True)
    threshold = largest.expand(len(full), -1, -1).gather(2, needed.clamp_max(k - 1))
    return threshold, needed == k
