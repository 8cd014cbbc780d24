"""Small pictures of what indicators measured, as SVG inside the page's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT, PAD = 120.0, 36.0, 4.0


def picture(sign: Mapping[str, Any]) -> Markup:
    """The picture of an indicator's numbers; empty where there is none to draw."""
    data = sign.get("data")
    if not isinstance(data, Mapping):
        return Markup("")
    if cosines := _numbers(data.get("cosines")):
        ticks = "".join(
            f'<line x1="{_x(c, -1, 1):.1f}" x2="{_x(c, -1, 1):.1f}" y1="8" y2="28"/>'
            for c in cosines
        )
        return _svg(ticks, "cosine of gradient and differences, image by image, from -1 to 1")
    eps, broken = _numbers(data.get("eps")), _numbers(data.get("broken"))
    if eps and len(eps) == len(broken):
        points = " ".join(
            f"{_x(e, 0, max(eps)):.1f},{HEIGHT - PAD - (HEIGHT - 2 * PAD) * b:.1f}"
            for e, b in zip(eps, broken, strict=True)
        )
        return _svg(f'<polyline fill="none" points="{points}"/>', "share of broken images over eps")
    return Markup("")


def _numbers(values: Any) -> Sequence[float]:
    """The numbers of a list; none if anything else is among them."""
    if not isinstance(values, list) or len(values) > 1000:
        return ()
    plain = all(type(value) in (int, float) and abs(value) < 1e6 for value in values)
    return [float(value) for value in values] if plain else ()


def _x(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return PAD + (WIDTH - 2 * PAD) * min(max(share, 0.0), 1.0)


def _svg(content: str, label: str) -> Markup:
    base = f'<line x1="{PAD}" x2="{WIDTH - PAD}" y1="{HEIGHT - PAD}" y2="{HEIGHT - PAD}"/>'
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" width="{WIDTH:.0f}" role="img" '
        f'aria-label="{label}"><g stroke="var(--muted)">{base}</g>'
        f'<g stroke="var(--robust)" opacity="0.7">{content}</g></svg>'
    )
