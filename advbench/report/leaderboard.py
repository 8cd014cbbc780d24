"""Which evaluations may be ranked together, in which order, and what a table says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from advbench.errors import UserError, did_you_mean
from advbench.report.collection import NAMES, SEED, UNKNOWN, Entry, Group, Mean, varying
from advbench.report.conditions import (
    Wording,
    columns_of,
    differences,
    is_weak,
    order,
    place,
    text_of,
)
from advbench.text import duration

FEWEST = 3
"""Rows of one model that make a table of their own beside a leaderboard."""

COSTS = ("time", "passes")
"""Columns that say what an evaluation took."""

READING = "robust: an upper bound, what the attacks left; [Wilson 95 %]; passes per image"
READING_SEEDS = (
    "± sd over training seeds; the interval is that of the images, which all seeds share"
)
READING_CLEAN = f"robust {UNKNOWN}: nothing was attacked"
READING_VERDICT = f"verdict {UNKNOWN}: not computed"
READING_UNFINISHED = (
    "UNFINISHED: the budget was spent before all samples were decided; no result yet"
)
READING_ESTIMATE = (
    "estimate: what AutoAttack would leave of these images, from those that it attacked (of the "
    "survivors); [exact 95 %]; no rank follows from it"
)
READING_WEAK = "weak: the protocol overestimates robustness; do not compare it with others"


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown. right: which columns stand to the right; notes: how to read it."""

    title: str
    headings: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Board:
    """Groups of evaluations in one table, in its order.

    differing: conditions that have a column, because they are not the same for all.
    swept: settings with a column of their own.
    """

    groups: tuple[Group, ...]
    wording: Wording
    differing: tuple[str, ...] = ()
    swept: tuple[str, ...] = ()

    @property
    def conditions(self) -> dict[str, Any]:
        """What holds for all."""
        several = set(differences((group.first.conditions for group in self.groups), every=True))
        first = self.groups[0].first.conditions
        return {key: value for key, value in first.items() if key not in several}

    @property
    def title(self) -> str:
        columns = columns_of(self.differing)
        texts = self.wording.of(self.groups[0].first)
        texts["n"] = f"n = {texts['n']}"
        sweep = f"{', '.join(self.swept)}: " if self.swept else ""
        return sweep + ", ".join(text for column, text in texts.items() if column not in columns)

    def sheet(self) -> Sheet:
        """The table in words."""
        groups = self.groups
        columns: dict[str, list[str]] = {}
        for key in NAMES:
            values = [group.first.name(key) for group in groups]
            if set(values) != {UNKNOWN}:
                columns[key] = values
        texts = [self.wording.of(group.first) for group in groups]
        for column in columns_of(self.differing):
            columns[column] = [text[column] for text in texts]
        for key in self.swept:
            columns[key] = [text_of(value_of(group.first, key)) for group in groups]
        settings = _settings(groups, self.swept)
        if any(settings):
            columns["settings"] = settings
        rows = list(zip(*columns.values(), strict=True)) or [()] * len(groups)
        alike = Counter(rows)
        nameless = [set(map(group.first.name, NAMES)) == {UNKNOWN} for group in groups]
        doubtful = [alike[row] > 1 or bare for row, bare in zip(rows, nameless, strict=True)]
        if any(doubtful):
            columns["run"] = _runs(groups, doubtful)
        several = any(len(group.entries) > 1 for group in groups)
        if several:
            columns["seeds"] = [str(len(group.entries)) for group in groups]
        columns["clean"] = [accuracy_text(group.clean) for group in groups]
        columns["robust"] = [robust_text(group) for group in groups]
        if any(group.estimates for group in groups):
            columns["estimate"] = [estimate_text(group) for group in groups]
        if any(group.verdict for group in groups):
            columns["verdict"] = [group.verdict or UNKNOWN for group in groups]
        columns["time"] = [duration(group.seconds) for group in groups]
        columns["passes"] = [f"{group.passes:,.0f}" for group in groups]
        shares = {"clean", "robust", "estimate"}
        numbers = {"n", "seeds", "time", "passes", *shares, *self.swept} - set(NAMES)
        weak = any(is_weak(group.first.conditions["protocol"]) for group in groups)
        notes = (
            READING,
            READING_SEEDS if several else "",
            READING_CLEAN if UNKNOWN in columns["robust"] else "",
            READING_UNFINISHED if any(group.unfinished for group in groups) else "",
            READING_ESTIMATE if "estimate" in columns else "",
            READING_VERDICT if UNKNOWN in columns.get("verdict", ()) else "",
            READING_WEAK if weak else "",
        )
        return Sheet(
            self.title,
            tuple(columns),
            tuple(column in numbers for column in columns),
            tuple(zip(*columns.values(), strict=True)),
            tuple(note for note in notes if note),
        )


