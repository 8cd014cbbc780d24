"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049; l1: Croce & Hein 2021, 2103.01208).

A random search without gradients. A proposal changes one square window of the best point; it stays
if the margin rises. Windows shrink during the search.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advbench.attacks.base import Answer, Attack, Clean, Oracle, Rows, need_classes, started
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat, per_row, widest
from advbench.attacks.waits import must_wait, overwrite, rows_of, surely_none
from advbench.errors import UserError

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The window's area halves after these proposals, as in the authors' code for 10000 queries."""
BLOCK = 64
"""Proposals that random words are drawn for at a time."""
SKIPS, SKIPS_QUEUED = 4, 1
"""Proposals at most that a row passes over at a time because they change nothing. The second is
for a GPU, where each costs 30 launches, whether or not a row needs it, and for colour images, where
one in eight windows of a pixel changes nothing; of gray images, one in two."""
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
    bumps: eta and its transpose for each side, (S, 2, 1, side * side); empty for linf.
    """

    sizes: tuple[int, ...]
    sides: Tensor
    halvings: Tensor
    extent: Tensor
    bumps: tuple[Tensor, ...]


@lru_cache(maxsize=32)
def _plan(
    norm: str, p_init: float, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> _Plan:
    sizes = window_sizes(norm, p_init, *shape)
    etas = [] if norm == "linf" else [bump_pair(norm, side) for side in sizes]
    bumps = (torch.stack((eta, eta.T)).flatten(1)[:, None].to(device, dtype) for eta in etas)
    sides, halvings, extent = (torch.tensor(t, device=device) for t in (sizes, HALVINGS, shape))
    return _Plan(sizes, sides, halvings, extent, tuple(bumps))


@lru_cache(maxsize=32)
def _pixels(side: int, channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Places of a window's pixels, counted from its corner over a whole image: (C side side,)."""
    along = torch.arange(side, device=device)
    channel = torch.arange(channels, device=device).view(-1, 1, 1) * (height * width)
    return (channel + along[:, None] * width + along).flatten()


@dataclass
class SquareRows(Rows):
    """State of Square Attack."""

    point_best: Tensor
    """The best point so far, (N, C, H, W)."""
    loss_best: Tensor
    """The margin of the best point, (N,)."""
    proposals: Tensor
    """The next ones, see ``_draw_windows``."""
    dealt: Tensor
    """The number of the first of ``proposals``, (N,)."""


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
        dealt, proposals = self._draw_windows(x, fields["iteration"], threat.norm, random)
        no_loss, point = torch.full((len(x),), -torch.inf, device=x.device), point.contiguous()
        return SquareRows(
            **fields, point_best=point.clone(), loss_best=no_loss, proposals=proposals, dealt=dealt
        )

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> Tensor | None:
        assert isinstance(rows, SquareRows)
        ages = rows.iteration.cpu() if answer.age is None else answer.age
        youngest, oldest = (int(age) for age in ages.aminmax())
        # Misclassified is above zero, hence above the best of a search that continues.
        improved = answer.loss > rows.loss_best
        overwrite(rows.point_best, improved, rows.point)
        rows.loss_best = torch.where(improved, answer.loss, rows.loss_best)

        linf = threat.norm == "linf"
        if linf:
            rows.point.copy_(rows.point_best)
            unchanged = self._paint(rows, (youngest, oldest), threat)
        else:
            self._redistribute(rows, (youngest, oldest), threat)
            unchanged = torch.zeros_like(improved)
        if oldest >= self.steps:
            overwrite(rows.point, rows.iteration >= self.steps, rows.point_best)
        rows.iteration += 1
        few = must_wait(unchanged) and rows.x.shape[1] > 1
        for _ in range((SKIPS_QUEUED if few else SKIPS) if linf else 0):
            # A window that has these signs already changes nothing: its answer is known.
            unchanged &= rows.iteration < self.steps
            if surely_none(unchanged):
                break
            still_unchanged = self._paint(rows, (youngest, oldest), threat, unchanged)
            rows.iteration += unchanged
            unchanged = still_unchanged
        return self._refresh_windows(rows, threat.norm, random)

    def _refresh_windows(self, rows: SquareRows, norm: str, random: Random) -> Tensor:
        """Draw new windows if a row could use up its own in the next query.

        Returns:
            The ages on the host, (N,); reading them waits for the device.
        """
        ages, used = torch.stack((rows.iteration, rows.iteration - rows.dealt)).cpu()
        if int(used.max()) >= 2 * BLOCK - SKIPS:
            rows.dealt, rows.proposals = self._draw_windows(rows.x, rows.iteration, norm, random)
        return ages

    def _drawn(self, rows: SquareRows, at: Tensor) -> Tensor:
        """The next proposals of the rows ``at``, see ``_draw_windows``."""
        column = (rows.iteration - rows.dealt).index_select(0, at)
        dealt = rows.proposals.flatten(0, 1)
        return dealt.index_select(0, at * rows.proposals.shape[1] + column)

    def _paint(
        self, rows: SquareRows, ages: tuple[int, int], threat: Threat, only: Tensor | None = None
    ) -> Tensor:
        """The next proposals in linf: a window gets a sign in each channel (2020, alg. 2).

        Args:
            rows: whose ``point``, which is the best one, becomes the proposal.
            ages: the lowest and the highest, before proposals that were skipped.
            only: rows to work on, (N,) bool; None for all.

        Returns:
            Of which of these the proposal is the best point itself, (N,) bool.
        """
        x, (_, channels, height, width) = rows.x, rows.x.shape
        plan = _plan("linf", self.p_init, (height, width), x.device, x.dtype)
        large, small = (plan.sizes[bisect_left(HALVINGS, n)] for n in (ages[0], ages[1] + SKIPS))
        at = torch.arange(len(x), device=x.device)
        at = at if only is None else at[rows_of(only)]
        drawn = self._drawn(rows, at)
        if small == large:
            pixel = _pixels(large, channels, height, width, x.device)
        else:  # where a window is smaller, its last row and column come again
            along = torch.arange(large, device=x.device).minimum(plan.sides[drawn[:, :1]] - 1)
            channel = torch.arange(channels, device=x.device).view(-1, 1, 1) * (height * width)
            pixel = (channel + (along * width)[:, None, :, None] + along[:, None, None]).flatten(1)
        index = (torch.add(drawn[:, 1], at, alpha=x[0].numel())[:, None] + pixel).flatten()
        old_values = rows.point.flatten().index_select(0, index).view(len(at), channels, -1)
        new_values = x.flatten().index_select(0, index).view_as(old_values)
        new_values.add_(threat.radius * _signs(drawn[:, 3:], x)[..., None]).clamp_(0.0, 1.0)
        unchanged = (new_values - old_values).abs_().flatten(1).amax(1) == 0
        if only is not None and must_wait(only):
            new_values = torch.where(per_row(only, new_values), new_values, old_values)
        rows.point.view(-1).scatter_(0, index, new_values.flatten())
        if only is None:
            return unchanged
        return torch.zeros_like(only).index_copy_(0, at, unchanged & only[at])

    def _redistribute(self, rows: SquareRows, ages: tuple[int, int], threat: Threat) -> None:
        """The next proposals in l2 and l1 become ``rows.point``."""
        x, best = rows.x, rows.point_best
        drawn = self._drawn(rows, torch.arange(len(x), device=x.device))
        fewest, most = (bisect_left(HALVINGS, age) for age in ages)
        if fewest == most:
            rows.point = self._propose(x, best, drawn, threat, fewest)
            return
        for halvings in range(fewest, most + 1):  # the same sums, whatever the others' ages
            mask = drawn[:, 0] == halvings
            index = rows_of(mask)
            points = self._propose(x[index], best[index], drawn[index], threat, halvings)
            rows.point[index] = torch.where(per_row(mask[index], points), points, rows.point[index])

    def _draw_windows(
        self, x: Tensor, age: Tensor, norm: str, random: Random
    ) -> tuple[Tensor, Tensor]:
        """The windows of each row's current BLOCK of proposals and of the next.

        When one row has used up its windows, all rows draw new ones. The draws of a block are
        always the same, and rows of many ages draw no more often than once in BLOCK.

        Returns:
            The number of the first proposal, (N,); and per proposal how often the window's area has
            halved, the place of its corner in a channel, for l2 and l1 that of a second window, and
            one bit each for eta's direction and the channels' signs: (N, 2 BLOCK, ...).
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
        corner = place // across * x.shape[3] + place % across
        shifts = torch.arange(min(channels + 1, 32), device=x.device)
        bits = ((words[..., windows:, None] >> shifts) & 1).flatten(2)[..., : channels + 1]
        return first, torch.cat((halved, corner, bits), 2)

    def _propose(
        self, x: Tensor, best: Tensor, drawn: Tensor, threat: Threat, halvings: int
    ) -> Tensor:
        """The best points with a window changed: 2020, alg. 3 (l2); l1: 2021.

        Args:
            x: clean images, (N, C, H, W).
            best: the best points, (N, C, H, W).
            drawn: of each row's proposal, see ``_draw_windows``.
            threat: in l2 or l1.
            halvings: of the windows; of rows with fewer, the result means nothing.
        """
        norm, (_, channels, height, width) = threat.norm, x.shape
        plan = _plan(norm, self.p_init, (height, width), x.device, x.dtype)
        pixel = _pixels(plan.sizes[halvings], 1, height, width, x.device)
        index = drawn[:, 1:3, None] + pixel
        index = index.clamp_max_(height * width - 1)[:, :, None].expand(-1, -1, channels, -1)
        signs = _signs(drawn[:, 4:, None], x)  # (N, C, 1)
        order = 2 if norm == "l2" else 1
        delta = (best - x).flatten(2)
        slack = threat.radius**order - torch.linalg.vector_norm(delta, order, (1, 2)) ** order
        removed = []
        for k in range(2):
            removed.append(delta.gather(2, index[:, k]))
            delta.scatter_(2, index[:, k], 0.0)
        norms = [torch.linalg.vector_norm(part, order, 2, keepdim=True) for part in removed]
        mass = slack.clamp_min(0.0).view(-1, 1, 1) / channels
        mass = mass + norms[0] ** order + norms[1] ** order

        eta = plan.bumps[halvings][drawn[:, 3]]
        window = eta * signs + removed[0] / (norms[0] + TINY)
        window /= torch.linalg.vector_norm(window, order, 2, keepdim=True) + TINY
        # l2: the whole budget again. l1 asks for more, and the projection takes the least of it.
        window *= mass.sqrt() if norm == "l2" else mass * channels
        delta.scatter_add_(2, index[:, 0], window)
        point = delta.view_as(x).add_(x)
        return point.clamp_(0.0, 1.0) if norm == "l2" else _project_sparse(point, x, threat)


def _project_sparse(point: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """``threat.project`` for l1, at the cost of the pixels that differ from ``x``: the others stay.

    A row whose nearest point in [0, 1] is inside the budget needs no more than that.
    """
    clipped = point.clamp(0.0, 1.0)
    outside = ~threat.contains(clipped, x)
    row, pixel = ((point != x).flatten(1) & outside[:, None]).nonzero(as_tuple=True)
    if not len(row):
        return clipped
    count = outside.new_zeros(len(x), dtype=torch.int64).index_add_(0, row, torch.ones_like(row))
    rank = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count)[row]
    # In float64, where the width of the packed rows does not show in a sum.
    packed = x.new_zeros(2, len(x), int(count.max()), dtype=widest(x))
    packed[0, row, rank] = point.flatten(1)[row, pixel].to(packed.dtype)
    packed[1, row, rank] = x.flatten(1)[row, pixel].to(packed.dtype)
    flat = clipped.flatten(1)
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
