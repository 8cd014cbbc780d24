#!/usr/bin/env python
"""Our AutoAttack against pyautoattack, called directly on the same models and images.

    python scripts/bench/parity.py RUN:NORM:EPS[,EPS...] ... --out FILE.jsonl
    python scripts/bench/parity.py --table --out FILE.jsonl

RUN is the folder of a finished training; NORM is linf, l2 or l1; EPS is as in threat.eps. The
images are n of the test split. Both sides judge the same two things:

    suite       the whole standard suite, by default with seed 0 alone
    a member    apgd-ce, apgd-t, fab-t or square alone, on all correctly classified samples

The spread over seeds is what a difference has to be held against.

A unit of work is one line of FILE, and a unit that is there is not repeated: kill and restart at
will. First come the suites, then the members at each model's first EPS, then at the others. Times
are CPU seconds, which other work on the machine lengthens less; they are no benchmark of speed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from shared import MEMBERS, upstream
from torch import Tensor

import advbench
from advbench import config
from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.evaluation.samples import subset
from advbench.evaluation.store import read_samples
from advbench.experiments import models
from advbench.runs import directory

SUITE = "suite"
ENGINES = ("reference", "fast")
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Unit:
    """What is run, and by whom. what: suite, or a member of it."""

    run: str
    norm: str
    eps: float
    what: str
    engine: str
    seed: int
    n: int


@dataclass(frozen=True)
class Case:
    """A model and the radii it is attacked with."""

    folder: Path
    norm: str
    radii: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Case:
        folder, norm, radii = text.rsplit(":", 2)
        threats = [Threat(norm, eps) for eps in radii.split(",")]
        return cls(Path(folder), norm, tuple(threat.radius for threat in threats))


@dataclass(frozen=True)
class Problem:
    """A model with frozen parameters, and test images: ids, x, y of length n."""

    model: Classifier
    ids: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def load(cls, folder: Path, n: int) -> Problem:
        run = directory.find(folder)
        model, _ = models.from_run(run)
        test = config.build(run.config.data, "data").test
        ids = subset(len(test), n)
        return cls(model.requires_grad_(False), ids, *test.fetch(ids, torch.device("cpu")))


def reference(problem: Problem, unit: Unit, batch: int) -> Tensor:
    """Which samples are robust by pyautoattack's own verdict, (n,)."""
    members = None if unit.what == SUITE else [unit.what]
    threat = Threat(unit.norm, unit.eps)
    suite = upstream(problem.model, threat, unit.seed, problem.model.num_classes, members)
    with contextlib.redirect_stdout(io.StringIO()):
        _, label = suite.run_standard_evaluation(problem.x, problem.y, batch_size=batch)
    return label == problem.y


def fast(problem: Problem, unit: Unit, batch: int) -> Tensor:
    """Which samples are robust by our engine, (n,)."""
    protocol = AutoAttackProtocol(attacks=None if unit.what == SUITE else [unit.what])
    robust = torch.ones(len(problem.ids), dtype=torch.bool)
    with tempfile.TemporaryDirectory() as folder:
        advbench.evaluate(
            problem.model,
            problem.x,
            problem.y,
            threat=Threat(unit.norm, unit.eps),
            protocol=protocol,
            seed=unit.seed,
            batch_size=batch,
            folder=folder,
        )
        for records in read_samples(Path(folder)).values():
            robust[torch.from_numpy(records.sample[records.broken])] = False
    return robust


def measure(problem: Problem, unit: Unit, batch: int) -> dict[str, Any]:
    """Run a unit; returns its line of the file."""
    with torch.no_grad():
        right = problem.model(problem.x).argmax(1) == problem.y
    judge = reference if unit.engine == "reference" else fast
    begin, spent = time.perf_counter(), time.process_time()
    robust = judge(problem, unit, batch)
    return {
        **asdict(unit),
        "clean": int(right.sum()),
        "robust": problem.ids[robust].tolist(),
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - spent, 2),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "torch": torch.__version__,
    }


def units(
    cases: list[Case], whats: list[str], engines: list[str], seeds: list[int] | None, n: int
) -> Iterator[tuple[Case, Unit]]:
    """All units in order of running, the most telling ones first.

    seeds: None is 0 for the suite and ``SEEDS`` for the members.
    """

    def of(case: Case, eps: float, what: str, seed: int) -> Iterator[tuple[Case, Unit]]:
        for engine in engines:
            yield case, Unit(case.folder.name, case.norm, eps, what, engine, seed, n)

    if SUITE in whats:
        for seed in seeds or [0]:
            for case in cases:
                for eps in case.radii:
                    yield from of(case, eps, SUITE, seed)
    for rank in range(max((len(case.radii) for case in cases), default=0)):
        for case in cases:
            for eps in case.radii[rank : rank + 1]:
                for seed in seeds or SEEDS:
                    for what in whats:
                        if what != SUITE:
                            yield from of(case, eps, what, seed)


