"""The threat: a norm and a budget in pixel units, and the geometry that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advbench.attacks.random import Random
from advbench.config.roles import Role
from advbench.errors import UserError, did_you_mean
from advbench.text import threat_name

NORMS = ("linf", "l2", "l1")


def pixels(value: float | int | str, what: str = "eps") -> float:
    """A length in pixel units of [0, 1], from a number or a fraction such as "8/255".

    Args:
        value: as a user writes it.
        what: the name of the setting, for the message.

    Raises:
        UserError: for anything else, for NaN and for negative lengths.
    """
    try:
        numerator, _, denominator = str(value).partition("/")
        length = float(numerator) / (float(denominator) if denominator else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{what}={value!r} is not a length: write 8/255 or 0.03") from None
    if not math.isfinite(length) or length < 0:
        raise UserError(f"{what}={value} is not a length: write 8/255 or 0.03")
    return length


@dataclass(frozen=True)
class Threat:
    """All images within ``eps`` of x in ``norm`` that are images: inside [0, 1].

    Raises:
        UserError: for an unknown norm, and for a linf radius above 1.
    """

    norm: str = field(metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """``linf``, ``l2`` or ``l1``."""
    eps: float | str = field(metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """The radius in pixel units of [0, 1]; a fraction such as ``8/255`` is read as a number."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(
                f"no norm '{self.norm}'{did_you_mean(self.norm, NORMS)} (threat.norm=linf)"
            )
        eps = pixels(self.eps, "threat.eps")
        if self.norm == "linf" and eps > 1:
            number = f"{eps:g}"
            raise UserError(
                f"threat.eps={number} is more than the whole pixel range [0, 1]; "
                f"did you mean threat.eps={number}/255?"
            )
        object.__setattr__(self, "eps", eps)

    @property
    def radius(self) -> float:
        """eps as a number."""
        return float(self.eps)

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """Distance of each row of ``point`` from ``x``: (N, ...) -> (N,)."""
        return norm_of(point - x, self.norm)

    def contains(self, point: Tensor, x: Tensor) -> Tensor:
        """Which rows of ``point`` lie within eps of ``x``, up to float32 rounding.

        Shapes: (N, ...) and (N, ...) -> (N,) bool. It does not look at [0, 1].
        """
        return self.distance(point, x) <= self.radius * (1 + 1e-5) + 1e-7

    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """The rows of ``point`` brought within eps of ``x`` and into [0, 1].

        Args:
            point: any finite numbers, (N, ...).
            x: clean images in [0, 1], (N, ...).

        Returns:
            (N, ...); in linf and l1 the nearest such image.
        """
        return project(point, x, self.norm, self.radius)

    def project_closely(self, point: Tensor, x: Tensor) -> Tensor:
        """``project`` in float64 where the device has it: over the pixels of a large image, sums in
        float32 miss the budget. ``point`` and the result are (N, ...), the result in the type of
        ``x``.
        """
        wide = widest(x)
        return self.project(point.to(wide), x.to(wide)).to(x.dtype)

    def __str__(self) -> str:
        return threat_name(self.norm, self.radius)


def edge_point(
    x: Tensor, norm: str, eps: float, random: Random, iteration: int | Tensor = 0
) -> Tensor:
    """A random image that touches the budget's edge where [0, 1] allows it: (N, ...) -> (N, ...).

    The start of APGD (Croce & Hein 2020, arXiv 2003.01690; 2021, arXiv 2103.01208).

    Args:
        x: clean images in [0, 1], (N, ...).
        norm: linf, l2 or l1.
        eps: radius in pixel units.
        random: draws for these rows.
        iteration: of the search, one number or (N,).
    """
    if norm == "l1":
        return project(x + random.normal(x, iteration), x, norm, eps)
    linf = norm == "linf"
    noise = 2 * random.uniform(x, iteration) - 1 if linf else random.normal(x, iteration)
    return project(x + eps * unit(noise, norm), x, norm, eps)


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), to broadcast against ``like``."""
    return value.view(-1, *[1] * (like.dim() - 1))


def norm_of(delta: Tensor, norm: str) -> Tensor:
    """The norm of each row: (N, ...) -> (N,)."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    if norm == "l2":
        return flat.norm(dim=1)
    # A sum over the pixels of a large image is too coarse in float32.
    return flat.abs().sum(1, dtype=widest(delta)).to(delta.dtype)


