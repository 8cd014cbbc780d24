"""The page's leaderboard: what its template shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advbench.report import collection
from advbench.report.collection import Entry, Group, Mean
from advbench.report.conditions import Wording, is_weak, text_of
from advbench.report.leaderboard import (
    READING_CLEAN,
    READING_ESTIMATE,
    READING_SEEDS,
    READING_UNFINISHED,
    READING_WEAK,
    rank,
)
from advbench.text import count

COLUMNS = (
    ("model", "Model", "text"),
    ("clean", "Clean", "number"),
    ("robust", "Robust", "number"),
    ("estimate", "Estimate", "number"),
    (None, "0 to 100 %", None),
    ("verdict", "Verdict", "text"),
    ("seconds", "Time", "number"),
)
"""Of the leaderboard: key, heading, and how to sort."""


FACETS = ("data", "threat", "protocol", "defense")


LABELS = ("reliable", "inconclusive", "unreliable")


def model_of(entry: Entry) -> Any:
    """What makes evaluations those of one model: its hash, or else all that is known of it."""
    digest = entry.results.provenance.get("model_sha256")
    return digest or (entry.results.run, sorted(entry.results.settings.items()))


def percent_text(share: float) -> str:
    return f"{100 * share:.1f}"


def interval_text(mean: Mean) -> str:
    return "\u2013".join(map(percent_text, mean.ci95 or ()))


def leaderboard_rows(ranked: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """A body for what may be compared, a row for each model, and the filters."""
    wording = Wording([Group((same[0],)) for same in ranked])
    bodies, everything = [], []
    for same in ranked:
        varied = collection.varying(same)
        best = sorted(collection.groups(same), key=rank)
        everything += best
        bodies.append(
            {
                "words": wording.of(same[0]),
                "images": count(same[0].n, "image"),
                "varied": varied,
                "rows": [_row(group, varied) for group in best],
            }
        )
    shown = {
        "verdict": any(group.verdict for group in everything),
        "estimate": any(group.estimates for group in everything),
    }
    values = {key: sorted({_facets(group.first)[key] for group in everything}) for key in FACETS}
    notes = {
        READING_WEAK: any(is_weak(same[0].conditions["protocol"]) for same in ranked),
        READING_UNFINISHED: any(group.unfinished for group in everything),
        READING_ESTIMATE: shown["estimate"],
        READING_CLEAN: any(not (group.robust or group.unfinished) for group in everything),
        READING_SEEDS: any(len(group.entries) > 1 for group in everything),
    }
    return {
        "bodies": bodies,
        "rows": len(everything),
        "shown": shown,
        "columns": [column for column in COLUMNS if shown.get(column[0] or "", True)],
        "filters": [(k, k.capitalize(), values[k]) for k in FACETS if len(values[k]) > 1],
        "notes": [note for note, applies in notes.items() if applies],
    }


def _facets(entry: Entry) -> dict[str, str]:
    values = (entry.data, entry.threat_name, entry.protocol, entry.defense)
    return dict(zip(FACETS, values, strict=True))


def _row(group: Group, varied: Sequence[str]) -> dict[str, Any]:
    settings, facets = group.first.results.settings, _facets(group.first)
    values = [f"{k} {text_of(v)}" for k, v in settings.items() if k in varied]
    means = {"clean": group.clean, "robust": group.robust}
    words = [
        f"{name} {percent_text(mean.acc)} %, {interval_text(mean) or 'at most'}"
        for name, mean in means.items()
        if mean is not None
    ]
    return {
        "group": group,
        "facets": facets,
        "words": " ".join([group.first.results.run, *values, *facets.values()]).lower(),
        "said": "; ".join(words),
    }
