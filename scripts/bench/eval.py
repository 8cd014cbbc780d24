#!/usr/bin/env python
"""AutoAttack by ``engine=fast``, by pyautoattack and by torchattacks: time, passes, what is left.

    python scripts/bench/eval.py RUN --threads 2 --n 200 --out benchmarks/data/eval.jsonl

All tools attack the same images of the same model, one after the other, in one process, with the
same number of threads. The floor of a tool's time is what its passes would cost at the least: the
rows that it sent forwards and backwards, each at the best price (a median) that any batch size,
memory layout and fused copy of the model had before or after the runs. pyautoattack comes first:
our engine makes the C library keep freed memory, which would help it too.

--profile apgd-ce square: after all that each tool runs these members alone, on one batch, under
PyTorch's profiler, which makes everything slower.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from shared import MEMBERS, NORMS, append, machine, upstream
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import advbench
from advbench import config
from advbench.attacks.base import Clean, Counted, attackable
from advbench.attacks.threat import Threat
from advbench.config import inherit
from advbench.evaluation.fast_model import FastModelOptions, ask, fast_copy
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.evaluation.resources import Resources
from advbench.evaluation.samples import subset
from advbench.experiments import models
from advbench.runs import directory

TOOLS = ("fast", "fast-bf16", "pyautoattack", "torchattacks")


class Prices:
    """The best seconds per row of a forward pass, and of one with an input gradient."""

    def __init__(self, model: nn.Module, clean: Clean, batches: list[int]) -> None:
        self.forward = self.both = float("inf")
        few = Clean(*(part[:8] for part in clean))
        self.copies = [model, fast_copy(model, FastModelOptions(), few)]
        self.clean, self.batches = clean, batches

    def measure(self, seconds: float = 0.5) -> None:
        for batch in self.batches:
            rows = torch.arange(batch) % len(self.clean.x)
            part = Clean(*(field[rows] for field in self.clean))
            for model in self.copies:
                self.forward = min(
                    self.forward, _typical(lambda m=model, p=part: m(p.x), seconds) / batch
                )
                self.both = min(
                    self.both, _typical(lambda m=model, p=part: ask(m, p), seconds) / batch
                )

    def floor(self, forwards: int, backwards: int) -> float:
        """Seconds for so many rows; each backward row had a forward one."""
        return (forwards - backwards) * self.forward + backwards * self.both


@torch.no_grad()
def _typical(work: Callable[[], Any], seconds: float) -> float:
    """The median: of the luckiest moments no long run is made."""
    work()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Work:
    """What all tools do. members: of the standard suite; None is all of it."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat
    batch: int
    members: list[str] | None = None

    def by(self, tool: str) -> dict[str, Any]:
        if tool.startswith("fast"):
            return fast(self, "bf16" if "bf16" in tool else "32")
        return theirs(self, tool)


