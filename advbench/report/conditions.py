"""Under what conditions evaluations were made, which of them differ, and how to say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from advbench import config
from advbench.errors import UserError
from advbench.report.collection import UNKNOWN, Entry, Group
from advbench.runs.results import Results

STRONG = ("adaptive", "msa", "autoattack")
"""Protocols that stand for themselves, the strongest first."""

WEAK = ("pgd", "fgsm", "apgd", "fab", "square", "curve", "torchattacks")
"""Protocols of one attack; those of the papers, ``paper/...``, are no stronger."""


class Wording:
    """Conditions in words, with what is not as shipped and what tells them from each other."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.among = [group.first.conditions for group in groups]
        self._inside: dict[str, list[str]] = {}
        self._namesakes: set[str] = set()
        for name in {each["protocol"] for each in self.among}:
            alike = [each for each in self.among if each["protocol"] == name]
            inside = [key for key in differences(alike) if key.startswith("protocol.")]
            self._inside[name] = [key for key in inside if key != "protocol.version"]
        for name in {each["data"] for each in self.among}:
            if len({each["data.sha256"] for each in self.among if each["data"] == name}) > 1:
                self._namesakes.add(name)
        self._texts = [self.of(group.first) for group in groups]

    def told(self, differing: Iterable[str]) -> str:
        """Why the evaluations are not ranked together."""
        return f"not ranked together, for they differ in {self.differing(differing)}"

    def differing(self, keys: Iterable[str]) -> str:
        """The values of conditions that differ."""
        parts = []
        for column in columns_of(keys):
            values = list(dict.fromkeys(text[column] for text in self._texts))
            more = f" and {len(values) - 4} more" if len(values) > 5 else ""
            parts.append(f"{column} ({', '.join(values[: 4 if more else None])}{more})")
        return ", ".join(parts)

    def of(self, entry: Entry) -> dict[str, str]:
        """By column: data, n, threat and protocol."""
        conditions = entry.conditions
        data = f"{conditions['data']} {conditions['data.split'] or ''}".strip()
        if conditions["data"] in self._namesakes:
            data += f" {str(conditions['data.sha256'])[:8]}"
        return {
            "data": data,
            "n": str(conditions["n"]),
            "threat": entry.threat_name,
            "protocol": protocol_of(entry, self._inside[conditions["protocol"]]),
        }


def differences(conditions: Iterable[Mapping[str, Any]], every: bool = False) -> list[str]:
    """Keys that are not the same everywhere.

    Without ``every``, parameters of other protocols and hashes of other data go without saying.
    """
    everywhere = list(conditions)
    keys = dict.fromkeys(key for each in everywhere for key in each)
    differing = [key for key in keys if len({repr(each.get(key)) for each in everywhere}) > 1]
    implied = () if every else tuple(f"{key}." for key in ("protocol", "data") if key in differing)
    return [key for key in differing if not key.startswith(implied)]


def place(group: Group) -> Any:
    """Where its conditions stand among others of the same data: strong protocols first, whatever
    the threat and n, then weak ones, and last what was not attacked."""
    conditions = group.first.conditions
    name = conditions["protocol"]
    part = conditions.get("protocol.attacks") is not None  # of AutoAttack
    strong = name in STRONG and not part
    strength = STRONG.index(name) if strong else len(STRONG) + is_weak(name)
    if group.robust is None:
        strength = len(STRONG) + 2
    rest = {key: order(value) for key, value in conditions.items() if key.startswith("protocol.")}
    return (
        [order(conditions[key]) for key in ("data", "data.split", "data.sha256")],
        strength,
        [order(conditions[key]) for key in ("threat.norm", "threat.eps", "n")],
        (str(name), sorted(rest.items())),
    )


def order(value: Any) -> tuple[int, float, str]:
    """Numbers in order before words, and nothing first."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def columns_of(differing: Iterable[str]) -> list[str]:
    """The columns that show these conditions, of data, n, threat and protocol."""
    heads = {key.partition(".")[0] for key in differing}
    return [column for column in ("data", "n", "threat", "protocol") if column in heads]


def text_of(value: Any) -> str:
    """A value in few characters, as one would type it."""
    if value is None:
        return UNKNOWN
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:.6g}" if isinstance(value, float) and len(text) > 8 else text


def protocol_of(entry: Entry, telling: Iterable[str] = ()) -> str:
    """Title, version, whether it is weak, and parameters: those that are not as shipped, and those
    that are ``telling`` it from others, by key of the config."""
    conditions = entry.conditions
    changes = {key.removeprefix("protocol."): conditions.get(key) for key in telling}
    changes |= unusual(entry.results)
    inside = ["weak"] if is_weak(conditions["protocol"]) else []
    inside += [f"{key} {text_of(value)}" for key, value in changes.items()]
    return entry.protocol + (f" ({', '.join(inside)})" if inside else "")


def unusual(results: Results) -> dict[str, Any]:
    """Parameters of its protocol that are not those of the shipped config of that name."""
    shipped, actual = _shipped(results.protocol["name"]), results.protocol
    return {key: actual[key] for key in shipped if key in actual and actual[key] != shipped[key]}


@cache
def _shipped(protocol: str) -> Mapping[str, Any]:
    """The config of a shipped protocol; empty for one of the user's own."""
    try:
        return config.plain(config.shipped("protocol", protocol))
    except UserError:
        return {}


def is_weak(protocol: str) -> bool:
    """Whether its numbers overestimate robustness; unknown for a protocol that is not ours."""
    return protocol in WEAK or str(protocol).startswith("paper/")
