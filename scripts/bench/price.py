#!/usr/bin/env python
"""The price of each attack of AutoAttack's suite, by pyautoattack and by our engine, and the floor.

    ONEDNN_MAX_CPU_ISA=AVX2 python scripts/bench/price.py --data cifar10.npz --threads 1
    python scripts/bench/price.py RUN --threads 1 --n 12 --share 0.05 --pairs 2

Without RUN the model is a small convnet, 122 thousand parameters, adversarially trained here for
a few seconds on the images of --data: on such a net what an engine does between the model's passes
is most of the time. With RUN it is the model of a finished training.

Both tools attack the same images, which withstand our APGD, so that all of them stay to the end,
with the same number of threads, each tool in a process of its own: our engine makes the C library
keep freed memory, which would help the other one too. Each attack runs alone, the tools in turns,
--pairs times; the ratio is the median over the pairs, for a machine whose pace changes.
The suite's ratio is that of the sums. The floor is the time that our passes alone take on the
search's copy of the model, in batches of the same size, timed in the same pair.

--share: of the suite's targets and of Square's queries that are run; 1 is the whole suite.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from shared import MEMBERS, append, machine, upstream
from torch import Tensor, nn

import advbench
from advbench import config
from advbench.attacks.apgd import APGD
from advbench.attacks.base import Clean, Counted, attackable, craft
from advbench.attacks.fab import FAB
from advbench.attacks.pgd import PGD
from advbench.attacks.random import TorchRandom
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.config import inherit
from advbench.evaluation.fast_model import FastModelOptions, ask, fast_copy
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.protocols import autoattack
from advbench.experiments import models
from advbench.runs import directory

TOOLS = ("pyautoattack", "advbench")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Small(nn.Module):
    """The small convnet of Wong & Kolter (2018, arXiv 1711.00851) for 3x32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = (
            nn.Buffer(torch.tensor(values).view(1, 3, 1, 1)) for values in (MEAN, STD)
        )
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) / self.std)


def trained(path: Path, threat: Threat, images: int = 15000, epochs: int = 4) -> nn.Module:
    """The small net after PGD-AT of five steps."""
    torch.manual_seed(0)
    x, y = arrays(path, "train", images)
    model, batch = Small(), 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=epochs * (len(x) // batch)
    )
    for _ in range(epochs):
        for at in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            clean = Clean(at, x[at], y[at])
            with attackable(model):
                images_ = craft(PGD(steps=5), model, clean, threat, TorchRandom())
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images_), y[at]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def arrays(path: Path, split: str, n: int) -> tuple[Tensor, Tensor]:
    """The first n images and classes of an .npz with uint8 (N, H, W, C)."""
    with np.load(path) as content:
        x, y = content[f"x_{split}"][:n], content[f"y_{split}"][:n]
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float() / 255, torch.from_numpy(
        y
    ).long()


@dataclass(frozen=True)
class Alone(Protocol):
    """One attack of the suite, with its own parameters but for the share that is run."""

    name = "alone"
    member: str
    share: float = 1.0

    def stages(self, subject: Subject) -> list[Stage]:
        attack = autoattack(self.member, subject)
        if isinstance(attack, Square):
            attack = replace(attack, steps=part(attack.steps, self.share))
        elif isinstance(attack, FAB) or (isinstance(attack, APGD) and attack.targeted):
            attack = replace(attack, targets=part(attack.targets, self.share))
        return [Stage(self.member, attack, "a benchmark")]


def now() -> float:
    """CPU seconds for one thread, which other work on the machine lengthens less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def part(count: int, share: float) -> int:
    return max(round(count * share), 1)


@dataclass(frozen=True)
class Work:
    """What both tools do."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat
    share: float

    def by(self, tool: str, member: str) -> tuple[float, int, int, int]:
        """Seconds, robust, forwards and backwards."""
        model, x, y = self.model, self.x, self.y
        begin = now()
        if tool == "advbench":
            results = advbench.evaluate(
                model, x, y, threat=self.threat, protocol=Alone(member, self.share),
                batch_size=len(x),
            )  # fmt: skip
            seconds = now() - begin
            spent = results.stages[0]
            return seconds, round(results.robust.acc * len(y)), spent.forwards, spent.backwards
        counted, classes = Counted(model).eval(), 10
        suite = upstream(counted, self.threat, 0, classes, [member])
        suite.square.n_queries = part(suite.square.n_queries, self.share)
        for attack in (suite.apgd_targeted, suite.fab):
            attack.n_target_classes = part(attack.n_target_classes, self.share)
        found, _ = suite.run_standard_evaluation(x, y, batch_size=len(x))
        seconds = now() - begin
        with torch.no_grad():
            robust = int((model(found).argmax(1) == y).sum())
        return seconds, robust, counted.forwards, counted.backwards


def alone(work: Work, tool: str, member: str, threads: int) -> tuple[float, int, int, int]:
    """``Work.by`` in a process of the tool's own."""
    logging.disable()
    torch.set_num_threads(threads)
    with attackable(work.model):  # for both: gradients of inputs alone
        return work.by(tool, member)


