"""Which evaluations may be ranked together, in which order, and what a table says of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advbench.console import duration
from advbench.errors import UserError, did_you_mean
from advbench.report.collection import NAMES, SEED, UNKNOWN, Entry, Group, Mean, varying

STRONG = ("adaptive", "msa", "autoattack")
"""Protocols that stand for themselves, the strongest first."""

WEAK = ("pgd", "fgsm", "apgd", "fab", "square", "curve", "torchattacks")
"""Protocols of one attack; those of the papers, ``paper/...``, are no stronger."""

FEWEST = 3
"""Rows of one model that make a table of their own beside a leaderboard."""

READING = "robust: an upper bound, what the attacks left; [Wilson 95 %]; passes per image"
READING_SEEDS = (
    "± sd over training seeds; the interval is that of the images, which all seeds share"
)
READING_WEAK = "weak: the protocol flatters; compare with nothing that another protocol found"


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown. right: which columns stand to the right; notes: how to read it."""

    title: str
    headings: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


class Wording:
    """Conditions in words, with as much as tells those of a report from each other."""

    def __init__(self, found: Sequence[Group]) -> None:
        self.among = [group.first.conditions for group in found]
        self._inside: dict[str, list[str]] = {}
        self._namesakes: set[str] = set()
        for name in {each["protocol"] for each in self.among}:
            alike = [each for each in self.among if each["protocol"] == name]
            inside = [key for key in differences(alike) if key.startswith("protocol.")]
            self._inside[name] = [key for key in inside if key != "protocol.version"]
        for name in {each["data"] for each in self.among}:
            if len({each["data.sha256"] for each in self.among if each["data"] == name}) > 1:
                self._namesakes.add(name)
        self._texts = [self.of(group.first) for group in found]

    def told(self, differing: Iterable[str]) -> str:
        """Why the evaluations are not ranked together."""
        return f"not ranked together, for they differ in {self.differing(differing)}"

    def differing(self, keys: Iterable[str]) -> str:
        """The values of conditions that differ."""
        parts = []
        for column in _columns_of(keys):
            values = list(dict.fromkeys(text[column] for text in self._texts))
            more = f" and {len(values) - 4} more" if len(values) > 5 else ""
            parts.append(f"{column} ({', '.join(values[: 4 if more else None])}{more})")
        return ", ".join(parts)

    def of(self, entry: Entry) -> dict[str, str]:
        """By column: data, n, threat and protocol."""
        own = entry.conditions
        data = f"{own['data']} {own['data.split'] or ''}".strip()
        if own["data"] in self._namesakes:
            data += f" {str(own['data.sha256'])[:8]}"
        keys = self._inside[own["protocol"]]
        inside = [f"{key.removeprefix('protocol.')} {_text(own.get(key))}" for key in keys]
        if _weak(own["protocol"]):
            inside = ["weak", *inside]
        return {
            "data": data,
            "n": str(own["n"]),
            "threat": entry.threat_name,
            "protocol": entry.protocol + (f" ({', '.join(inside)})" if inside else ""),
        }


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
        own = _columns_of(self.differing)
        texts = self.wording.of(self.groups[0].first)
        texts["n"] = f"n = {texts['n']}"
        sweep = f"{', '.join(self.swept)}: " if self.swept else ""
        return sweep + ", ".join(text for column, text in texts.items() if column not in own)

    def sheet(self) -> Sheet:
        """The table in words."""
        groups = self.groups
        columns: dict[str, list[str]] = {}
        for key in NAMES:
            values = [group.first.name(key) for group in groups]
            if set(values) != {UNKNOWN}:
                columns[key] = values
        texts = [self.wording.of(group.first) for group in groups]
        for column in _columns_of(self.differing):
            columns[column] = [text[column] for text in texts]
        for key in self.swept:
            columns[key] = [_text(value_of(group.first, key)) for group in groups]
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
        columns["clean"] = [_accuracy(group.clean) for group in groups]
        columns["robust"] = [_accuracy(group.robust) for group in groups]
        columns["verdict"] = [_verdict(group) for group in groups]
        columns["time"] = [duration(group.seconds) for group in groups]
        columns["passes"] = [f"{group.passes:,.0f}" for group in groups]
        numbers = {"n", "seeds", "clean", "robust", "time", "passes", *self.swept} - set(NAMES)
        weak = any(_weak(group.first.conditions["protocol"]) for group in groups)
        notes = READING, READING_SEEDS if several else "", READING_WEAK if weak else ""
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
    for group in sorted(found, key=_rank):
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

    Raises UserError for an unknown key, and for other conditions that differ, unless ``mix``.
    """
    wording = Wording(found)
    settings = {key for group in found for key in (*group.first.results.settings, *NAMES)} - {SEED}
    conditions = {key for each in wording.among for key in each}
    for key in keys:
        if key not in settings | conditions:
            raise UserError(f"no result has '{key}'{did_you_mean(key, settings | conditions)}")
    differing = [key for key in differences(wording.among) if key not in keys]
    if differing and not mix:
        raise UserError(f"{wording.told(differing)}: name fewer folders, or add --mix")
    differing += [key for key in keys if key not in settings]
    swept = tuple(key for key in keys if key in settings)
    return Board(_in_order(found, keys), wording, tuple(differing), swept)


def differences(conditions: Iterable[Mapping[str, Any]], every: bool = False) -> list[str]:
    """Keys that are not the same everywhere.

    Without ``every``, parameters of other protocols and hashes of other data go without saying.
    """
    everywhere = list(conditions)
    keys = dict.fromkeys(key for each in everywhere for key in each)
    found = [key for key in keys if len({repr(each.get(key)) for each in everywhere}) > 1]
    implied = () if every else tuple(f"{key}." for key in ("protocol", "data") if key in found)
    return [key for key in found if not key.startswith(implied)]


def apart(shown: Sequence[Board]) -> str:
    """Why the tables are several, in words; empty if there is nothing to say."""
    among = shown[0].wording.among
    differing = [key for key in differences(among) if key not in shown[0].differing]
    return shown[0].wording.told(differing) if differing else ""


def record(group: Group, settings: Sequence[str]) -> dict[str, Any]:
    """A row in full precision, flat. settings: keys to tell beside the names."""
    first = group.first
    conditions = first.conditions
    inside = {k: v for k, v in conditions.items() if k.startswith("protocol.")}
    version = inside.pop("protocol.version")
    return {
        **{key: conditions[key] for key in ("data", "data.split", "data.sha256", "n")},
        **{key: conditions[key] for key in ("threat.norm", "threat.eps", "protocol")},
        "protocol.version": version,
        "protocol.parameters": json.dumps(inside),
        **{key: _known(first.name(key)) for key in NAMES},
        **{key: first.results.settings.get(key) for key in settings if key not in NAMES},
        "runs": len(group.entries),
        "seeds": ";".join(map(str, group.seeds)),
        **_spread("clean", group.clean),
        **_spread("robust", group.robust),
        "verdict": group.verdict,
        "missing": ";".join(first.results.missing),
        "seconds": group.seconds,
        "passes": group.passes,
        "folders": ";".join(entry.folder.as_posix() for entry in group.entries),
    }


def value_of(entry: Entry, key: str) -> Any:
    """A name, a setting, or a condition."""
    if key in NAMES:
        return _known(entry.name(key))
    return entry.results.settings.get(key, entry.conditions.get(key))


def _runs(found: Sequence[Group], doubtful: Sequence[bool]) -> list[str]:
    """What tells apart those that look alike: the names of their runs, or of their directories."""
    runs = [group.first.results.run for group in found]
    folders = [group.first.folder.name for group in found]
    names = runs if len(set(runs)) == len(runs) else folders
    return [name if unclear else "" for name, unclear in zip(names, doubtful, strict=True)]


def _weak(protocol: str) -> bool:
    return protocol in WEAK or str(protocol).startswith("paper/")


def _known(name: str) -> str | None:
    return None if name == UNKNOWN else name


def _spread(name: str, mean: Mean) -> dict[str, Any]:
    low, high = mean.ci95
    return {name: mean.acc, f"{name}_sd": mean.sd, f"{name}_low": low, f"{name}_high": high}


def _families(found: Iterable[Group]) -> dict[tuple[str, ...], list[Group]]:
    """Groups by the names of their models."""
    families: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        families.setdefault(tuple(group.first.name(key) for key in NAMES), []).append(group)
    return families


def _in_order(found: Iterable[Group], keys: Sequence[str]) -> tuple[Group, ...]:
    """By the names of the models, and then by the values."""

    def place(group: Group) -> Any:
        names = [group.first.name(key) for key in NAMES if key not in keys]
        return names, [_order(value_of(group.first, key)) for key in keys], _rank(group)

    return tuple(sorted(found, key=place))


def _place(group: Group) -> Any:
    """Where its conditions stand among others: strong protocols first."""
    conditions = group.first.conditions
    name = conditions["protocol"]
    strength = STRONG.index(name) if name in STRONG else len(STRONG)
    rest = {key: _order(value) for key, value in conditions.items() if key.startswith("protocol.")}
    return (
        [_order(conditions[key]) for key in ("data", "data.split", "data.sha256", "n")],
        [_order(conditions[key]) for key in ("threat.norm", "threat.eps")],
        (strength, str(name), sorted(rest.items())),
    )


def _rank(group: Group) -> Any:
    """The most robust first among equals; what did not finish comes last."""
    names = [group.first.name(key) for key in NAMES]
    best = -group.robust.acc, -group.clean.acc
    return _place(group), bool(group.first.results.missing), best, names, str(group.first.folder)


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers in order before words, and nothing first."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def _columns_of(differing: Iterable[str]) -> list[str]:
    """The columns that show these conditions."""
    heads = {key.partition(".")[0] for key in differing}
    return [column for column in ("data", "n", "threat", "protocol") if column in heads]


def _settings(found: Sequence[Group], shown: Sequence[str]) -> list[str]:
    """What else sets runs of the same names apart, as KEY=VALUE."""
    texts: dict[int, str] = {}
    for family in _families(found).values():
        keys = [key for key in varying(group.first for group in family) if key not in shown]
        for group in family:
            values = [f"{key}={_text(value_of(group.first, key))}" for key in keys]
            texts[id(group)] = ", ".join(values)
    return [texts[id(group)] for group in found]


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    text = str(value)
    return f"{value:.6g}" if isinstance(value, float) and len(text) > 8 else text


def _accuracy(mean: Mean) -> str:
    low, high = mean.ci95
    spread = "" if mean.sd is None else f" ± {100 * mean.sd:.1f}"
    return f"{100 * mean.acc:.1f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def _verdict(group: Group) -> str:
    return "unfinished" if group.first.results.missing else group.verdict or UNKNOWN
