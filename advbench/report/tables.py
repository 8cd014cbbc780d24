"""Tables over result files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

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
    """Print a table of all results below the paths, strongest first within data and threat."""
    table = Table(caption="robust accuracy is an upper bound: what the attacks left; Wilson 95 %")
    for column in ("run", "data", "n", "threat", "protocol", "clean", "robust", "verdict", "time"):
        right = column in ("n", "clean", "robust", "time")
        table.add_column(column, justify="right" if right else "left")
    rows = find(paths)
    rows.sort(
        key=lambda r: (r.data["name"], r.threat["norm"], r.threat["eps"], r.robust.acc, r.run)
    )
    for results in rows:
        table.add_row(
            escape(results.run),
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


def _cell(accuracy: Accuracy) -> str:
    low, high = accuracy.ci95
    return escape(f"{100 * accuracy.acc:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
