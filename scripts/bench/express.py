#!/usr/bin/env python
"""Express against AutoAttack, by pyautoattack and by our engine: survivors, passes, time.

    python scripts/bench/express.py --out express.jsonl --role proves RUN=linf:0.15 RUN=l2:0.6

A case is a finished training and a threat. Each tool attacks the same n test images, in float32,
with the same number of threads. A case that stands in the file is left out, so that a later sitting
goes on. --role says whether a case chose the variant of express or proves it; no case does both.
A pass is a forward; a backward counts as two. --tools: some of pyautoattack, autoattack, express;
express-STEPSxTARGETS for another one; apgd-ce, apgd-t, fab-t, square, each alone.

    python scripts/bench/express.py --out frontier.jsonl --role chooses --tools frontier RUN=l2:1
    python scripts/bench/express.py --out frontier.jsonl --plot frontier.svg

The second draws what each tool of a file leaves against its passes, a panel for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from price import Alone
from shared import MEMBERS, append, machine, upstream
from torch import Tensor, nn

import advbench
from advbench import config
from advbench.attacks.base import Counted
from advbench.attacks.threat import Threat
from advbench.evaluation.express import ExpressProtocol
from advbench.evaluation.protocol import Protocol
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.evaluation.samples import subset
from advbench.report.style import SERIES, canvas, style
from advbench.runs import directory

SEARCHES = ("5x1", "5x3", "10x3", "20x1", "20x5", "20x9", "50x3")
"""Steps and targets of other expresses on the frontier."""
FRONTIER = (*(f"express-{search}" for search in SEARCHES), "express", *MEMBERS, "autoattack")


def protocol(tool: str) -> Protocol:
    """What our engine runs under that name."""
    if tool in MEMBERS:
        return Alone(tool)
    if tool == "autoattack":
        return AutoAttackProtocol()
    if tool == "express":
        return ExpressProtocol(audit=0, escalate=False)
    steps, _, targets = tool.removeprefix("express-").partition("x")
    return ExpressProtocol(steps=int(steps), targets=int(targets), audit=0, escalate=False)


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, tool: str) -> dict[str, float]:
    """Our engine with a protocol."""
    results = advbench.evaluate(model, x, y, threat=threat, protocol=protocol(tool), verdict="none")
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


def frontier(lines: list[dict[str, Any]], out: Path) -> None:
    """What each tool leaves against its passes: one panel for each case, saved as ``out``."""
    cases = dict.fromkeys(line["case"] for line in lines)
    with style():
        figure, panels = canvas(2.2 * len(cases), rows=len(cases))
        for axes, case in zip(np.atleast_1d(panels).flat, cases, strict=True):
            mine = [line for line in lines if line["case"] == case]
            for line in mine:
                kind = "express" if line["tool"].startswith("express") else line["tool"]
                shape, colour = ("o", SERIES[0]) if kind == "express" else ("s", SERIES[1])
                passes, left = line["passes_per_survivor"], 100 * line["left"] / line["n"]
                axes.plot(passes, left, shape, color=colour)
                axes.annotate(
                    line["tool"].removeprefix("express-"), (passes, left), (3, 3),
                    textcoords="offset points", fontsize=6,
                )  # fmt: skip
            axes.set(xscale="log", title=case, xlabel="passes per surviving sample")
        np.atleast_1d(panels).flat[0].set_ylabel("robust accuracy, %")
        figure.savefig(out)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("cases", nargs="*", metavar="RUN=NORM:EPS")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--role", choices=("chooses", "proves"))
    words.add_argument("--tools", default="express,autoattack,pyautoattack")
    words.add_argument("--n", type=int, default=200)
    words.add_argument("--plot", type=Path, help="draw the frontier of the file --out, as .svg")
    given = words.parse_args()
    if given.cases and given.role is None:
        words.error("--role chooses or --role proves")
    lines = given.out.read_text(encoding="utf-8").splitlines() if given.out.exists() else []
    done = {(line["case"], line["n"], line["tool"]) for line in map(json.loads, lines)}
    tools = FRONTIER if given.tools == "frontier" else given.tools.split(",")
    for case in given.cases:
        folder, _, limit = case.rpartition("=")
        norm, _, eps = limit.partition(":")
        trained, threat = directory.find(folder), Threat(norm, eps)
        test = config.build(trained.config.data, "data").test
        x, y = test.fetch(subset(len(test), given.n), torch.device("cpu"))
        model = advbench.load(folder).eval().requires_grad_(False)
        for tool in tools:
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
    if given.plot is not None:
        lines = given.out.read_text(encoding="utf-8").splitlines()
        frontier([json.loads(line) for line in lines], given.plot)


if __name__ == "__main__":
    main()
