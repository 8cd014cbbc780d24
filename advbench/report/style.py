"""How figures look: one width, one size of type, colours that all readers can tell apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    there = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {
        "font.family": [name for name in FAMILIES if name in there],
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
