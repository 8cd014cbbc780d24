#!/usr/bin/env python
"""How often the audit's interval contains what AutoAttack leaves, on evaluations that know it.

    advbench eval run=RUN protocol=express protocol.audit=all verdict=none n=200 hydra.run.dir=WHOLE
    python scripts/bench/coverage.py WHOLE ...

Such an evaluation holds AutoAttack's outcome for every survivor of express, so any audit can be
played again: --draws times, each by another key, ``protocol.audit=--audit`` draws its sample. The
interval that it would print is held against the number that AutoAttack leaves. Seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from advbench.evaluation.estimate import estimate
from advbench.evaluation.express import FIRST_IN_L1, STAGE
from advbench.evaluation.job import CLEAN
from advbench.evaluation.phases import keyed_sample
from advbench.evaluation.store import read_samples


def survivors(folder: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """The images, the ids that express left, and which of these AutoAttack broke.

    Raises SystemExit if AutoAttack did not attack all of them.
    """
    records = read_samples(folder)
    clean, express = records.pop(CLEAN), records.pop(STAGE)
    records.pop(FIRST_IN_L1, None)
    left = np.setdiff1d(express.sample, express.sample[express.broken])
    first = next(iter(records.values()), None)
    if first is None or set(first.sample) != set(left):
        raise SystemExit(f"{folder}: evaluate with protocol=express protocol.audit=all")
    broken = np.concatenate([stage.sample[stage.broken] for stage in records.values()])
    return len(clean), left, np.isin(left, broken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="evaluations with protocol.audit=all")
    parser.add_argument("--audits", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--draws", type=int, default=200)
    given = parser.parse_args()
    print("| evaluation | n | express left | AutoAttack left | audit | intervals that contain it |")
    print("|---|---|---|---|---|---|")
    for folder in given.runs:
        n, left, broken = survivors(folder)
        truth = int((~broken).sum())
        for size in (size for size in given.audits if size < len(left)):
            inside = 0
            for seed in range(given.draws):
                drawn = np.isin(left, keyed_sample(left, size, seed))
                found = estimate("AutoAttack", n, len(left), size, int(broken[drawn].sum()))
                low, high = (round(end * n) for end in found.ci95)
                inside += low <= truth <= high
            share = f"{inside} of {given.draws}, {100 * inside / given.draws:.1f} %"
            print(f"| {folder.name} | {n} | {len(left)} | {truth} | {size} | {share} |")


if __name__ == "__main__":
    main()
