"""How figures look: one width, one size of type, colours that all readers can tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.4
"""Width of a figure in inches: a column of a two-column paper."""

PAPER, INK, MUTED, GRID = "#ffffff", "#1c2430", "#5b6573", "#dfe3e8"
CLEAN, ROBUST = "#0072b2", "#c2500a"
"""Blue and vermillion of Okabe & Ito (2008), the second darkened to be legible as text."""
CELL = "#1f7fbd"
"""Of heat maps, at most at the opacity DENSE: numbers in ink stay legible on it."""
DENSE = 0.72
SERIES = (ROBUST, CLEAN, "#00795b", "#a8508a", "#8a6500", "#3b4cc0")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Several runs in one figure differ in marker as well, for print without colour."""

FAMILIES = ("Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for our figures, while they are made and while they are written."""
    import warnings

    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {
        "font.family": [name for name in FAMILIES if name in installed],
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.fontsize": 7.5,
        "text.parse_math": False,  # a name with a dollar sign is a name
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "pdf.fonttype": 42,  # publishers want TrueType
        "svg.fonttype": "none",  # text stays text
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A class name may hold letters that no font here has; they show as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


class Share(Protocol):
    """An accuracy in [0, 1] with its interval; None where there is none."""

    @property
    def acc(self) -> float | None: ...
    @property
    def ci95(self) -> tuple[float, float] | None: ...


def canvas(height: float = 2.3, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of one column's width, and its axes; those of a grid are (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, squeeze=columns == 1)


def short(name: str, most: int = 26) -> str:
    """The name, its middle left out if it is long."""
    keep = (most - 1) // 2
    return name if len(name) <= most else f"{name[:keep]}…{name[-keep:]}"


def whiskers(accuracies: Sequence[Share]) -> tuple[np.ndarray, np.ndarray]:
    """Per cent (M,), and the lengths below and above them (2, M); 0 without an interval."""
    centre = np.array([100 * (a.acc or 0.0) for a in accuracies])
    ends = np.array([a.ci95 or (a.acc or 0.0, a.acc or 0.0) for a in accuracies]).T * 100
    return centre, np.maximum(np.stack([centre - ends[0], ends[1] - centre]), 0)


def deviations(
    axes: Axes, x: Iterable[float], y: Iterable[float], shares: Sequence[Share], upright: bool
) -> bool:
    """Wide bars of ± sd at those of the points (x, y) that are means over training seeds.

    upright: the shares are on the y axis. Returns whether there are any.
    """
    drawn = False
    for across, along, share in zip(x, y, shares, strict=True):
        if (sd := getattr(share, "sd", None)) is not None:
            error = (100 * sd, None) if upright else (None, 100 * sd)
            axes.errorbar(
                across, along, *error, fmt="none", ecolor=MUTED, elinewidth=5, alpha=0.3, zorder=1
            )
            drawn = True
    return drawn


def percent_axis(axes: Axes, which: str = "y") -> None:
    getattr(axes, f"set_{which}lim")(-2, 102)
    getattr(axes, f"set_{which}ticks")(range(0, 101, 20))
    axes.grid(False, axis="x" if which == "y" else "y")


def points(
    axes: Axes,
    shares: Sequence[Share],
    y: Sequence[float],
    colour: str,
    mark: str = "o",
    label: str | None = None,
) -> None:
    """Accuracies along x with their intervals; hollow and without one where they are bounds."""
    centre, lengths = whiskers(shares)
    axes.errorbar(centre, y, xerr=lengths, fmt=mark, color=colour, label=label)
    bounds = [i for i, share in enumerate(shares) if share.ci95 is None]
    if bounds:
        axes.plot(centre[bounds], [y[i] for i in bounds], mark, color=colour, mfc=PAPER, zorder=3)