def boards(found: Sequence[Group], mix: bool = False) -> list[Board]:
    """The tables of a report: one for each set of conditions, and the sweeps that are in it.

    mix: a single table, in which evaluations under other conditions stand below each other.
    """
    wording = Wording(found)
    tables: dict[str, list[Group]] = {}
    for group in sorted(found, key=rank):
        tables.setdefault("" if mix else repr(group.first.conditions), []).append(group)
    shown = []
    for members in tables.values():
        differing = tuple(differences(group.first.conditions for group in members))
        families = _families(members)
        sweeps = []
        for family in families.values():
            keys = tuple(varying(group.first for group in family))
            if keys and not differing and (len(families) == 1 or len(family) >= FEWEST):
                sweeps.append(Board(_in_order(family, keys), wording, swept=keys))
        if len(families) > 1 or not sweeps:
            shown.append(Board(tuple(members), wording, differing))
        shown += sweeps
    return shown


def sweep(found: Sequence[Group], keys: Sequence[str], mix: bool = False) -> Board:
    """One table over the values of ``keys``, in their order: settings, or conditions.

    Evaluations that have none of the keys are left out. Raises UserError for an unknown key, and
    for other conditions that differ, unless ``mix``.
    """
    values = [{*group.first.results.settings, *NAMES, *group.first.conditions} for group in found]
    names = set[str]().union(*values) - {SEED}
    for key in keys:
        if key not in names:
            ends = sorted(full for full in names if full.endswith(f".{key}"))
            raise UserError(f"no result has '{key}'{did_you_mean((ends or [key])[0], names)}")
    found = [group for group, mine in zip(found, values, strict=True) if mine & set(keys)]
    wording = Wording(found)
    settings = {key for group in found for key in (*group.first.results.settings, *NAMES)}
    differing = [key for key in differences(wording.among) if key not in keys]
    if differing and not mix:
        raise UserError(f"{wording.told(differing)}: name fewer folders, or add --mix")
    differing += [key for key in keys if key not in settings]
    swept = tuple(key for key in keys if key in settings)
    return Board(_in_order(found, keys), wording, tuple(differing), swept)


def apart(shown: Sequence[Board]) -> str:
    """Why the tables are several, in words; empty if there is nothing to say."""
    among = shown[0].wording.among
    differing = [key for key in differences(among) if key not in shown[0].differing]
    return shown[0].wording.told(differing) if differing else ""


def value_of(entry: Entry, key: str) -> Any:
    """A name, a setting, or a condition."""
    if key in NAMES:
        return None if entry.name(key) == UNKNOWN else entry.name(key)
    return entry.results.settings.get(key, entry.conditions.get(key))


def _runs(found: Sequence[Group], doubtful: Sequence[bool]) -> list[str]:
    """What tells apart those that look alike: the names of their runs, or of their directories."""
    runs = [group.first.results.run for group in found]
    folders = [group.first.folder.name for group in found]
    names = runs if len(set(runs)) == len(runs) else folders
    return [name if unclear else "" for name, unclear in zip(names, doubtful, strict=True)]


def _families(found: Iterable[Group]) -> dict[tuple[str, ...], list[Group]]:
    """Groups by the names of their models."""
    families: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        families.setdefault(tuple(group.first.name(key) for key in NAMES), []).append(group)
    return families


def _in_order(found: Iterable[Group], keys: Sequence[str]) -> tuple[Group, ...]:
    """By the names of the models, and then by the values."""

    def where(group: Group) -> Any:
        names = [group.first.name(key) for key in NAMES if key not in keys]
        return names, [order(value_of(group.first, key)) for key in keys], rank(group)

    return tuple(sorted(found, key=where))


def rank(group: Group) -> Any:
    """The most robust first among equals; last what did not finish, and what was not attacked."""
    names = [group.first.name(key) for key in NAMES]
    robust = group.robust
    last = robust is None, group.unfinished is not None
    best = [0.0 if mean is None else -mean.acc for mean in (robust, group.clean)]
    return last, place(group), best, names, str(group.first.folder)


def _settings(found: Sequence[Group], shown: Sequence[str]) -> list[str]:
    """What else sets runs of the same names apart, as KEY=VALUE."""
    texts: dict[int, str] = {}
    for family in _families(found).values():
        keys = [key for key in varying(group.first for group in family) if key not in shown]
        for group in family:
            values = [f"{key}={text_of(value_of(group.first, key))}" for key in keys]
            texts[id(group)] = ", ".join(values)
    return [texts[id(group)] for group in found]


def accuracy_text(mean: Mean | None) -> str:
    """In per cent, with what is known of its spread and its interval."""
    if mean is None:
        return UNKNOWN
    spread = "" if mean.sd is None else f" ± {100 * mean.sd:.1f}"
    if mean.ci95 is None:
        return f"{100 * mean.acc:.1f}{spread}"
    low, high = mean.ci95
    return f"{100 * mean.acc:.1f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def estimate_text(group: Group) -> str:
    """What a stronger suite would leave, and from how many survivors that is known."""
    mean = group.estimate
    return UNKNOWN if mean is None else f"{accuracy_text(mean)} ({group.audited})"


def robust_text(group: Group) -> str:
    """Robust accuracy as what it is: a number, a bound so far, or nothing."""
    if group.unfinished is None:
        return accuracy_text(group.robust)
    so_far = "" if group.robust is None else f"at most {accuracy_text(group.robust)}, "
    return f"UNFINISHED: {so_far}{group.unfinished}"
