"""One page with everything: ``advbench report --html``. It loads nothing and runs one script, ours.

All text goes through ``markup.el``, which escapes it; no text of a result is inside a script; and
the page's Content-Security-Policy allows the network nothing and scripts but the one by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from advbench import config
from advbench.console import duration
from advbench.errors import UserError
from advbench.files import write_text
from advbench.report import collection, commands, dossier, gallery, svg
from advbench.report.collection import Entry, Group, Mean
from advbench.report.conditions import Wording
from advbench.report.dossier import Dossier, Plate
from advbench.report.markup import Child, Markup, el
from advbench.report.outcome import MEASURES
from advbench.report.style import style

MOST_FIGURES = 20
"""Evaluations with figures; drawing takes a second for each."""
BUDGET = 3_500_000
"""Bytes of figures and images in a page."""


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
    ranked = dossier.ranked(entries)
    ordered = [entry for same in ranked for entry in same]
    varied = {id(entry): collection.varying(same) for same in ranked for entry in same}
    anchors = {id(entry): f"run-{i}" for i, entry in enumerate(ordered, 1)}
    with style():
        figures = Figures()
        sections = [
            _leaderboard(ranked, anchors),
            _together(ranked, figures),
            _runs(ordered, anchors, varied, figures),
        ]
    models = len({entry.results.run for entry in entries})
    title = f"{_count(len(entries), 'evaluation')} of {_count(models, 'model')}"
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
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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


# --- the leaderboard ----------------------------------------------------------------------------

COLUMNS = (
    ("model", "Model", "text"),
    ("clean", "Clean", "number"),
    ("robust", "Robust", "number"),
    (None, "0 to 100 %", None),
    ("verdict", "Verdict", "text"),
    ("seconds", "Time", "number"),
)
FILTERS = (
    ("data", "Data"),
    ("threat", "Threat"),
    ("protocol", "Protocol"),
    ("defense", "Defense"),
)


def _leaderboard(ranked: Sequence[Sequence[Entry]], anchors: Mapping[int, str]) -> Markup:
    bodies, rows = [], 0
    wording = Wording([Group((same[0],)) for same in ranked])
    for same in ranked:
        varied = collection.varying(same)
        best = sorted(collection.groups(same), key=lambda g: -g.robust.acc)
        words = wording.of(same[0])
        head = el(
            "tr",
            el(
                "th",
                el("b", words["data"]),
                f" {_count(same[0].n, 'image')}, ",
                el("b", words["threat"]),
                f", {words['protocol']}",
                colspan=len(COLUMNS),
                scope="rowgroup",
            ),
            class_="group",
        )
        lines = [_row(group, varied, anchors) for group in best]
        rows += len(lines)
        bodies.append(el("tbody", head, lines))
    headings = [
        el(
            "th",
            el("button", label, type="button", data_key=key, data_kind=kind) if key else label,
            scope="col",
            class_=f"c-{key or 'track'}",
            aria_sort="descending" if key == "robust" else "none" if key else None,
        )
        for key, label, kind in COLUMNS
    ]
    table = el(
        "table",
        el("caption", "Models by robust accuracy, apart for what may not be compared"),
        el("thead", el("tr", headings)),
        bodies,
        id="board",
    )
    return el(
        "section",
        el("h2", "Leaderboard"),
        _filters([entry for same in ranked for entry in same], rows),
        table,
        id="leaderboard",
    )


def _facets(entry: Entry) -> dict[str, str]:
    return {
        "data": entry.data,
        "threat": entry.threat_name,
        "protocol": entry.protocol,
        "defense": entry.defense,
    }


def _filters(entries: Sequence[Entry], rows: int) -> Markup:
    choices = []
    for key, label in FILTERS:
        values = sorted({_facets(entry)[key] for entry in entries})
        if len(values) > 1:
            options = [el("option", "all", value=""), *(el("option", v, value=v) for v in values)]
            choices.append(
                el(
                    "label",
                    el("span", label),
                    el("select", options, data_facet=key, aria_label=label),
                )
            )
    search = el(
        "label",
        el("span", "Search"),
        el("input", type="search", id="search", placeholder="model, setting, ..."),
    )
    shown = el("output", f"{rows} of {rows}", id="shown", aria_live="polite")
    return el("form", search, choices, shown, id="filters", role="search")


def _row(group: Group, varied: Sequence[str], anchors: Mapping[int, str]) -> Markup:
    first, facets = group.first, _facets(group.first)
    chips = _chips(first, varied)
    if len(group.entries) > 1:
        chips.append(_chip("seeds", ", ".join(map(str, group.seeds))))
    links = [
        el("a", e.results.run if i == 0 else f"seed {e.seed}", href=f"#{anchors[id(e)]}")
        for i, e in enumerate(group.entries)
    ]
    model = [el("div", _joined(links), class_="name"), el("div", _joined(chips), class_="chips")]
    label = group.verdict or "-"
    values = [f"{k} {_plain(v)}" for k, v in first.results.settings.items() if k in varied]
    words = " ".join([first.results.run, *values, *facets.values()])
    cells = [
        el("td", model, class_="c-model", data_sort=first.results.run),
        _accuracy("clean", group.clean),
        _accuracy("robust", group.robust),
        el("td", _track(group.clean, group.robust), class_="c-track"),
        el("td", _verdict(group.verdict), class_="c-verdict", data_sort=label),
        el("td", duration(group.seconds), class_="c-seconds", data_sort=group.seconds),
    ]
    return el(
        "tr",
        cells,
        class_="run",
        data_words=words.lower(),
        **{f"data_{key}": value for key, value in facets.items()},
    )


def _chips(entry: Entry, varied: Sequence[str]) -> list[Markup]:
    """What sets an evaluation apart from its neighbours."""
    settings = entry.results.settings
    chips = [_chip(key, _plain(settings[key])) for key in varied if key in settings]
    if entry.results.missing:
        chips.append(el("span", "unfinished", class_="warn"))
    return chips


def _chip(key: str, value: str) -> Markup:
    return el("span", el("em", key), f" {value}")


def _joined(parts: Sequence[Markup]) -> list[Child]:
    return [child for part in parts for child in (part, " ")][:-1]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(mean: Mean) -> str:
    return f"{_percent(mean.ci95[0])}\u2013{_percent(mean.ci95[1])}"


def _accuracy(name: str, mean: Mean) -> Markup:
    spread = None if mean.sd is None else el("span", f"±{_percent(mean.sd)}", class_="sd")
    return el(
        "td",
        el("span", name, class_="tag"),
        el("span", _percent(mean.acc), class_="value"),
        spread,
        el("span", _interval(mean), class_="ci"),
        class_=f"c-{name}",
        data_sort=mean.acc,
    )


def _track(clean: Mean, robust: Mean) -> Markup:
    """Both accuracies with their intervals on a line from 0 to 100 %."""
    marks = []
    for name, mean in (("clean", clean), ("robust", robust)):
        low, high = mean.ci95
        band = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
        marks.append(el("i", class_=f"band {name}", style=band))
        marks.append(el("i", class_=f"dot {name}", style=f"left:{100 * mean.acc:.2f}%"))
    said = (
        f"clean {_percent(clean.acc)} %, {_interval(clean)}; "
        f"robust {_percent(robust.acc)} %, {_interval(robust)}"
    )
    return el("div", marks, class_="track", role="img", aria_label=said)


def _verdict(label: str | None) -> Markup:
    known = label if label in ("reliable", "inconclusive", "unreliable") else "none"
    title = None if label else "not computed"
    return el("span", label or "-", class_=f"verdict {known}", title=title)


# --- several evaluations ------------------------------------------------------------------------


def _together(ranked: Sequence[Sequence[Entry]], figures: Figures) -> Markup | None:
    """Sweeps, and curves over the radius."""
    parts = []
    for same in ranked:
        if figures.full:
            break
        for found in dossier.sweeps(same):
            parts += [figures.draw(plate) for plate in found.plates()]
        if plate := dossier.curves_plate(same):
            parts.append(figures.draw(plate))
    if not parts:
        return None
    return el("section", el("h2", "Side by side"), el("div", parts, class_="figures"))


# --- one evaluation -----------------------------------------------------------------------------


def _runs(
    ordered: Sequence[Entry],
    anchors: Mapping[int, str],
    varied: Mapping[int, Sequence[str]],
    figures: Figures,
) -> Markup:
    library, trainings = gallery.Library(), {}
    parts, bare = [], 0
    for i, entry in enumerate(ordered):
        drawn = i < MOST_FIGURES and not figures.full
        bare += not drawn
        chips = _chips(entry, varied[id(entry)])
        parts.append(_run(entry, chips, anchors[id(entry)], library, trainings, figures, drawn))
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


def _run(
    entry: Entry,
    chips: Sequence[Markup],
    anchor: str,
    library: gallery.Library,
    trainings: dict[Path, str],
    figures: Figures,
    drawn: bool,
) -> Markup:
    results = entry.results
    summary = el(
        "summary",
        el(
            "span",
            el("span", results.run, class_="name"),
            el("span", _joined(chips), class_="chips"),
        ),
        el("span", f"{entry.data}, {entry.threat_name}, {entry.protocol}", class_="about"),
        el("span", f"{_percent(results.robust.acc)} %", class_="value"),
    )
    parts: list[Child] = [_headline(entry)]
    if drawn:
        parts += _evidence(dossier.read(entry, library), anchor, trainings, figures)
    parts += [_stages(entry), _indicators(entry), _reproduce(entry, drawn), _provenance(entry)]
    return el("details", summary, el("div", parts, class_="body"), id=anchor, class_="run")


def _headline(entry: Entry) -> Markup:
    results = entry.results
    facts = [
        ("Robust accuracy", f"{results.robust}, an upper bound"),
        ("Clean accuracy", str(results.clean)),
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
    rows = [
        (
            [el("b", str(s.name)), el("small", str(s.why))],
            str(s.target),
            f"{s.attacked:,}",
            f"{s.broken:,}",
            _percent(s.robust_acc),
            f"{s.forwards:,}",
            f"{s.backwards:,}",
            duration(s.seconds),
        )
        for s in entry.results.stages
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
            _plain(i.get("value", "-")),
            _plain(i.get("threshold", "-")),
            el("span", "yes", class_="warn") if i.get("triggered") else "no",
        )
        for i in (found if isinstance(found, list) else [])
        if isinstance(i, dict)
    ]
    if label is None and not rows:
        return el("section", el("h3", "Verdict"), el("p", "Not computed.", class_="note"))
    headings = ("Indicator", "Value", "Threshold", "Triggered")
    return el(
        "section", el("h3", "Verdict "), el("p", _verdict(label)), _table(headings, rows, {1, 2})
    )


def _reproduce(entry: Entry, drawn: bool) -> Markup:
    """Commands and configs of the evaluation and of its training."""
    parts: list[Child] = []
    for what, kept in (("Evaluation", entry.config), ("Training", _trained(entry))):
        if not kept:
            continue
        try:
            parts.append(_copyable(f"{what}", commands.command(kept)))
        except UserError as problem:
            parts.append(el("p", f"{what}: {problem}.", class_="note"))
        if drawn:
            text = OmegaConf.to_yaml(OmegaConf.create(dict(kept)))
            title = f"config.yaml of the {what.lower()}"
            parts.append(el("details", el("summary", title), _copyable(None, text)))
    if not parts:
        parts.append(el("p", "There is no config.yaml: not run by a command.", class_="note"))
    return el("section", el("h3", "Do it again"), parts)


def _trained(entry: Entry) -> Mapping[str, Any]:
    """The config of the training; empty if there is none, or the place holds something else."""
    if entry.training is None:
        return {}
    try:
        kept = config.plain(config.read(entry.training / collection.CONFIG))
    except UserError:
        return {}
    # A downloaded evaluation may name any place: other people's settings are not for this page.
    return kept if "recipe" in kept and "choices" in kept else {}


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
    return [(str(k).replace("_", " "), _plain(v)) for k, v in values.items() if v is not None]
