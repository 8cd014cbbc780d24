#!/usr/bin/env python
"""AutoAttack on the model that train.py left: precisions, graphs, express, the authors' own code.

    python scripts/gpu/evaluate.py --data FILE.npz [--tiny]

All evaluations attack the same images of the same model. n is smaller for what would outlast a
sitting; ratios are taken of equal n.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sitting import Sitting, advbench, parser, results

WAYS = {
    "float32": "protocol=autoattack",
    "float32-again": "protocol=autoattack seed=0",
    "bf16": "protocol=autoattack trainer.precision=bf16",
    "tf32": "protocol=autoattack trainer.precision=tf32",
    "graphs": "protocol=autoattack trainer.graphs=true",
    "bf16-graphs": "protocol=autoattack trainer.precision=bf16 trainer.graphs=true",
    "bf16-compile": "protocol=autoattack trainer.precision=bf16 trainer.compile=reduce-overhead",
    "batch-128": "protocol=autoattack trainer.batch_size=128",
    "express": "protocol=express protocol.audit=0",
    "express-audited": "protocol=express protocol.audit=100",
    "reference": "protocol=autoattack protocol.engine=reference",
}


def evaluate(folder: Path, run: Path, words: list[str]) -> Mapping[str, Any]:
    seconds = advbench("eval", f"run={run}", *words, f"hydra.run.dir={folder}")
    return {**results(folder), "command_seconds": seconds}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--n", type=int, help="images; default: 1000, or 16 with --tiny")
    given = options.parse_args()
    sitting = Sitting("evaluate", given)
    run = sitting.folder / "full"
    if not (run / "summary.json").exists():
        raise SystemExit(f"no model in {run}: run train.py first, with --only full")
    n = given.n or (16 if given.tiny else 1000)
    few = [] if not given.tiny else ["protocol.attacks=[apgd-ce]"]
    for name, way in WAYS.items():
        if given.tiny and name not in ("float32", "graphs", "express", "reference"):
            continue
        own = few if "autoattack" in way else []
        folder = sitting.folder / f"eval-{name}-{n}"
        words = [*way.split(), f"n={n}", *own]
        sitting.cases[f"{name}-{n}"] = partial(evaluate, folder, run, words)
    small = min(n, 100)
    for accelerator in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        folder = sitting.folder / f"eval-{accelerator}-{small}"
        words = ["protocol=apgd", f"n={small}", f"trainer.accelerator={accelerator}"]
        sitting.cases[f"apgd-{accelerator}-{small}"] = partial(evaluate, folder, run, words)
    return sitting.run()


if __name__ == "__main__":
    raise SystemExit(main())
