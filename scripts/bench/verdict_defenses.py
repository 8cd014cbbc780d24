#!/usr/bin/env python
"""The verdict on the five defenses, under four protocols: does it say where a number is too high?

    python scripts/bench/verdict_defenses.py --folder DIR [--rows hpm awnet]
    python scripts/bench/verdict_defenses.py --folder DIR --table

Every training and evaluation is an ``advbench`` command with a directory of its own inside DIR, so
what is finished is not repeated: kill and restart at will. The models are those of ``defenses.py``
on digits, one seed. The protocols:

    paper       the protocol of the defense's own paper, with all indicators (verdict=full)
    express     AutoAttack's number along the model's own gradient: no surrogate is known to it
    msa         on the model and on its surrogates
    adaptive    the same and more, with the plain and the robust model as transfer

msa and adaptive use the short search (``protocol.search=express``) and 1000 queries of Square.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from defenses import table_of  # pyright: ignore[reportAttributeAccessIssue]  # not tests.defenses
from shared import advbench

from advbench.runs.results import Results
from advbench.verdict.words import triggered

ROWS = ("hpm", "awnet", "sparta", "jumprelu-robust", "mfdv_snn")
SHORT = "protocol.search=express protocol.square=1000"
PROTOCOLS = {
    "paper": "{paper} verdict=full",
    "express": "protocol=express protocol.audit=16",
    "msa": f"protocol=msa {SHORT}",
    "adaptive": f"protocol=adaptive {SHORT} protocol.steps=100 protocol.restarts=1 "
    "transfer=[{plain},{robust}]",
}


def place(folder: Path, name: str, protocol: str) -> Path:
    return folder / f"{name}-{protocol}"


def measure(folder: Path, names: list[str], n: int, seed: int) -> None:
    """Train and evaluate what is missing."""
    rows = table_of("digits")
    runs = {name: folder / f"{row.of or name}-run" for name, row in rows.items()}
    for name in dict.fromkeys(["plain", "robust", *names]):
        owner = rows[rows[name].of or name]
        advbench("train", [f"seed={seed}", *owner.train.format(**runs).split()], runs[name])
    for protocol, settings in PROTOCOLS.items():
        for name in names:
            row = rows[name]
            words = settings.format(paper=row.paper, **runs)
            common = f"run={runs[name]} n={n} seed={seed} {row.eval} {words}"
            advbench("eval", common.split(), place(folder, name, protocol))


def table(folder: Path, names: list[str]) -> list[str]:
    """A line for each defense and protocol that is finished."""
    lines = [
        "| defense | protocol | robust | 95 % interval | msa | too high | verdict | triggered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        paths = {p: place(folder, name, p) / "results.json" for p in PROTOCOLS}
        found = {p: Results.load(path) for p, path in paths.items() if path.exists()}
        truth = found["msa"].robust.acc if "msa" in found else None
        for protocol, results in found.items():
            acc, interval = results.robust.acc, results.robust.ci95
            assert acc is not None and interval is not None, "an evaluation did not finish"
            high = "" if truth is None else "yes" if truth < interval[0] else "no"
            signs = ", ".join(f"{s['id']} ({s['class']})" for s in triggered(results.verdict))
            numbers = f"{100 * acc:.0f} | [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
            best = "" if truth is None else f"{100 * truth:.0f}"
            lines.append(
                f"| {name} | {protocol} | {numbers} | {best} | {high} | "
                f"{results.verdict.get('label')} | {signs} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what is finished")
    args = parser.parse_args()
    if not args.table:
        measure(args.folder.absolute(), args.rows, args.n, args.seed)
    print("\n".join(table(args.folder, args.rows)))


if __name__ == "__main__":
    main()
