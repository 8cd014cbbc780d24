#!/usr/bin/env python
"""Does the verdict find liars, and leave honest models alone? Every model of tests/zoo.py, by seed.

    python scripts/bench/verdict.py attack --folder DIR --seeds 0 1 2 3 4 [--names Quantised pgd_at]
    python scripts/bench/verdict.py judge --folder DIR --out benchmarks/data/verdict.jsonl
    python scripts/bench/verdict.py table --out benchmarks/data/verdict.jsonl > table.md

``attack`` evaluates n images of each model as ``advbench eval protocol=NAME`` would, with the
verdict, in a directory of its own inside DIR; what is finished is not repeated, so kill and restart
at will. It also finds the truth: the images that break the net under the disguise, or a
straight-through twin, are scored on the model. ``judge`` computes the verdict from these records,
anew each time: thresholds may change without a new attack.
Seeds below 2 are for setting thresholds (``calibration``), the others are looked at once
(``held out``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from zoo import ENTRIES, NETS, THREAT, Entry, Zoo, data

import advbench
from advbench.attacks.apgd import APGD
from advbench.attacks.square import Square
from advbench.errors import UserError
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.express import ExpressProtocol
from advbench.evaluation.protocol import Effort, Protocol, Stage, Subject
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.evaluation.resources import Resources
from advbench.evaluation.store import read_samples
from advbench.evaluation.twins import straight_through
from advbench.experiments.subject import Candidate, TestData, evaluation_of
from advbench.files import read_json, write_json, write_text
from advbench.runs.accuracy import clopper_pearson
from advbench.runs.results import Results
from advbench.verdict.judge import Judgement

CALIBRATION = 2
"""Seeds below it are for setting thresholds."""


@dataclass(frozen=True)
class Quick(Protocol):
    """AutoAttack in small: for machines that are slow or busy. Its numbers are upper bounds."""

    name: ClassVar[str] = "quick"
    effort: ClassVar[Effort] = "cheap"

    def stages(self, subject: Subject) -> list[Stage]:
        targets = min(3, subject.num_classes - 1)
        return [
            Stage("apgd-ce", APGD(), "APGD on the cross-entropy"),
            Stage(
                "apgd-t",
                APGD(steps=30, loss_name="margin_targeted", targets=targets),
                "three targets",
            ),
            Stage("square", Square(steps=1000), "black box"),
        ]


PROTOCOLS: dict[str, Protocol] = {
    "autoattack": AutoAttackProtocol(),
    "express": ExpressProtocol(audit=8, escalate=False),
    "quick": Quick(),
}
CPU = torch.device("cpu")


def place(folder: Path) -> Callable[[str, Callable[[], None]], Path]:
    """Directories inside ``folder`` that are made once, as the fixture ``once`` does."""

    def once(name: str, make: Callable[[], None]) -> Path:
        made = folder / name
        if not (made / "summary.json").exists():
            made.mkdir(parents=True, exist_ok=True)
            with contextlib.chdir(made):
                make()
        return made

    return once


def case(
    entry: Entry, zoo: Zoo, seed: int, n: int, protocol: str, verdict: Judgement
) -> Evaluation:
    """The evaluation of a model."""
    splits = data(NETS[entry.net].classes)
    model = entry.build(zoo, seed)
    subject = Candidate(entry.name, model, entry.traits)
    return evaluation_of(
        subject,
        TestData(splits.info.name, splits.test, splits.info.input_shape, splits),
        THREAT,
        PROTOCOLS[protocol],
        Resources("cpu", 1, 1, "auto", "32", None),
        CPU,
        seed=seed,
        n=n,
        verdict=verdict,
    )


def attack(
    entry: Entry, zoo: Zoo, seed: int, n: int, folder: Path, protocol: str
) -> dict[str, Any]:
    """Reported and true robust accuracy of n images, and the verdict; or why it was refused."""
    began = time.monotonic()
    n = min(n, len(entry.test[0]))
    row = {"name": entry.name, "kind": entry.kind, "seed": seed, "n": n, "protocol": protocol}
    try:
        evaluation = case(entry, zoo, seed, n, protocol, Judgement())
        results = evaluation.execute(folder / f"{entry.name}-{seed}", evaluation.plan())
    except UserError as refused:
        return row | {"refused": str(refused)}
    survivors = left(evaluation, results, folder / f"{entry.name}-{seed}")
    more = truth(entry, zoo, seed, evaluation, survivors)
    stages = {stage.name: stage.robust_acc for stage in results.stages}
    return row | {
        "clean": results.clean.acc,
        "robust": results.robust.acc,
        "ci95": list(results.robust.ci95 or ()),
        "true": (len(survivors) - more) / n,
        "stages": stages,
        "seconds": time.monotonic() - began,
        **judged(results),
    }


def left(evaluation: Evaluation, results: Results, folder: Path) -> Tensor:
    """Ids of the samples that withstood."""
    samples = read_samples(folder)
    names = ("clean", *(stage.name for stage in results.stages))
    gone = [samples[name] for name in names if name in samples]
    broken = np.concatenate([records.sample[records.alone] for records in gone])
    ids = evaluation.job.samples.ids
    return ids[~torch.isin(ids, torch.from_numpy(broken))]


def judged(results: Results) -> dict[str, Any]:
    """The verdict of an evaluation, as a row has it."""
    shown = [
        {key: one.get(key) for key in ("id", "class", "value", "triggered", "interval")}
        for one in results.verdict.get("indicators", ())
    ]
    return {"label": results.verdict.get("label"), "indicators": shown}


def truth(entry: Entry, zoo: Zoo, seed: int, evaluation: Evaluation, survivors: Tensor) -> int:
    """How many survivors fall to images that break what is under a disguise, or a twin."""
    if not len(survivors) or entry.kind == "honest":
        return 0
    job = evaluation.job
    clean = job.samples.fetch(survivors)
    sources: list[nn.Module] = [zoo.net(entry.net, seed)]
    twin = None if entry.traits.stochastic else straight_through(job.model, job.samples, THREAT)
    sources += [] if twin is None else [twin.model]
    broken = torch.zeros(len(survivors), dtype=torch.bool)
    for source in sources:
        for search in (APGD(loss_name="margin"), APGD(50, loss_name="margin_targeted", targets=3)):
            if broken.all():
                break
            x, y = clean.x[~broken], clean.y[~broken]
            images = advbench.attack(source, x, y, THREAT, search, traits=entry.traits)
            with torch.no_grad():
                answers = [job.model(images).argmax(1) != y for _ in range(10)]
            broken[~broken] = torch.stack(answers).float().mean(0) > 0.5
    return int(broken.sum())


def judge(entry: Entry, zoo: Zoo, row: dict[str, Any], folder: Path, effort: str) -> dict[str, Any]:
    """The row with the verdict of its records."""
    began = time.monotonic()
    again = Judgement(effort=effort, only=True)
    evaluation = case(entry, zoo, row["seed"], row["n"], row["protocol"], again)
    results = evaluation.execute(folder / f"{entry.name}-{row['seed']}")
    return row | judged(results) | {"judged_in": time.monotonic() - began}


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("rows/*.json")):
        yield read_json(path)


def key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["name"], row["seed"], row["protocol"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the table -----------------------------------------------------------------------------------


def is_too_high(row: dict[str, Any]) -> bool:
    """Whether the reported number is above the truth by more than its interval."""
    return "refused" not in row and row["ci95"][0] > row["true"]


def outcome(row: dict[str, Any]) -> str:
    return "refused" if "refused" in row else row["label"] or "none"


def share(hits: int, of: int) -> str:
    low, high = clopper_pearson(hits, of)
    return f"{hits} of {of} [{100 * low:.0f}, {100 * high:.0f}] %"


def summary(known: Sequence[dict[str, Any]]) -> list[str]:
    """Sensitivity and false alarms, with exact intervals."""
    lying = [r for r in known if "refused" in r or (r["kind"] != "honest" and is_too_high(r))]
    right = [r for r in known if r["kind"] == "hides_but_right" and "refused" not in r]
    right = [r for r in right if not is_too_high(r)]
    honest = [r for r in known if r["kind"] == "honest"]
    caught = sum(outcome(r) in ("refused", "unreliable") for r in lying)
    warned = sum(outcome(r) in ("refused", "unreliable", "inconclusive") for r in lying)
    false, unsure = (sum(outcome(r) == o for r in honest) for o in ("unreliable", "inconclusive"))
    return [
        f"| liars whose number is too high: refused or unreliable | {share(caught, len(lying))} |",
        f"| the same, or inconclusive | {share(warned, len(lying))} |",
        f"| honest models: unreliable | {share(false, len(honest))} |",
        f"| honest models: inconclusive | {share(unsure, len(honest))} |",
        "| hide a gradient, number right: unreliable | "
        f"{share(sum(outcome(r) == 'unreliable' for r in right), len(right))} |",
    ]


def table(known: Sequence[dict[str, Any]]) -> str:
    text: list[str] = []
    for half, chosen in (
        ("Calibration", [r for r in known if r["seed"] < CALIBRATION]),
        ("Held out", [r for r in known if r["seed"] >= CALIBRATION]),
    ):
        if chosen:
            seeds = ", ".join(map(str, sorted({r["seed"] for r in chosen})))
            text += [f"### {half}: seeds {seeds}", "", "| | |", "|---|---|", *summary(chosen), ""]
    text += [
        "### Every model",
        "",
        "| model | kind | seed | protocol, n | clean | reported | true | verdict | triggered |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(known, key=lambda r: (r["kind"], r["name"], r["seed"])):
        who = f"| {r['name']} | {r['kind'].replace('_', ' ')} | {r['seed']} "
        who += f"| {r['protocol']}, {r['n']} |"
        if "refused" in r:
            text.append(f"{who} | | | refused | {r['refused'][:60]}... |")
            continue
        ids = ", ".join(f"{i['id']} ({i['class']})" for i in r["indicators"] if i["triggered"])
        numbers = " | ".join(f"{100 * r[key]:.0f}" for key in ("clean", "robust", "true"))
        text.append(f"{who} {numbers} | {outcome(r)} | {ids} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("attack", "judge", "table"))
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench-verdict"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data/verdict.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--names", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--effort", default="cheap")
    parser.add_argument("--protocol", default="autoattack", choices=list(PROTOCOLS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo(place(args.folder / "nets"))
    if args.what == "attack":
        for seed in args.seeds:
            for name in args.names:
                path = args.folder / "rows" / f"{name}-{seed}.json"
                if not path.exists():
                    row = attack(ENTRIES[name], zoo, seed, args.n, args.folder, args.protocol)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, row)
                    print(json.dumps({k: v for k, v in row.items() if k != "stages"}), flush=True)
    elif args.what == "judge":
        known = {} if not args.out.exists() else {key(row): row for row in lines(args.out)}
        for row in rows(args.folder):
            if row["name"] in args.names and row["seed"] in args.seeds:
                if "refused" not in row:
                    row = judge(ENTRIES[row["name"]], zoo, row, args.folder, args.effort)
                known[key(row)] = row
                text = "".join(json.dumps(known[one]) + "\n" for one in sorted(known))
                write_text(args.out, text)
                print(row["name"], row["seed"], outcome(row), flush=True)
    else:
        print(table(lines(args.out)))


if __name__ == "__main__":
    main()
