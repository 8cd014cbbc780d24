#!/usr/bin/env python
"""Express against AutoAttack, by pyautoattack and by our engine: survivors, passes, time.

    python scripts/bench/express.py --out express.jsonl --role proves RUN=linf:0.15 RUN=l2:0.6

A case is a finished training and a threat. Each tool attacks the same n test images, in float32,
with the same number of threads. A case that stands in the file is left out, so that a later sitting
goes on. --role says whether a case chose the variant of express or proves it; no case does both.
A pass is a forward; a backward counts as two. --tools: some of pyautoattack, autoattack, express.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path

import torch
from shared import append, machine, upstream
from torch import Tensor, nn

import advbench
from advbench import config
from advbench.attacks.base import Counted
from advbench.attacks.threat import Threat
from advbench.evaluation.express import ExpressProtocol
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.evaluation.samples import subset
from advbench.runs import directory

OURS = {"autoattack": AutoAttackProtocol(), "express": ExpressProtocol(audit=0, escalate=False)}


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, tool: str) -> dict[str, float]:
    """Our engine with a protocol."""
    results = advbench.evaluate(model, x, y, threat=threat, protocol=OURS[tool], verdict="none")
    passes = sum(stage.forwards + 2 * stage.backwards for stage in results.stages)
    seconds = sum(stage.seconds for stage in results.stages)
    return {"left": round(len(y) * results.robust.acc), "passes": passes, "seconds": seconds}


def theirs(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> dict[str, float]:
    """pyautoattack, called directly."""
    counted, begin = Counted(model).eval(), time.perf_counter()
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    suite = upstream(counted, threat, 0, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        _, label = suite.run_standard_evaluation(x, y, batch_size=len(y))
    seconds, passes = time.perf_counter() - begin, counted.forwards + 2 * counted.backwards
    return {"left": int((label == y).sum()), "passes": passes, "seconds": seconds}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("cases", nargs="+", metavar="RUN=NORM:EPS")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--role", choices=("chooses", "proves"), required=True)
    words.add_argument("--tools", default="express,autoattack,pyautoattack")
    words.add_argument("--n", type=int, default=200)
    given = words.parse_args()
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.exists() else []
    done = {(line["case"], line["n"], line["tool"]) for line in map(json.loads, lines)}
    for case in given.cases:
        folder, _, limit = case.rpartition("=")
        norm, _, eps = limit.partition(":")
        trained, threat = directory.find(folder), Threat(norm, eps)
        test = config.build(trained.config.data, "data").test
        x, y = test.fetch(subset(len(test), given.n), torch.device("cpu"))
        model = advbench.load(folder).eval().requires_grad_(False)
        for tool in given.tools.split(","):
            name = f"{Path(folder).name}={limit}"
            if (name, given.n, tool) in done:
                continue
            found = (
                theirs(model, x, y, threat)
                if tool == "pyautoattack"
                else ours(model, x, y, threat, tool)
            )
            per = {"passes_per_survivor": found["passes"] / max(found["left"], 1)}
            told = {"case": name, "role": given.role, "n": given.n, "tool": tool}
            where = {"threads": torch.get_num_threads(), "machine": machine("cpu")}
            append(given.out, {**told, **found, **per, **where})
            print(name, tool, found, flush=True)


if __name__ == "__main__":
    main()