def floor(fast: nn.Module, clean: Clean, forwards: int, backwards: int) -> float:
    """Seconds of so many rows' passes alone; each backward row had a forward one."""
    n = len(clean.x)

    @torch.no_grad()
    def forward() -> None:
        fast(clean.x)

    return (
        (forwards - backwards) * typical(forward) + backwards * typical(lambda: ask(fast, clean))
    ) / n


def typical(work: Callable[[], object], seconds: float = 0.5) -> float:
    """The median time."""
    times, end = [], now() + seconds
    while now() < end:
        begin = now()
        work()
        times.append(now() - begin)
    return statistics.median(times)


def survivors(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, n: int) -> Tensor:
    """The first n images that withstand APGD-CE of 50 steps."""
    with attackable(model):
        attack, found = APGD(steps=50, loss_name="ce"), []
        for at in torch.arange(len(x)).split(250):
            clean = Clean(at, x[at], y[at])
            point = craft(attack, model, clean, threat, TorchRandom())
            with torch.no_grad():
                right = (model(x[at]).argmax(1) == y[at]) & (model(point).argmax(1) == y[at])
            found.append(at[right])
            if sum(map(len, found)) >= n:
                break
    return torch.cat(found)[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="a finished training run")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz, without RUN")
    parser.add_argument("--weights", type=Path, help="of the small net: read, or else written")
    parser.add_argument("--threat", default="linf:2/255")
    parser.add_argument("--n", type=int, default=64, help="images that withstand")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    parser.add_argument("--out", type=Path, help="append a line of JSON")
    given = parser.parse_args()
    logging.disable()
    torch.set_num_threads(given.threads)
    norm, _, eps = given.threat.partition(":")
    threat = Threat(norm, eps)
    if given.run is not None:
        run = directory.find(given.run)
        model, _ = models.from_run(run)
        test = config.build(inherit(None, run.config, "data"), "data").test
        x, y = test.fetch(torch.arange(min(len(test), 2000)), torch.device("cpu"))
    else:
        if given.weights is not None and given.weights.exists():
            model = Small().eval()
            model.load_state_dict(torch.load(given.weights, weights_only=True))
        else:
            model = trained(given.data, threat)
            if given.weights is not None:
                torch.save(model.state_dict(), given.weights)
        x, y = arrays(given.data, "test", 2000)
    at = survivors(model, x, y, threat, given.n)
    x, y = x[at], y[at]
    work, clean = Work(model, x, y, threat, given.share), Clean(at, x, y)
    with attackable(model):
        fast = fast_copy(model, FastModelOptions(), Clean(*(field[:8] for field in clean)))
    print(f"{threat}, {len(y)} images that withstand APGD-CE, share {given.share:g}")
    print("| attack | robust | forwards, backwards / image | s | ratio | floor s | time / floor |")
    print("|---|---|---|---|---|---|---|")
    pools = {
        tool: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        for tool in TOOLS
    }
    totals, rows = dict.fromkeys((*TOOLS, "floor"), 0.0), {}
    for member in given.members:
        seconds, floors, last = {tool: [] for tool in TOOLS}, [], {}
        for _ in range(given.pairs):
            for tool, pool in pools.items():
                last[tool] = pool.submit(alone, work, tool, member, given.threads).result()
                seconds[tool].append(last[tool][0])
            with attackable(model):
                floors.append(floor(fast, clean, *last["advbench"][2:]))
        ratio = statistics.median(map(lambda a, b: a / b, *seconds.values()))
        middle = {tool: statistics.median(seconds[tool]) for tool in TOOLS}
        lowest = statistics.median(floors)
        over = statistics.median(map(lambda a, b: a / b, seconds["advbench"], floors))
        for tool in TOOLS:
            totals[tool] += middle[tool]
        totals["floor"] += lowest
        counts = [f"{last[t][2] / len(y):.0f}, {last[t][3] / len(y):.0f}" for t in TOOLS]
        print(
            f"| {member} | {last[TOOLS[0]][1]}, {last[TOOLS[1]][1]} | {counts[0]}; {counts[1]} "
            f"| {middle[TOOLS[0]]:.1f}, {middle[TOOLS[1]]:.1f} | {ratio:.2f} | {lowest:.1f} "
            f"| {over:.2f} |",
            flush=True,
        )
        rows[member] = {"seconds": seconds, "floor": floors, "counts": last}
    ratio = totals[TOOLS[0]] / max(totals[TOOLS[1]], math.ulp(1))
    over = totals[TOOLS[1]] / totals["floor"]
    print(
        f"| all | | | {totals[TOOLS[0]]:.1f}, {totals[TOOLS[1]]:.1f} | {ratio:.2f} "
        f"| {totals['floor']:.1f} | {over:.2f} |"
    )
    if given.out is not None:
        record = {
            "date": time.strftime("%Y-%m-%d"), "model": given.run.name if given.run else "small",
            "threat": str(threat), "n": len(y), "share": given.share, "threads": given.threads,
            "torch": torch.__version__, "machine": machine("cpu"), "attacks": rows,
        }  # fmt: skip
        append(given.out, record)


if __name__ == "__main__":
    main()
