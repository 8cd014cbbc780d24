"""One page with everything: ``advbench report --html``. It loads nothing and runs one script, ours.

All text goes through ``markup.el``, which escapes it; no text of a result is inside a script; and
the page's Content-Security-Policy allows the network nothing and scripts but the one by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from advbench.errors import UserError
from advbench.files import write_text
from advbench.report import collection, gallery, sheet, together
from advbench.report.board import leaderboard
from advbench.report.collection import Entry
from advbench.report.markup import Markup, el
from advbench.report.sheet import Figures
from advbench.report.style import style
from advbench.text import count

MOST_FIGURES = 20
"""Evaluations with figures; drawing takes a second for each."""


def write(paths: Sequence[Path], target: Path) -> None:
    """Write the page of all evaluations below the paths, and say where.

    Raises UserError if there are none, and for a target that is no place for a file.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"'{target}' can't be written: give a file in a directory that exists")
    text = page(collection.find(paths))
    write_text(target, text)
    print(f"{target}: {len(text.encode()) / 1e6:.1f} MB")


def page(entries: Sequence[Entry]) -> str:
    """The page as text."""
    ranked = together.ranked(entries)
    ordered = [entry for same in ranked for entry in same]
    varied = {id(entry): collection.varying(same) for same in ranked for entry in same}
    anchors = {id(entry): f"run-{i}" for i, entry in enumerate(ordered, 1)}
    with style():
        figures = Figures()
        sections = [
            leaderboard(ranked, anchors),
            _together(ranked, figures),
            _runs(ordered, anchors, varied, figures),
        ]
    models = len({entry.results.run for entry in entries})
    title = f"{count(len(entries), 'evaluation')} of {count(models, 'model')}"
    css, script = _asset("page.css"), _asset("page.js")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src-elem '{_hash(css)}'; "
        "style-src-attr 'unsafe-inline'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"advbench: {title}"),
        el("style", Markup(css)),
    )
    body = el(
        "body",
        _masthead(title),
        el("main", sections),
        el("footer", f"Made by advbench on {datetime.now().astimezone():%Y-%m-%d at %H:%M}."),
        el("script", Markup(script)),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return (importlib.resources.files("advbench.report") / "assets" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """How a content security policy names a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _masthead(title: str) -> Markup:
    legend = el(
        "p",
        el("span", el("i", class_="key clean"), "clean", class_="legend"),
        el("span", el("i", class_="key robust"), "robust", class_="legend"),
        "Robust accuracy is an upper bound: what these attacks left. Bars are 95 % intervals "
        "(Wilson).",
        class_="lede",
    )
    toggle = el("button", "Dark", type="button", id="theme", aria_label="Switch colour theme")
    top = el("div", el("p", "advbench report", class_="overline"), toggle, class_="top")
    return el("header", top, el("h1", title), legend)


def _together(ranked: Sequence[Sequence[Entry]], figures: Figures) -> Markup | None:
    """Sweeps, and curves over the radius."""
    parts = []
    for same in ranked:
        if figures.full:
            break
        for found in together.sweeps(same):
            parts += [figures.draw(plate) for plate in found.plates()]
        if plate := together.curves_plate(same):
            parts.append(figures.draw(plate))
    if not parts:
        return None
    return el("section", el("h2", "Side by side"), el("div", parts, class_="figures"))


def _runs(
    ordered: Sequence[Entry],
    anchors: Mapping[int, str],
    varied: Mapping[int, Sequence[str]],
    figures: Figures,
) -> Markup:
    """All evaluations, folded up; the first ones with figures."""
    library, trainings = gallery.Library(), {}
    parts, bare = [], 0
    for i, entry in enumerate(ordered):
        drawn = i < MOST_FIGURES and not figures.full
        bare += not drawn
        known = varied[id(entry)], anchors[id(entry)]
        parts.append(sheet.run(entry, *known, library, trainings, figures if drawn else None))
    note = (
        el(
            "p",
            f"Figures of the first {len(ordered) - bare} only, to keep the page small. The others "
            "have their numbers here; give their folders alone to see more.",
            class_="note",
        )
        if bare
        else None
    )
    return el("section", el("h2", "Evaluations"), note, parts, id="runs")
