"""One page with everything: ``advbench report --html``. It loads nothing and runs one script, ours.

The templates escape all text and refuse undefined names; no text of a result is inside a script;
and the page's Content-Security-Policy allows the network nothing and scripts but the one by its
hash.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf

from advbench import config
from advbench.errors import UserError
from advbench.files import write_text
from advbench.report import collection, gallery, group_figures, run_figures, svg
from advbench.report.collection import Entry
from advbench.report.conditions import protocol_of, text_of
from advbench.report.indicator_pictures import picture
from advbench.report.page_leaderboard import (
    LABELS,
    interval_text,
    leaderboard_rows,
    model_of,
    percent_text,
)
from advbench.report.run_figures import Plate
from advbench.report.style import style
from advbench.runs.command import command
from advbench.runs.results import MEASURES
from advbench.text import count, duration, size
from advbench.verdict import words

MOST_FIGURES = 20
"""Evaluations with figures; drawing takes a second for each."""

BUDGET = 3_500_000
"""Bytes of figures and images in a page."""


def write(paths: Sequence[Path], target: Path) -> None:
    """Write the page of all evaluations below the paths, and print where.

    Raises:
        UserError: If there are none, and for a path that can't hold a file.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"'{target}' can't be written: give a file in a directory that exists")
    text = page(collection.find(paths))
    write_text(target, text)
    print(f"{target}: {size(len(text.encode()))}")


def page(entries: Sequence[Entry]) -> str:
    """The page as text."""
    ranked = group_figures.ranked(entries)
    ordered = [entry for same in ranked for entry in same]
    varied = {entry: collection.varying(same) for same in ranked for entry in same}
    anchors = {entry: f"run-{i}" for i, entry in enumerate(ordered, 1)}
    library, trainings, figures = gallery.Library(), {}, Figures()
    with style():
        shared, runs, bare = figures.shared(ranked), [], 0
        for i, entry in enumerate(ordered):
            drawn = i < MOST_FIGURES and not figures.full
            bare += not drawn
            details = varied[entry], anchors[entry]
            runs.append(_run(entry, *details, library, trainings, figures if drawn else None))
    models = len({repr(model_of(entry)) for entry in entries})
    css, script = _asset("page.css"), _asset("page.js")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src-elem '{_hash(css)}'; "
        "style-src-attr 'unsafe-inline'"
    )
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=f"{count(len(entries), 'evaluation')} of {count(models, 'model')}",
            css=Markup(css),
            script=Markup(script),
            policy=policy,
            now=f"{datetime.now().astimezone():%Y-%m-%d at %H:%M}",
            labels=LABELS,
            anchors=anchors,
            shared=shared,
            runs=runs,
            bare=bare,
            **leaderboard_rows(ranked),
        )
    )


