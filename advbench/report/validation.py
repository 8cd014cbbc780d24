"""Validation accuracy of trainings, to choose a setting by: the test set is left for the end."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advbench import config
from advbench.errors import UserError
from advbench.report.collection import NAMES, SEED, UNKNOWN
from advbench.report.conditions import text_of
from advbench.report.leaderboard import Sheet
from advbench.runs import directory, manifest
from advbench.runs.directory import CONFIG, SUMMARY
from advbench.text import printable

READING = (
    "validation accuracy of the best epoch, by which it was chosen: a little high; report the test "
    "set's, once"
)


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    folder: Path
    """Its directory."""
    settings: dict[str, Any]
    """What sets it apart from others, by key."""
    n: int
    """Validation images."""
    clean: float
    """Accuracy in [0, 1]."""
    robust: float | None
    """Under ``attack``; None where it was not measured."""
    attack: str | None
    """Such as PGD-10, linf 8/255."""

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read a training run. Raises UserError for a directory of something else."""
        from advbench.runs.settings import settings_of

        cfg = config.read(folder / CONFIG)
        directory.refuse_edited(folder, cfg)
        try:
            val = manifest.read_json(folder / SUMMARY)["val"]
            robust, attack = val.get("robust"), val.get("attack")
            settings = settings_of(cfg, cfg.defense)
            return cls(folder, settings, int(val["n"]), float(val["clean"]), robust, attack)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise UserError(f"'{folder}' is not a finished training: {problem}") from problem


@dataclass(frozen=True)
class Table:
    """Trainings that differ in the seed alone are one row; the best comes first."""

    groups: tuple[tuple[Trained, ...], ...]
    """Of one setting each."""
    keys: tuple[str, ...]
    """Settings that differ."""

    def records(self) -> list[dict[str, Any]]:
        """The rows in full precision."""
        return [
            {
                **{key: group[0].settings.get(key) for key in self.keys},
                "seeds": ";".join(str(each.settings.get(SEED)) for each in group),
                "n": group[0].n,
                "attack": group[0].attack,
                **_spread("val_clean", [each.clean for each in group]),
                **_spread("val_robust", [each.robust for each in group]),
                "folders": ";".join(each.folder.as_posix() for each in group),
            }
            for group in self.groups
        ]

    def sheet(self) -> Sheet:
        """The table in words."""
        attacks = {group[0].attack or UNKNOWN for group in self.groups}
        many = len(attacks) > 1
        named = len(self.groups) == 1 or not self.keys
        headings = [*self.keys, *(["run"] if named else []), *(["attack"] if many else [])]
        rows = []
        for group, record in zip(self.groups, self.records(), strict=True):
            words = [text_of(record[key]) for key in self.keys]
            words += [group[0].folder.name] if named else []
            words += [group[0].attack or UNKNOWN] if many else []
            numbers = (_cell(record, "val_clean"), _cell(record, "val_robust"))
            rows.append((*words, str(len(group)), *numbers))
        title = "validation" if many else f"validation, {attacks.pop()}"
        right = (*(False for _ in headings), True, True, True)
        headings += ["seeds", "clean", "robust"]
        return Sheet(title, tuple(headings), right, tuple(rows), (READING,))


def table(paths: Sequence[Path]) -> Table:
    """The trainings at or below the paths. A damaged one does not hide the others.

    Raises:
        UserError: For a missing path, and if there are none.
    """
    trainings: list[Trained] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no '{path}'")
        for file in sorted(path.rglob(SUMMARY)):
            try:
                trainings.append(Trained.read(file.parent))
            except UserError as problem:
                print(printable(f"left out: {problem}"), file=sys.stderr)
    if not trainings:
        listed = ", ".join(map(str, paths))
        raise UserError(
            f"there is no finished training in {listed}: make one with 'advbench train'"
        )
    alike: dict[str, list[Trained]] = {}
    for each in trainings:
        settings = sorted((k, v) for k, v in each.settings.items() if k != SEED)
        alike.setdefault(repr((settings, each.n, each.attack)), []).append(each)
    groups = sorted((tuple(group) for group in alike.values()), key=_rank)
    keys = dict.fromkeys((*NAMES, *(key for each in trainings for key in each.settings)))
    values = {key: {repr(each.settings.get(key)) for each in trainings} for key in keys}
    return Table(tuple(groups), tuple(k for k in keys if len(values[k]) > 1 and k != SEED))


def _rank(group: Sequence[Trained]) -> Any:
    """By robust accuracy where it was measured, then by clean accuracy."""
    robust = [-1.0 if each.robust is None else each.robust for each in group]
    return -statistics.fmean(robust), -statistics.fmean(each.clean for each in group)


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return {name: None, f"{name}_sd": None}
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {name: statistics.fmean(numbers), f"{name}_sd": sd}


def _cell(record: dict[str, Any], name: str) -> str:
    mean, sd = record[name], record[f"{name}_sd"]
    if mean is None:
        return UNKNOWN
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")
