"""The leaderboard of the page: what may be compared together, with its intervals as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from advbench.report import collection
from advbench.report.bits import chip, chips, joined, percent, verdict
from advbench.report.collection import UNKNOWN, Entry, Group, Mean
from advbench.report.conditions import Wording, is_weak, text_of
from advbench.report.leaderboard import READING_CLEAN, READING_SEEDS, READING_WEAK, rank
from advbench.report.markup import Markup, el
from advbench.text import count, duration

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


def leaderboard(ranked: Sequence[Sequence[Entry]], anchors: Mapping[int, str]) -> Markup:
    """The table with its filters: a body for what may be compared, a row for each model.

    ranked: evaluations by conditions.  anchors: ids in the page, by ``id`` of the entry.
    """
    bodies, rows, seeded, bare = [], 0, False, False
    wording = Wording([Group((same[0],)) for same in ranked])
    for same in ranked:
        varied = collection.varying(same)
        best = sorted(collection.groups(same), key=rank)
        words = wording.of(same[0])
        head = el(
            "tr",
            el(
                "th",
                el("b", words["data"]),
                f" {count(same[0].n, 'image')}, ",
                el("b", words["threat"]),
                f", {words['protocol']}",
                colspan=len(COLUMNS),
                scope="rowgroup",
            ),
            class_="group",
        )
        seeded |= any(len(group.entries) > 1 for group in best)
        bare |= any(group.robust is None for group in best)
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
    notes = []
    if any(is_weak(same[0].conditions["protocol"]) for same in ranked):
        notes.append(READING_WEAK)
    if bare:
        notes.append(READING_CLEAN)
    if seeded:
        notes.append(READING_SEEDS)
    return el(
        "section",
        el("h2", "Leaderboard"),
        _filters([entry for same in ranked for entry in same], rows),
        table,
        [el("p", f"{note[0].upper()}{note[1:]}.", class_="note") for note in notes],
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
    told = chips(first, varied)
    if len(group.entries) > 1:
        told.append(chip("seeds", ", ".join(map(str, group.seeds))))
    links = [
        el("a", e.results.run if i == 0 else f"seed {e.seed}", href=f"#{anchors[id(e)]}")
        for i, e in enumerate(group.entries)
    ]
    model = [el("div", joined(links), class_="name"), el("div", joined(told), class_="chips")]
    label = group.verdict or "-"
    values = [f"{k} {text_of(v)}" for k, v in first.results.settings.items() if k in varied]
    words = " ".join([first.results.run, *values, *facets.values()])
    cells = [
        el("td", model, class_="c-model", data_sort=first.results.run),
        _accuracy("clean", group.clean),
        _accuracy("robust", group.robust),
        el("td", _track(group.clean, group.robust), class_="c-track"),
        el("td", verdict(group.verdict), class_="c-verdict", data_sort=label),
        el("td", duration(group.seconds), class_="c-seconds", data_sort=group.seconds),
    ]
    return el(
        "tr",
        cells,
        class_="run",
        data_open=group.unfinished is not None or group.robust is None,  # last, however sorted
        data_words=words.lower(),
        **{f"data_{key}": value for key, value in facets.items()},
    )


def _interval(mean: Mean) -> str:
    return "" if mean.ci95 is None else "\u2013".join(map(percent, mean.ci95))


def _accuracy(name: str, mean: Mean | None) -> Markup:
    if mean is None:
        return el("td", el("span", name, class_="tag"), UNKNOWN, class_=f"c-{name}", data_sort=0)
    spread = None if mean.sd is None else el("span", f"±{percent(mean.sd)}", class_="sd")
    return el(
        "td",
        el("span", name, class_="tag"),
        el("span", percent(mean.acc), class_="value"),
        spread,
        el("span", _interval(mean), class_="ci"),
        class_=f"c-{name}",
        data_sort=mean.acc,
    )


def _track(clean: Mean | None, robust: Mean | None) -> Markup:
    """Both accuracies with their intervals on a line from 0 to 100 %."""
    marks, said = [], []
    for name, mean in (("clean", clean), ("robust", robust)):
        if mean is None:
            continue
        said.append(f"{name} {percent(mean.acc)} %, {_interval(mean) or 'at most'}")
        low, high = mean.ci95 or (mean.acc, mean.acc)
        band = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
        marks.append(el("i", class_=f"band {name}", style=band))
        marks.append(el("i", class_=f"dot {name}", style=f"left:{100 * mean.acc:.2f}%"))
    return el("div", marks, class_="track", role="img", aria_label="; ".join(said))
