"""Tables over result files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from advbench.attacks.threat import Threat
from advbench.console import table_console
from advbench.errors import UserError
from advbench.results import Accuracy, Results


def find(paths: Sequence[Path]) -> list[Results]:
    """All results below the paths. Raises UserError for a missing path, and if there are none."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no '{path}'")
        files += [path] if path.is_file() else sorted(path.rglob("results.json"))
    if not files:
        where = ", ".join(map(str, paths))
        raise UserError(f"there are no results in {where}: make some with 'advbench eval'")
    results = []
    for file in dict.fromkeys(files):
        try:
            results.append(Results.load(file))
        except UserError as problem:  # one damaged file does not hide the others
            if len(files) == 1:
                raise
            print(f"left out: {problem}", file=sys.stderr)
    return results


def show(paths: Sequence[Path]) -> None:
    """Print a table of all results below the paths: by data, threat, protocol and settings."""
    table = Table(caption="robust accuracy is an upper bound: what the attacks left; Wilson 95 %")
    rows = find(paths)
    varied = varying(rows)
    columns = ("run", *varied, "data", "n", "threat", "protocol", "clean", "robust", "verdict")
    for column in (*columns, "time"):
        right = column in ("n", "clean", "robust", "time", *varied)
        table.add_column(column, justify="right" if right else "left")
    rows.sort(
        key=lambda r: (
            r.data["name"],
            r.threat["norm"],
            r.threat["eps"],
            r.protocol["name"],
            [_rank(r.settings.get(key)) for key in varied],
            r.robust.acc,
            r.run,
        )
    )
    for results in rows:
        table.add_row(
            escape(results.run),
            *(escape(str(results.settings.get(key, "-"))) for key in varied),
            escape(str(results.data["name"])),
            str(results.data["n"]),
            str(Threat(results.threat["norm"], results.threat["eps"])),
            f"{results.protocol['name']} {results.protocol['version']}"
            + (" (unfinished)" if results.missing else ""),
            _cell(results.clean),
            _cell(results.robust),
            results.verdict["label"] or "-",
            f"{results.provenance['seconds']:.0f} s",
        )
    table_console().print(table)


def varying(rows: Sequence[Results]) -> list[str]:
    """What a sweep varied: keys of settings that take several values among runs alike otherwise.

    Keys that tell apart runs of another backbone, defense or recipe are those three names.
    """
    found: dict[str, None] = {}
    groups: dict[tuple[Any, ...], list[Results]] = {}
    names = ("backbone", "defense", "recipe")
    for row in rows:
        groups.setdefault(tuple(row.settings.get(name) for name in names), []).append(row)
    for i, name in enumerate(names):
        if len({key[i] for key in groups}) > 1:
            found[name] = None
    for group in groups.values():
        for key in sorted({key for row in group for key in row.settings}):
            if len({row.settings.get(key) for row in group}) > 1:
                found[key] = None
    return list(found)


def _rank(value: Any) -> tuple[int, float, str]:
    """Numbers in order before words, and nothing first."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def _cell(accuracy: Accuracy) -> str:
    low, high = accuracy.ci95
    return escape(f"{100 * accuracy.acc:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
