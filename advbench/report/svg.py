"""Figures as SVG inside a page: small, text as text, in the colours of the page's theme."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from markupsafe import Markup

from advbench.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {
    style.PAPER: "--paper",
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.CLEAN: "--clean",
    style.ROBUST: "--robust",
    style.CELL: "--cell",
    **{colour: f"--series-{i}" for i, colour in enumerate(style.SERIES) if i > 1},
}
"""The page's variable for each colour of a figure."""


def inline(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element that takes its colours and its type from the page.

    name: unique in the page, for the ids inside.  label: what a screen reader says.
    """
    import matplotlib

    text = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, count=2, flags=re.S)
    svg = re.sub(r"<[^>]*>", _slim, svg)
    svg = re.sub(r">\s+<", "><", svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    opening = f'<svg {size[0]} role="img" aria-label="{html.escape(label)}">'
    return Markup(opening + svg[svg.index(">") + 1 :].strip())


def _slim(tag: re.Match[str]) -> str:
    """A tag without what no reference needs, and without what belongs to this machine."""
    text = re.sub(r' id="[a-z0-9.]+_\d+"| transform="rotate\(-0 [^"]*"', "", tag[0])
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"#[0-9a-f]{6}(?=[;\"])", _themed, text)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return re.sub(r"\s+", " ", text)


def _themed(colour: re.Match[str]) -> str:
    variable = VARIABLES.get(colour[0])
    return f"var({variable})" if variable else colour[0]