def widest(like: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def unit(delta: Tensor, norm: str) -> Tensor:
    """Each row scaled to norm one, however small it is; a zero row stays zero."""
    largest = per_row(norm_of(delta, "linf"), delta)
    delta = delta / torch.where(largest > 0, largest, 1.0)
    return delta if norm == "linf" else delta / per_row(norm_of(delta, norm), delta).clamp_min(1.0)


def project(point: Tensor, x: Tensor, norm: str, eps: float | Tensor) -> Tensor:
    """Bring each row of ``point`` within ``eps`` of ``x`` and into [0, 1].

    Args:
        point: (N, ...).
        x: clean images in [0, 1], (N, ...).
        norm: linf, l2 or l1.
        eps: one radius, or (N,). For linf and l1 this is the Euclidean projection onto the
            intersection; for l2 the ball comes first and the box second, which is feasible because
            x itself lies in the box.
    """
    return projection(x, norm, eps)(point)


def projection(x: Tensor, norm: str, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
    """``project`` for several points of the same images.

    Args:
        x: clean images in [0, 1], (N, ...).
        norm: linf, l2 or l1.
        eps: one radius, or (N,).

    Returns:
        A function of points (N, ...).
    """
    radius = per_row(eps, x) if isinstance(eps, Tensor) else eps
    if norm == "linf":
        low, high = (x - radius).clamp_(min=0.0), (x + radius).clamp_(max=1.0)
        return lambda point: point.clamp(low, high)
    if norm == "l2":
        return lambda point: _project_l2(point - x, x, radius)
    return lambda point: x + _project_l1_box(point - x, x, eps)


def _project_l2(delta: Tensor, x: Tensor, radius: float | Tensor) -> Tensor:
    length = per_row(norm_of(delta, "l2"), x)
    # A length of exactly eps must not be scaled: rounding would walk the point inwards.
    scale = torch.where(length > radius, radius / length.clamp_min(1e-12), 1.0)
    return torch.clamp(x + delta * scale, 0.0, 1.0)


def _project_l1_box(delta: Tensor, x: Tensor, eps: float | Tensor) -> Tensor:
    """Euclidean projection of ``delta`` onto {d: ||d||_1 <= eps, 0 <= x + d <= 1}.

    The solution is sign(delta) * clamp(|delta| - lam, 0, room), with the smallest lam >= 0 whose
    l1 norm is at most eps (Croce & Hein 2021, arXiv 2103.01208, prop. 2.1). The norm is piecewise
    linear and falling in lam, so sorting its breakpoints gives lam exactly.
    """
    size = delta.flatten(1).abs()
    base = x.flatten(1)
    room = torch.where(delta.flatten(1) >= 0, 1 - base, base).clamp_min(0.0)
    total = torch.minimum(size, room).sum(1)
    excess = total - eps

    # Going up in lam, entry i starts to shrink at |delta| - room and is gone at |delta|.
    starts = (size - room).clamp_min(0.0)
    points, order = torch.cat([starts, size], 1).sort(dim=1)
    slope = torch.where(order < size.shape[1], 1.0, -1.0).cumsum(1)
    gaps = points.diff(dim=1, prepend=points.new_zeros(len(points), 1))
    shrunk = (gaps[:, 1:] * slope[:, :-1]).cumsum(1)
    shrunk = torch.cat([shrunk.new_zeros(len(shrunk), 1), shrunk], 1)  # at each breakpoint

    segment = (torch.searchsorted(shrunk, excess[:, None].contiguous(), right=True) - 1).clamp(
        0, points.shape[1] - 1
    )
    rest = excess[:, None] - shrunk.gather(1, segment)
    lam = points.gather(1, segment) + rest / slope.gather(1, segment).clamp_min(1.0)
    lam = torch.where(excess[:, None] > 0, lam, torch.zeros_like(lam))
    kept = torch.minimum((size - lam).clamp_min(0.0), room)
    return (kept * delta.flatten(1).sign()).view_as(delta)
