#!/usr/bin/env python
"""Hold a finished evaluation against pyautoattack, called directly on the same model and images.

    python scripts/bench/parity.py outputs/eval/RUN

Prints one line: how many samples each calls robust, and for how many they differ.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack

from advbench import config, models
from advbench.evaluation.engine import subset
from advbench.evaluation.store import read_samples
from advbench.experiments import inherit
from advbench.results import Results


def main(folder: Path) -> None:
    cfg, results = config.read(folder / "config.yaml"), Results.load(folder / "results.json")
    model, _, trained = models.from_run(Path(cfg.run))
    model.requires_grad_(False)
    test = config.build(inherit(cfg.data, trained, "data"), "data").test
    ids = subset(len(test), cfg.n)
    x, y = test.fetch(ids, "cpu")

    norm: Any = {"linf": "Linf", "l2": "L2", "l1": "L1"}[results.threat["norm"]]
    suite = AutoAttack(model, norm=norm, eps=results.threat["eps"], seed=cfg.seed)
    suite.verbose = False
    begin = time.perf_counter()
    found, _ = suite.run_standard_evaluation(x, y, batch_size=cfg.trainer.batch_size)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        direct = torch.cat([model(part) for part in found.split(cfg.trainer.batch_size)])
    robust = (direct.argmax(1) == y).numpy()

    broken = np.zeros(len(test), bool)
    for records in read_samples(folder).values():
        broken[records.sample[records.broken]] = True
    ours = ~broken[ids.numpy()]
    print(
        f"{folder.name}: robust {ours.sum()} of {len(ids)} here, {robust.sum()} by pyautoattack; "
        f"{(ours != robust).sum()} samples differ; "
        f"{results.provenance['seconds']:.0f} s and {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