def read(path: Path) -> dict[Unit, dict[str, Any]]:
    """The lines of the file, by unit."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {
        Unit(**{key: record[key] for key in Unit.__annotations__}): record for record in records
    }


def run(path: Path, work: list[tuple[Case, Unit]], batch: int) -> None:
    """Do what the file does not hold yet."""
    known = read(path)
    missing = [(case, unit) for case, unit in work if unit not in known]
    print(f"{len(work)} units, {len(missing)} to do", flush=True)
    problems: dict[Path, Problem] = {}
    for done, (case, unit) in enumerate(missing, start=1):
        if case.folder not in problems:
            problems[case.folder] = Problem.load(case.folder, unit.n)
        record = measure(problems[case.folder], unit, batch)
        # One unbuffered write: a line is there as a whole or not at all.
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(record) + "\n").encode())
        print(
            f"{done}/{len(missing)} {unit.run} {Threat(unit.norm, unit.eps)} {unit.what} "
            f"{unit.engine} seed {unit.seed}: robust {len(record['robust'])} of {record['clean']} "
            f"clean, n = {unit.n}, {record['seconds']:.1f} s, {record['cpu_seconds']:.1f} s of CPU",
            flush=True,
        )


Sides = dict[str, dict[int, dict[str, Any]]]  # engine -> seed -> line


def grouped(records: dict[Unit, dict[str, Any]]) -> dict[tuple[str, str, int, str], Sides]:
    """(run, threat, n, what) -> the lines of both sides."""
    groups: dict[tuple[str, str, int, str], Sides] = {}
    for unit, record in records.items():
        key = (unit.run, str(Threat(unit.norm, unit.eps)), unit.n, unit.what)
        sides = groups.setdefault(key, {engine: {} for engine in ENGINES})
        sides[unit.engine][unit.seed] = record
    return groups


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def suite_table(records: dict[Unit, dict[str, Any]]) -> str:
    """Sample by sample with seed 0: who breaks what the other leaves."""
    rows = [["model", "threat", "n", "clean", "robust, reference", "robust, fast"]]
    rows[0] += ["reference alone breaks", "fast alone breaks", "CPU s, reference", "fast"]
    for (name, threat, n, what), sides in grouped(records).items():
        if what != SUITE:
            continue
        lines = [sides[engine].get(0) for engine in ENGINES]
        clean = next(line["clean"] for line in lines if line)
        counts = [str(len(line["robust"])) if line else "" for line in lines]
        seconds = [f"{line['cpu_seconds']:.0f}" if line else "" for line in lines]
        alone = ["", ""]
        if lines[0] and lines[1]:
            theirs, ours = set(lines[0]["robust"]), set(lines[1]["robust"])
            alone = [str(len(ours - theirs)), str(len(theirs - ours))]
        rows.append([name, threat, str(n), str(clean), *counts, *alone, *seconds])
    return table(rows)


def seeds_table(records: dict[Unit, dict[str, Any]]) -> str:
    """Robust counts over seeds: mean, standard deviation and range, and how far they differ.

    Of all members, and of the suites that ran with more than seed 0.
    """
    rows = [["model", "threat", "n", "attack", "seeds", "robust, reference", "robust, fast"]]
    rows[0] += ["fast - reference", "in pooled sd", "CPU s per seed, reference", "fast"]
    for (name, threat, n, what), sides in sorted(grouped(records).items()):
        if what == SUITE and all(side.keys() <= {0} for side in sides.values()):
            continue
        lines = [list(sides[engine].values()) for engine in ENGINES]
        counts = [[len(line["robust"]) for line in side] for side in lines]
        seconds = [
            f"{statistics.mean(line['cpu_seconds'] for line in side):.1f}" if side else ""
            for side in lines
        ]
        difference, ratio = "", ""
        if counts[0] and counts[1]:
            gap = statistics.mean(counts[1]) - statistics.mean(counts[0])
            difference, ratio = f"{gap:+.1f}", in_pooled_sd(gap, *counts)
        seeds = " / ".join(str(len(count)) for count in counts)
        cells = [name, threat, str(n), what, seeds, *map(spread, counts), difference, ratio]
        rows.append([*cells, *seconds])
    return table(rows)


def spread(counts: list[int]) -> str:
    """Mean, standard deviation and range of some counts."""
    if not counts:
        return ""
    sd = f" +- {statistics.stdev(counts):.1f}" if len(counts) > 1 else ""
    return f"{statistics.mean(counts):.1f}{sd} ({min(counts)} to {max(counts)})"


def in_pooled_sd(gap: float, a: list[int], b: list[int]) -> str:
    """The gap between two means in units of sqrt((var a + var b) / 2)."""
    if len(a) < 2 or len(b) < 2:
        return ""
    pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    if pooled == 0:
        return "0" if gap == 0 else "no spread"
    return f"{gap / pooled:+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", type=Case.parse, metavar="RUN:NORM:EPS[,EPS...]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="both")
    parser.add_argument("--what", nargs="+", choices=[SUITE, *MEMBERS], default=[SUITE, *MEMBERS])
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0, of members 0 to 4")
    parser.add_argument("--n", type=int, default=200, help="test samples")
    parser.add_argument("--batch", type=int, default=200, help="samples attacked side by side")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    args = parser.parse_args()
    engines: list[str] = [*ENGINES] if args.engine == "both" else [args.engine]
    if args.cases:
        work = list(units(args.cases, args.what, engines, args.seeds, args.n))
        run(args.out, work, args.batch)
    if args.table:
        records = read(args.out)
        print(suite_table(records), seeds_table(records), sep="\n\n")


if __name__ == "__main__":
    main()
