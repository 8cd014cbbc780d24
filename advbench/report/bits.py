"""Small parts that the page says again and again."""

from __future__ import annotations

from collections.abc import Sequence

from advbench.report.collection import Entry
from advbench.report.conditions import text_of
from advbench.report.markup import Child, Markup, el


def chips(entry: Entry, varied: Sequence[str]) -> list[Markup]:
    """What sets an evaluation apart from its neighbours."""
    settings = entry.results.settings
    found = [chip(key, text_of(settings[key])) for key in varied if key in settings]
    if entry.results.missing:
        found.append(el("span", "unfinished", class_="warn"))
    return found


def chip(key: str, value: str) -> Markup:
    """A setting with its value."""
    return el("span", el("em", key), f" {value}")


def joined(parts: Sequence[Markup]) -> list[Child]:
    """The parts with spaces between them, where a line may break."""
    return [child for part in parts for child in (part, " ")][:-1]


def percent(share: float) -> str:
    """A share in [0, 1] in per cent, to a tenth, without the sign."""
    return f"{100 * share:.1f}"


def verdict(label: str | None) -> Markup:
    """A verdict's label, in its colour."""
    known = label if label in ("reliable", "inconclusive", "unreliable") else "none"
    title = None if label else "not computed"
    return el("span", label or "-", class_=f"verdict {known}", title=title)
