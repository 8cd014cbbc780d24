"""One evaluation on the page: figures, images, stages, verdict, commands, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from advbench import config
from advbench.errors import UserError
from advbench.report import collection, dossier, gallery, svg
from advbench.report.bits import chips, joined, percent, verdict
from advbench.report.collection import Entry
from advbench.report.conditions import protocol_of, text_of
from advbench.report.dossier import Dossier, Plate
from advbench.report.markup import Child, Markup, el
from advbench.runs.command import command
from advbench.runs.results import MEASURES
from advbench.text import duration

BUDGET = 3_500_000
"""Bytes of figures and images in a page."""


class Figures:
    """Draws figures for the page until enough was drawn."""

    def __init__(self) -> None:
        self.spent = 0
        self.drawn = 0

    def draw(self, plate: Plate) -> Markup:
        self.drawn += 1
        drawing = svg.inline(plate.draw(), f"{plate.name}-{self.drawn}", plate.title)
        return self.keep(
            el(
                "figure",
                el("figcaption", el("strong", plate.title), " ", el("span", plate.caption)),
                drawing,
            )
        )

    def keep(self, part: Markup) -> Markup:
        """The part, whose bytes count."""
        self.spent += len(part)
        return part

    @property
    def full(self) -> bool:
        return self.spent > BUDGET


def run(
    entry: Entry,
    varied: Sequence[str],
    anchor: str,
    library: gallery.Library,
    trainings: dict[Path, str],
    figures: Figures | None,
) -> Markup:
    """An evaluation, folded up.

    varied: settings that set it apart.  anchor: its id in the page.  trainings: anchors of where a
    training is shown already, to which its own is added.  figures: None for numbers alone.
    """
    results = entry.results
    share = results.robust.acc
    robust = collection.UNKNOWN if share is None else f"{percent(share)} %"
    summary = el(
        "summary",
        el(
            "span",
            el("span", results.run, class_="name"),
            el("span", joined(chips(entry, varied)), class_="chips"),
        ),
        el("span", f"{entry.data}, {entry.threat_name}, {protocol_of(entry)}", class_="about"),
        el("span", robust, class_="value"),
    )
    parts: list[Child] = [_headline(entry)]
    if figures is not None:
        parts += _evidence(dossier.read(entry, library), anchor, trainings, figures)
    parts += [
        _stages(entry) if results.attacked else None,
        _indicators(entry),
        _reproduce(entry, figures is not None),
        _provenance(entry),
    ]
    return el("details", summary, el("div", parts, class_="body"), id=anchor, class_="run")


def _headline(entry: Entry) -> Markup:
    results = entry.results
    facts = [("Clean accuracy", str(results.clean))]
    if results.attacked:
        facts = [
            ("Robust accuracy", results.bound()),
            *facts,
            *((MEASURES.get(k, k), f"{100 * v:.1f} %") for k, v in results.measures.items()),
        ]
    if results.missing:
        facts.append(
            ("Unfinished", f"time was up before the end of {', '.join(map(str, results.missing))}")
        )
    return _facts(facts)


def _facts(facts: Sequence[tuple[str, str]]) -> Markup:
    return el(
        "dl",
        [
            el("div", el("dt", name), el("dd", value, class_=_kind(name, value)))
            for name, value in facts
        ],
    )


def _kind(name: str, value: str) -> str | None:
    """How a fact is set: a hash small, and what is long over the whole width of a phone."""
    if name.endswith("sha256"):
        return "hash"
    return "long" if len(value) > 24 else None


def _evidence(
    found: Dossier, anchor: str, trainings: dict[Path, str], figures: Figures
) -> Iterator[Markup]:
    drawings, told = [figures.draw(plate) for plate in found.plates()], None
    folder, plate = found.entry.training, found.learning_plate()
    if plate is not None and folder is not None:
        if folder in trainings:
            link = el("a", "further up", href=f"#{trainings[folder]}")
            told = el("p", "Its training is shown ", link, ".", class_="note")
        else:
            trainings[folder] = anchor
            drawings.append(figures.draw(plate))
    yield el("div", drawings, class_="figures")
    if told is not None:
        yield told
    if found.gallery is not None:
        yield figures.keep(_gallery(found.gallery))
    elif found.evidence is not None and found.entry.config.get("adversarial") is not True:
        found.notes.append("No images were kept; adversarial=true keeps them.")
    yield from (el("p", note, class_="note") for note in found.notes)


def _gallery(shown: gallery.Gallery) -> Markup:
    cards = []
    for picture in shown.pictures:
        images = [
            el("img", src=gallery.png(image), alt=alt, width=96, height=96)
            for image, alt in (
                (picture.clean, f"clean image {picture.sample}, class {picture.truth}"),
                (shown.change(picture), "perturbation, amplified"),
                (picture.adversarial, f"adversarial image, taken for {picture.taken_for}"),
            )
        ]
        label = el(
            "figcaption",
            el("b", picture.truth, class_="clean"),
            " → ",
            el("b", picture.taken_for, class_="robust"),
            el("span", f"{shown.norm} {picture.distance:.3g}, image {picture.sample}"),
        )
        cards.append(el("figure", el("div", images, class_="triple"), label))
    caption = (
        f"Clean image, {shown.legend}, adversarial image. "
        f"Below: the class before and after, and the size of the perturbation in {shown.norm}, "
        "pixels in [0,\u00a01]."
    )
    return el("section", el("h3", "Images"), el("p", caption), el("div", cards, class_="gallery"))


def _table(headings: Sequence[str], rows: Sequence[Sequence[Child]], numbers: set[int]) -> Markup:
    def kind(i: int) -> str | None:
        return "number" if i in numbers else None

    head = el("tr", [el("th", h, scope="col", class_=kind(i)) for i, h in enumerate(headings)])
    lines = [el("tr", [el("td", c, class_=kind(i)) for i, c in enumerate(row)]) for row in rows]
    table = el("table", el("thead", head), el("tbody", lines))
    return el("div", table, class_="scroll", tabindex=0)


def _stages(entry: Entry) -> Markup:
    missing = entry.results.missing
    unfinished = el("span", "unfinished", class_="warn")
    rows = [
        (
            [
                el("b", str(s.name)),
                el("small", str(s.why)),
                unfinished if s.name in missing else None,
            ],
            str(s.target),
            f"{s.attacked:,}",
            f"{s.broken:,}",
            percent(s.robust_acc or 0.0),
            f"{s.forwards:,}",
            f"{s.backwards:,}",
            duration(s.seconds),
        )
        for s in entry.results.begun
    ]
    headings = (
        "Stage",
        "Target",
        "Attacked",
        "Broken",
        "Left (%)",
        "Forwards",
        "Backwards",
        "Time",
    )
    return el("section", el("h3", "Stages"), _table(headings, rows, set(range(2, 8))))


def _indicators(entry: Entry) -> Markup:
    """What the verdict rests on."""
    label, found = entry.verdict, entry.results.verdict.get("indicators")
    rows = [
        (
            [el("b", str(i.get("id", "-"))), el("small", str(i.get("why", "")))],
            text_of(i.get("value", "-")),
            text_of(i.get("threshold", "-")),
            el("span", "yes", class_="warn") if i.get("triggered") else "no",
        )
        for i in (found if isinstance(found, list) else [])
        if isinstance(i, dict)
    ]
    if label is None and not rows:
        return el("section", el("h3", "Verdict"), el("p", "Not computed.", class_="note"))
    headings = ("Indicator", "Value", "Threshold", "Triggered")
    return el(
        "section", el("h3", "Verdict "), el("p", verdict(label)), _table(headings, rows, {1, 2})
    )


def _reproduce(entry: Entry, configs: bool) -> Markup:
    """Commands and configs of the evaluation and of its training."""
    parts: list[Child] = []
    for what, kept in (("Evaluation", entry.config), ("Training", _trained(entry))):
        if not kept:
            continue
        try:
            parts.append(_copyable(f"{what}", command(kept)))
        except UserError as problem:
            parts.append(el("p", f"{what}: {problem}.", class_="note"))
        if configs:
            text = OmegaConf.to_yaml(OmegaConf.create(dict(kept)))
            title = f"config.yaml of the {what.lower()}"
            parts.append(el("details", el("summary", title), _copyable(None, text)))
    if not parts:
        parts.append(el("p", "There is no config.yaml: not run by a command.", class_="note"))
    return el("section", el("h3", "Do it again"), parts)


def _trained(entry: Entry) -> Mapping[str, Any]:
    """The config of the training; empty if there is none."""
    if entry.training is None:
        return {}
    return config.plain(config.read(entry.training / collection.CONFIG))


def _copyable(label: str | None, text: str) -> Markup:
    button = el("button", "Copy", type="button", class_="copy")
    heading = None if label is None else el("span", label, class_="tag")
    return el("div", heading, el("pre", el("code", text), tabindex=0), button, class_="code")


def _provenance(entry: Entry) -> Markup:
    results = entry.results
    known = {
        "folder": str(entry.folder),
        "images": f"{entry.n} of the {results.data.get('split', '-')} split",
        "data sha256": results.data.get("sha256"),
        **results.provenance,
    }
    return el(
        "section",
        el("h3", "Protocol"),
        _facts(_named(results.protocol)),
        el("h3", "Provenance"),
        _facts(_named(known)),
    )


def _named(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(k).replace("_", " "), text_of(v)) for k, v in values.items() if v is not None]