def fast(work: Work, precision: str) -> dict[str, Any]:
    y, protocol = work.y, AutoAttackProtocol(attacks=work.members)
    begin = time.perf_counter()
    results = advbench.evaluate(
        work.model, work.x, y, threat=work.threat, protocol=protocol, batch_size=work.batch,
        precision=precision,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    passes = [sum(getattr(s, what) for s in results.stages) for what in ("forwards", "backwards")]
    return {
        "seconds": seconds,
        "robust": round(results.robust.acc * len(y)),
        "forwards": passes[0] + len(y),
        "backwards": passes[1],
        "stages": [[s.name, s.attacked, s.broken, s.seconds] for s in results.stages],
    }


def theirs(work: Work, tool: str) -> dict[str, Any]:
    model, x, y, threat, batch = work.model, work.x, work.y, work.threat, work.batch
    counted, classes = Counted(model).eval(), model(x[:1]).shape[1]
    begin = time.perf_counter()
    if tool == "pyautoattack":
        suite = upstream(counted, threat, 0, classes, work.members)
        found, _ = suite.run_standard_evaluation(x, y, batch_size=batch)
    else:
        import torchattacks

        norm: Any = NORMS[threat.norm]
        attack = torchattacks.AutoAttack(
            counted, norm=norm, eps=threat.radius, n_classes=classes, seed=0
        )
        attack.set_device(x.device)
        with torch.enable_grad():
            parts = zip(x.split(batch), y.split(batch), strict=True)
            found = torch.cat([attack(a, b) for a, b in parts])
    _wait()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        right = torch.cat([model(part) for part in found.split(batch)]).argmax(1) == y
    inside = threat.contains(found, x).all() and found.min() >= 0 and found.max() <= 1
    return {
        "seconds": seconds,
        "robust": int(right.sum()),
        "forwards": counted.forwards,
        "backwards": counted.backwards,
        "inside": bool(inside),
    }


def longest(work: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """The ten operators with the most time of their own, and its share of all operators' time."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as profiler:
        work()
        _wait()
    of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, of))
    total = sum(getattr(event, of) for event in events)
    return [
        {"name": event.key, "calls": event.count, "share": getattr(event, of) / total}
        for event in events[:10]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a finished training run")
    parser.add_argument("--threat", help="such as linf:8/255; default: the run's")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--batch", type=int, help="default: what advbench eval takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["pyautoattack", "fast"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", nargs="+", default=[], choices=MEMBERS)
    parser.add_argument("--out", type=Path, help="append a line of JSON")
    given = parser.parse_args()
    logging.disable()
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.allow_tf32 = False

    run = directory.find(given.run)
    model, _ = models.from_run(run)
    model.to(given.device)
    norm, _, eps = (given.threat or "").partition(":")
    threat = Threat(norm, eps) if norm else config.build(run.config.threat, "threat")
    test = config.build(inherit(None, run.config, "data"), "data").test
    ids = subset(len(test), given.n)
    x, y = test.fetch(ids, given.device)
    batch = given.batch or Resources(given.device).batch_size_for(tuple(x.shape[1:]))
    print(f"{given.run.name}, {threat}, n = {len(y)}, batch {batch}, {given.threads} threads")

    with attackable(model):
        prices = Prices(model, Clean(ids, x, y), sorted({16, 32, 64, batch}))
        prices.measure()
    work, rows = Work(model, x, y, threat, batch), {}
    for tool in given.tools:
        rows[tool] = work.by(tool)
        print(tool, json.dumps(rows[tool]), flush=True)
    with attackable(model):
        prices.measure()

    print("| tool | seconds | robust | forwards / sample | backwards / sample | time / floor |")
    print("|---|---|---|---|---|---|")
    for tool, row in rows.items():
        row["floor"] = prices.floor(row["forwards"], row["backwards"])
        print(
            f"| {tool} | {row['seconds']:.1f} | {row['robust']} of {len(y)} "
            f"| {row['forwards'] / len(y):.0f} | {row['backwards'] / len(y):.0f} "
            f"| {row['seconds'] / row['floor']:.2f} |"
        )
    for tool, member in product(given.tools, given.profile):
        if tool == "torchattacks":  # which has the whole suite only
            continue
        alone = replace(work, x=x[:batch], y=y[:batch], members=[member])
        found = longest(partial(alone.by, tool), given.device)
        rows[tool].setdefault("longest", {})[member] = found
        print(f"\n| {tool}, {member}: operator | calls | share of the time |\n|---|---|---|")
        for row in found:
            print(f"| {row['name']} | {row['calls']} | {100 * row['share']:.1f} % |")
    if given.out is not None:
        record = {
            "date": time.strftime("%Y-%m-%d"), "run": given.run.name, "threat": str(threat),
            "n": len(y), "batch": batch, "threads": given.threads, "torch": torch.__version__,
            "machine": machine(given.device),
            "ms_forward": 1e3 * prices.forward, "ms_both": 1e3 * prices.both, "tools": rows,
        }  # fmt: skip
        append(given.out, record)


if __name__ == "__main__":
    main()
