"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049; l1: Croce & Hein 2021, 2103.01208).

A random search without gradients. A proposal changes one square window of the best point; it stays
if the margin rises. Windows shrink during the search.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advbench.attacks.base import Answer, Attack, Clean, Oracle, Rows, need_classes, started
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, per_row, widest
from advbench.attacks.waits import overwrite, rows_of, surely_none
from advbench.errors import UserError

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The window's area halves after these proposals, as in the authors' code for 10000 queries."""
BLOCK = 64
"""Proposals that random words are drawn for at a time."""
SKIPS = 4
"""Proposals at most that a row passes over at a time because they change nothing."""
TINY = 1e-12


def window_sizes(norm: str, p_init: float, height: int, width: int) -> tuple[int, ...]:
    """The side of the window before each of ``HALVINGS`` and after the last, in pixels.

    A window covers the share p of the image (2020, sec. 3.1). For l2 and l1 its side is odd and at
    least 3. No side is longer than the image's shorter one.

    Args:
        norm: linf, l2 or l1.
        p_init: the share that the first window covers, in (0, 1].
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    areas = (p_init / 2**halved * height * width for halved in range(len(HALVINGS) + 1))
    sides = (max(round(math.sqrt(area)), 1 if norm == "linf" else 3) for area in areas)
    return tuple(min(s if norm == "linf" else s // 2 * 2 + 1, height, width) for s in sides)


def bump_pair(norm: str, side: int) -> Tensor:
    """eta, a positive bump above a negative one, of norm one (2020, sec. 3.4).

    Each bump falls with the Chebyshev distance d from its centre, as the sum of 1 / k^2 over k > d;
    for l1 it is 1 / k^4.

    Args:
        norm: l2 or l1.
        side: of the window, in pixels; odd and at least 3.

    Returns:
        (side, side).
    """
    order, power = (2, 2.0) if norm == "l2" else (1, 4.0)
    halves = []
    for height in (side // 2, side - side // 2):
        down = (torch.arange(height) - height // 2).abs()
        across = (torch.arange(side) - side // 2).abs()
        ring = torch.maximum(down[:, None], across)
        terms = torch.arange(1, max(height, side) // 2 + 2, dtype=torch.float64) ** -power
        bump = terms.flip(0).cumsum(0).flip(0)[ring]
        halves.append(bump / torch.linalg.vector_norm(bump, order).clamp_min(TINY))
    pair = torch.cat((halves[0], -halves[1]))
    return pair / torch.linalg.vector_norm(pair, order)


class _Plan(NamedTuple):
    """What a search needs to know of its windows, on its device.

    sizes, sides: the window's after each number of halvings, (S,).  extent: height and width (2,).
    bumps: eta and its transpose for each side, in the upper left corner, (S, 2, largest side,
    largest side); empty for linf.
    """

    sizes: tuple[int, ...]
    sides: Tensor
    halvings: Tensor
    extent: Tensor
    bumps: Tensor


@lru_cache(maxsize=32)
def _plan(
    norm: str, p_init: float, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> _Plan:
    sizes = window_sizes(norm, p_init, *shape)
    bumps = torch.empty(0)
    if norm != "linf":
        bumps = torch.zeros(len(sizes), 2, sizes[0], sizes[0])
        for place, side in zip(bumps, sizes, strict=True):
            eta = bump_pair(norm, side)
            place[0, :side, :side], place[1, :side, :side] = eta, eta.T
    sides, halvings, extent = (torch.tensor(t, device=device) for t in (sizes, HALVINGS, shape))
    return _Plan(sizes, sides, halvings, extent, bumps.to(device, dtype))


@dataclass
class SquareRows(Rows):
    """State of Square Attack."""

    point_best: Tensor
    """The best point so far, (N, C, H, W)."""
    loss_best: Tensor
    """The margin of the best point, (N,)."""
    windows: Tensor
    """Those of the next proposals, see ``_deal``."""
    dealt: Tensor
    """The number of the first proposal in ``windows``, (N,)."""


@dataclass(frozen=True)
class Square(Attack):
    """Square Attack in linf, l2 and l1.

    Unlike the reference, every row has windows and signs of its own, a window can also lie at the
    lower and right border, and the start for l2 and l1 covers images of any height and width.

    Raises:
        UserError: for values out of these ranges.
    """

    gradient: ClassVar[bool] = False

    steps: int = 5000
    """Proposals per search. With the starting point that is steps + 1 queries; the point after the
    last one is the best, which is judged once more. The reference (the authors' code in
    AutoAttack) spends the same steps + 2 forward passes on a sample that withstands."""
    restarts: int = 1
    """Searches per sample."""
    p_init: float = 0.8
    """The share of the image that the first windows cover, in (0, 1]."""

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts) < 1:
            raise UserError("Square Attack needs steps >= 1 and restarts >= 1")
        if not 0 < self.p_init <= 1:
            raise UserError(f"p_init={self.p_init} is not a share of the image, in (0, 1]")

    @property
    def starts(self) -> int:
        return self.restarts

    @property
    def queries(self) -> int:
        return self.steps + 1

    def check(self, num_classes: int, threat: Threat) -> None:
        need_classes("margin", num_classes)

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> SquareRows:
        x = clean.x
        if threat.norm == "linf":  # vertical stripes
            stripes = _signs(random.words(x, x.shape[1] * x.shape[3]) >> 31, x)
            stripes = stripes.view(len(x), x.shape[1], 1, x.shape[3])
            point = (x + threat.radius * stripes).clamp(0.0, 1.0)
        else:
            tiles = _tiles(x, threat.norm, random)
            if threat.norm == "l2":
                tiles *= threat.radius / tiles.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            point = threat.project_closely(x.to(widest(x)) + tiles, x)
        fields = started(clean, point, restart)
        dealt, windows = self._deal(x, fields["iteration"], threat.norm, random)
        worst = torch.full((len(x),), -torch.inf, device=x.device)
        return SquareRows(
            **fields, point_best=point.clone(), loss_best=worst, windows=windows, dealt=dealt
        )

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> Tensor | None:
        assert isinstance(rows, SquareRows)
        ages = rows.iteration.cpu() if answer.age is None else answer.age
        # Misclassified is above zero, hence above the best of a search that continues.
        better = answer.loss > rows.loss_best
        overwrite(rows.point_best, better, rows.point)
        overwrite(rows.loss_best, better, answer.loss)

        rows.point, idle = self._proposals(rows, slice(None), ages, threat)
        if int(ages.max()) >= self.steps:
            done = rows.iteration >= self.steps
            rows.point = torch.where(per_row(done, rows.x), rows.point_best, rows.point)
        rows.iteration += 1
        for _ in range(SKIPS if threat.norm == "linf" else 0):
            # A window that has these signs already changes nothing: its answer is known.
            idle &= rows.iteration < self.steps
            if surely_none(idle):
                break
            at = rows_of(idle)
            point, again = self._proposals(rows, at, ages, threat)
            rows.point[at] = torch.where(per_row(idle[at], point), point, rows.point[at])
            rows.iteration += idle
            idle[at] = idle[at] & again
        return self._deal_in_time(rows, threat.norm, random)

    def _deal_in_time(self, rows: SquareRows, norm: str, random: Random) -> Tensor:
        """Deal anew if a row could come to the end of its windows in the next query.

        Returns the ages on the host, (N,): what is read here waits for the device.
        """
        ages, used = torch.stack((rows.iteration, rows.iteration - rows.dealt)).cpu()
        if int(used.max()) >= 2 * BLOCK - SKIPS:
            rows.dealt, rows.windows = self._deal(rows.x, rows.iteration, norm, random)
        return ages

    def _proposals(
        self, rows: SquareRows, at: Any, ages: Tensor, threat: Threat
    ) -> tuple[Tensor, Tensor]:
        """The next proposals of the rows ``at``, and which of these are the best point itself.

        ages: of all rows, on the host, before those that were skipped.
        """
        age, windows = rows.iteration[at], rows.windows[at]
        drawn = windows[torch.arange(len(age), device=age.device), age - rows.dealt[at]]
        x, best = rows.x[at], rows.point_best[at]
        young, old = (bisect_left(HALVINGS, int(n)) for n in ages.aminmax())
        if young == old or threat.norm == "linf":
            return self._propose(x, best, drawn, threat, young)
        point = torch.empty_like(x)
        for halvings in range(young, old + 1):  # the same sums, whatever the ages of the others
            mine = drawn[:, 1] == halvings
            one = rows_of(mine)
            some, _ = self._propose(x[one], best[one], drawn[one], threat, halvings)
            point[one] = torch.where(per_row(mine[one], some), some, point[one])
        return point, torch.zeros_like(mine)

    def _deal(self, x: Tensor, age: Tensor, norm: str, random: Random) -> tuple[Tensor, Tensor]:
        """The windows of each row's current BLOCK of proposals and of the next.

        A row that comes to the end of its windows lets all deal anew. A block's draws are always
        the same, and rows of many ages draw no more often than once in BLOCK.

        Returns the number of the first proposal, (N,), and per proposal the window's side, how
        often its area has halved, its first row and column, for l2 and l1 those of a second window,
        and one bit each for eta's direction and the channels' signs: (N, 2 BLOCK, ...).
        """
        plan = _plan(norm, self.p_init, tuple(x.shape[2:]), x.device, x.dtype)
        windows, channels, block = 1 if norm == "linf" else 2, x.shape[1], age // BLOCK
        first, count = block * BLOCK, windows + channels // 32 + 1
        # Iteration 0 is the start's.
        words = torch.cat([random.words(x, BLOCK * count, block + k) for k in (1, 2)], 1)
        words = words.view(-1, 2 * BLOCK, count)
        number = first[:, None] + torch.arange(2 * BLOCK, device=x.device)
        halved = torch.bucketize(number, plan.halvings)[..., None]
        side = plan.sides[halved]
        down, across = (plan.extent - side + 1).split(1, 2)  # places for a window
        place = (words[..., :windows] * (down * across)) >> 32
        corner = torch.stack((place // across, place % across), 3).flatten(2)
        shifts = torch.arange(min(channels + 1, 32), device=x.device)
        bits = ((words[..., windows:, None] >> shifts) & 1).flatten(2)[..., : channels + 1]
        return first, torch.cat((side, halved, corner, bits), 2)

    def _propose(
        self, x: Tensor, best: Tensor, drawn: Tensor, threat: Threat, halvings: int
    ) -> tuple[Tensor, Tensor]:
        """The best points with a window changed: 2020, alg. 2 (linf) and 3 (l2); l1: 2021.

        Returns the points, and for linf which of them are the best points still, (N,).
        Works on crops of the images, as large as the window after so many halvings.
        drawn: what ``_deal`` says of each row's proposal.
        """
        norm = threat.norm
        plan = _plan(norm, self.p_init, tuple(x.shape[2:]), x.device, x.dtype)
        crop = plan.sizes[halvings]
        windows = 1 if norm == "linf" else 2
        side, halved = drawn[:, 0].view(-1, 1, 1, 1), drawn[:, 1]
        corner = drawn[:, 2 : 2 + 2 * windows].view(-1, windows, 2)
        shift = (corner - (plan.extent - crop)).clamp_min(0)  # of the window in its crop
        along = torch.arange(crop, device=x.device) - shift[..., None]  # (N, windows, 2, crop)
        pixel = corner[..., None] + along
        within = (along >= 0) & (along < side)
        index = (pixel[:, :, 0, :, None] * x.shape[3] + pixel[:, :, 1, None, :]).flatten(2)
        inside = (within[:, :, 0, :, None] & within[:, :, 1, None, :]).flatten(2)
        index = index[:, :, None].expand(-1, -1, x.shape[1], -1)  # (N, windows, C, crop * crop)
        inside = inside[:, :, None]

        signs = _signs(drawn[:, 3 + 2 * windows :, None], x)  # (N, C, 1)
        if norm == "linf":
            point = best.flatten(2).clone()
            index = index[:, 0]
            corners = (x.flatten(2).gather(2, index) + threat.radius * signs).clamp_(0.0, 1.0)
            before = point.gather(2, index)
            after = torch.where(inside[:, 0], corners, before)
            return point.scatter_(2, index, after).view_as(x), (after == before).flatten(1).all(1)

        order = 2 if norm == "l2" else 1
        delta = (best - x).flatten(2)
        spare = threat.radius**order - torch.linalg.vector_norm(delta, order, (1, 2)) ** order
        lifted = []
        for k in range(windows):
            there = delta.gather(2, index[:, k])
            lifted.append(torch.where(inside[:, k], there, 0.0))
            delta.scatter_(2, index[:, k], there - lifted[k])
        norms = [torch.linalg.vector_norm(part, order, 2, keepdim=True) for part in lifted]
        mass = spare.clamp_min(0.0).view(-1, 1, 1) / x.shape[1]
        mass = mass + norms[0] ** order + norms[1] ** order

        down, across = along[:, 0, 0, :, None], along[:, 0, 1, None, :]
        which, size = (2 * halved + drawn[:, 6]).view(-1, 1, 1), plan.sizes[0]
        cells = ((which * size + down) * size + across).flatten(1)
        eta = plan.bumps.take(cells.clamp_(0, plan.bumps.numel() - 1))[:, None]
        fresh = torch.where(inside[:, 0], eta * signs, 0.0) + lifted[0] / (norms[0] + TINY)
        fresh /= torch.linalg.vector_norm(fresh, order, 2, keepdim=True) + TINY
        # l2: the whole budget again. l1 asks for more, and the projection takes the least of it.
        fresh *= mass.sqrt() if norm == "l2" else mass * x.shape[1]
        delta.scatter_add_(2, index[:, 0], fresh)
        point = delta.view_as(x).add_(x)
        point = point.clamp_(0.0, 1.0) if norm == "l2" else _project_sparse(point, x, threat)
        return point, torch.zeros(len(x), dtype=torch.bool, device=x.device)


def _project_sparse(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """``threat.project`` for l1, at the cost of the pixels that differ from ``x``: the others stay.

    A row whose nearest point in [0, 1] is inside the budget needs no more than that.
    """
    boxed = point.clamp(0.0, 1.0)
    over = ~threat.contains(boxed, x)
    row, pixel = ((point != x).flatten(1) & over[:, None]).nonzero(as_tuple=True)
    if not len(row):
        return boxed
    count = over.new_zeros(len(x), dtype=torch.int64).index_add_(0, row, torch.ones_like(row))
    rank = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
    # In float64, where the width of the packed rows does not show in a sum.
    packed = x.new_zeros(2, len(x), int(count.max()), dtype=widest(x))
    packed[0, row, rank] = point.flatten(1)[row, pixel].to(packed.dtype)
    packed[1, row, rank] = x.flatten(1)[row, pixel].to(packed.dtype)
    flat = boxed.flatten(1)
    flat[row, pixel] = threat.project(packed[0], packed[1])[row, rank].to(x.dtype)
    return flat.view_as(x)


def _signs(bits: Tensor, like: Tensor) -> Tensor:
    """0 -> 1 and 1 -> -1, in the type of ``like``."""
    return 1 - 2 * bits.to(like.dtype)


def _tiles(x: Tensor, norm: str, random: Random) -> Tensor:
    """The start for l2 and l1: a grid of etas with random directions and signs, (N, C, H, W)."""
    n, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    words = random.words(x, (channels + 1) * down * across) >> 31
    grid = words.view(n, channels + 1, down, across)
    grid = grid.repeat_interleave(side, 2).repeat_interleave(side, 3)
    eta = bump_pair(norm, side).to(x)
    eta, turned = eta.repeat(down, across), eta.T.repeat(down, across)
    tiles = torch.where(grid[:, :1] == 0, eta, turned) * _signs(grid[:, 1:], x)
    above, left = (height - down * side) // 2, (width - across * side) // 2
    below, right = height - down * side - above, width - across * side - left
    return F.pad(tiles, (left, right, above, below))
