#!/usr/bin/env python
"""Every training recipe on the same data: clean accuracy and what AutoAttack leaves.

    python scripts/bench/recipes.py --folder DIR [--rows trades awp-trades ...] [--n 300]
    python scripts/bench/recipes.py --folder DIR --data fashion_mnist.npz --settings \\
        threat.eps=0.1 trainer.epochs=10 backbone=resnet20
    python scripts/bench/recipes.py --folder DIR --table

Every training and evaluation is an ``advbench`` command with a directory of its own inside DIR, so
what is finished is not repeated: kill and restart at will. Accuracies are means over the seeds,
with their standard deviation and Wilson's 95 % interval for n images, the same ones of the test
split for every row and seed. Time is that of the training alone.

--settings are added to every training; runs are named by a hash of all that is set, so that other
settings make other runs. MTARD is taught by the rows pgd_at and standard of its own seed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from shared import advbench, cell

from advbench.files import short_hash
from advbench.runs.results import Results
from advbench.training.summary import Summary

TEACHERS = ("pgd_at", "standard")
ROWS = {
    "standard": "recipe=standard",
    "pgd_at": "recipe=pgd_at",
    "fgsm_rs": "recipe=fgsm_rs optimizer.schedule=cyclic",
    "trades": "recipe=trades",
    "mart": "recipe=mart",
    "awp-pgd_at": "recipe=awp recipe.of=pgd_at",
    "awp-trades": "recipe=awp recipe.of=trades",
    "mixed": "recipe=mixed",
    "mtard": "recipe=mtard recipe.robust_teacher={pgd_at} recipe.standard_teacher={standard}",
}
"""Settings of each row; {NAME} stands for the run of that row and the same seed."""


def training(args: argparse.Namespace, name: str, seed: int) -> tuple[list[str], Path]:
    """The settings of a row's training, and where it lives."""
    data = ["data=digits"]
    if args.data != "digits":
        data = ["data=npz", f"data.path={Path(args.data).resolve()}"]
    runs = {row: training(args, row, seed)[1] for row in TEACHERS if name == "mtard"}
    how = [word.format(**runs) for word in ROWS[name].split()]
    settings = [*data, *how, f"seed={seed}", *args.settings]
    return settings, (args.folder / f"{name}-s{seed}-{short_hash(settings)}").resolve()


def judged(args: argparse.Namespace, name: str, seed: int) -> Path:
    run = training(args, name, seed)[1]
    return run.with_name(f"{run.name}-autoattack-n{args.n}")


def measure(args: argparse.Namespace, seed: int) -> None:
    """Train and evaluate every row with one seed."""
    for name in args.rows:
        for row in (*(TEACHERS if name == "mtard" else ()), name):
            advbench("train", *training(args, row, seed))
        run = training(args, name, seed)[1]
        attack = [f"run={run}", "protocol=autoattack", f"n={args.n}", f"seed={seed}"]
        advbench("eval", attack, judged(args, name, seed))


def show(args: argparse.Namespace) -> None:
    """The table of what is finished."""
    print("| recipe | seeds | n | clean % | robust % (AutoAttack) | training, s |")
    print("|---" * 6 + "|")
    for name in args.rows:
        done = [s for s in args.seeds if (judged(args, name, s) / "results.json").exists()]
        if not done:
            continue
        results = [Results.load(judged(args, name, s) / "results.json") for s in done]
        times = [Summary.load(training(args, name, s)[1] / "summary.json").seconds for s in done]
        n = results[0].data["n"]
        clean, robust = cell([r.clean for r in results], n), cell([r.robust for r in results], n)
        time = statistics.mean(times)
        print(f"| {name} | {len(done)} | {n} | {clean} | {robust} | {time:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", default="digits", help="digits, or a file for data=npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--n", type=int, default=300, help="images that are attacked")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true", help="print what is finished, no more")
    args = parser.parse_args()
    if not args.table:
        for seed in args.seeds:
            measure(args, seed)
    show(args)


if __name__ == "__main__":
    main()