@cache
def templates() -> Environment:
    """Jinja's environment: everything is escaped, and an undefined name raises."""
    environment = Environment(
        loader=PackageLoader("advbench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=percent_text,
        interval=interval_text,
        duration=duration,
        text=text_of,
        named=_named,
        png=gallery.png,
        picture=picture,
        answers=words.answers,
        next_steps=words.next_steps,
        meaning=words.LABELS.get,
    )
    return environment


class Figures:
    """Draws figures for the page until enough was drawn."""

    def __init__(self) -> None:
        self.spent = 0
        self.drawn = 0

    @property
    def full(self) -> bool:
        """Whether the page has no room left."""
        return self.spent > BUDGET

    def draw(self, plate: Plate) -> dict[str, str]:
        """The figure as SVG, with its words."""
        self.drawn += 1
        drawing = svg.inline(plate.draw(), f"{plate.name}-{self.drawn}", plate.title)
        self.spent += len(drawing)
        return {"title": plate.title, "caption": plate.caption, "svg": drawing}

    def shared(self, ranked: Sequence[Sequence[Entry]]) -> list[dict[str, str]]:
        """Sweeps, and curves over the radius."""
        parts = []
        for same in ranked:
            if self.full:
                break
            for found in group_figures.sweeps(same):
                parts += map(self.draw, found.plates())
            if plate := group_figures.curves_plate(same):
                parts.append(self.draw(plate))
        return parts


def _asset(name: str) -> str:
    return (importlib.resources.files("advbench.report") / "assets" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """How a content security policy names a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _named(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(k).replace("_", " "), text_of(v)) for k, v in values.items() if v is not None]


# --- the leaderboard ----------------------------------------------------------------------------


# --- one evaluation -----------------------------------------------------------------------------


def _run(
    entry: Entry,
    varied: Sequence[str],
    anchor: str,
    library: gallery.Library,
    trainings: dict[Path, str],
    figures: Figures | None,
) -> dict[str, Any]:
    """What the page says of an evaluation.

    Args:
        entry: The evaluation.
        varied: Settings that set it apart.
        anchor: Its id in the page.
        library: Data sets that are open.
        trainings: Anchors of where a training is shown already; its own is added.
        figures: None for numbers alone.
    """
    results = entry.results
    facts = [("Robust accuracy", results.bound())] if results.attacked or results.missing else []
    if (estimated := results.estimated()) is not None:
        facts.append(("Estimate", estimated))
    facts.append(("Clean accuracy", str(results.clean)))
    if results.attacked:
        facts += [(MEASURES.get(k, k), f"{100 * v:.1f} %") for k, v in results.measures.items()]
    if results.missing:
        facts.append(
            ("Missing", f"the budget was spent before the end of {', '.join(results.missing)}")
        )
    if (naive := words.naive(results)) is not None:
        facts.append(
            (
                "Too high",
                f"{percent_text(naive)} %, after the attacks that follow the model's own gradient",
            )
        )
    share = "-" if results.robust.acc is None else f"{percent_text(results.robust.acc)} %"
    return {
        "entry": entry,
        "varied": varied,
        "anchor": anchor,
        "about": f"{entry.data}, {entry.threat_name}, {protocol_of(entry)}",
        "headline": f"at most {share}" if results.attacked and results.missing else share,
        "naive": None if naive is None else f"{percent_text(naive)} %",
        "facts": facts,
        "commands": _commands(entry, figures is not None),
        "provenance": {
            "folder": str(entry.folder),
            "images": f"{entry.n} of the {results.data.get('split') or '-'} split",
            "data sha256": results.data.get("sha256"),
            **results.provenance,
        },
        **_evidence(entry, anchor, library, trainings, figures),
    }


def _evidence(
    entry: Entry,
    anchor: str,
    library: gallery.Library,
    trainings: dict[Path, str],
    figures: Figures | None,
) -> dict[str, Any]:
    """Figures and images, and what could not be shown."""
    if figures is None:
        return {"figures": [], "trained_at": None, "gallery": None, "notes": []}
    dossier = run_figures.read(entry, library)
    drawn, trained_at = [figures.draw(plate) for plate in dossier.plates()], None
    plate = dossier.learning_plate()
    if plate is not None and entry.training is not None:
        trained_at = trainings.get(entry.training)
        if trained_at is None:
            trainings[entry.training] = anchor
            drawn.append(figures.draw(plate))
    if dossier.gallery is not None:
        figures.spent += gallery.LARGEST**2 * len(dossier.gallery.pictures)
    elif dossier.evidence is not None and entry.config.get("adversarial") is not True:
        dossier.notes.append("No images were kept; adversarial=true keeps them.")
    return {
        "figures": drawn,
        "trained_at": trained_at,
        "gallery": dossier.gallery,
        "notes": dossier.notes,
    }


def _commands(entry: Entry, configs: bool) -> list[dict[str, str | None]]:
    """Commands, and configs, of the evaluation and of its training."""
    trained: Mapping[str, Any] = {}
    if entry.training is not None:
        trained = config.plain(config.read(entry.training / collection.CONFIG))
    commands: list[dict[str, str | None]] = []
    evaluated, training = (entry.folder, entry.config), (entry.training, trained)
    for kind, (folder, cfg) in (("Evaluation", evaluated), ("Training", training)):
        if not cfg:
            continue
        repeated: dict[str, str | None] = {"what": kind, "command": None, "problem": None}
        try:
            repeated["command"] = command(cfg, folder)
        except UserError as problem:
            repeated["problem"] = str(problem)
        repeated["config"] = OmegaConf.to_yaml(OmegaConf.create(dict(cfg))) if configs else None
        commands.append(repeated)
    return commands
