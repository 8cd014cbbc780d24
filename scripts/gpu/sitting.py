"""A sitting at a machine: cases that run one after the other, are recorded, and never repeat.

Each script of this folder is a list of cases. A case is a function that returns a dict of plain
values; its record is a line of JSON in ``OUT/SCRIPT.jsonl``. A case that has a record is skipped,
so a script that was stopped, by its own limit or by another hand, is run again and goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from advbench.files import write_text

Case = Callable[[], Mapping[str, Any]]
LIMIT = 540.0  # seconds, after which no case is started


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the scripts share."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="records and runs")
    options.add_argument("--tiny", action="store_true", help="digits, on any device, in a minute")
    options.add_argument("--only", nargs="+", help="names of cases; default: all")
    options.add_argument("--limit", type=float, default=LIMIT, help="seconds; then no new case")
    options.add_argument("--data", type=Path, help="arrays such as images.py makes")
    return options


@dataclass
class Sitting:
    """The cases of a script. Prints each record, and a table last."""

    name: str
    """Of the script, and of its file of records."""
    given: argparse.Namespace
    """Its options."""
    cases: dict[str, Case] = field(default_factory=dict)
    """By name, in order of running."""

    @property
    def path(self) -> Path:
        """Of the records."""
        return self.given.out / f"{self.name}{'-tiny' if self.given.tiny else ''}.jsonl"

    @property
    def folder(self) -> Path:
        """Of the runs."""
        return self.given.out / ("tiny" if self.given.tiny else "runs")

    def records(self) -> dict[str, dict[str, Any]]:
        """What is recorded, by case; a failure does not count as a record."""
        if not self.path.exists():
            return {}
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return {line["case"]: line for line in lines}

    def run(self) -> int:
        """Run what has no record. Returns the exit code: 1 if a case failed or is left."""
        begin, failed = time.perf_counter(), []
        wanted = self.given.only or list(self.cases)
        for name in wanted:
            if name in self.records():
                continue
            if time.perf_counter() - begin > self.given.limit:
                break
            print(f"--- {name}", flush=True)
            started = time.perf_counter()
            try:
                values = dict(self.cases[name]())
            except Exception:  # the others are worth having all the same
                failed.append(name)
                traceback.print_exc()
                continue
            seconds = round(time.perf_counter() - started, 2)
            record = {"case": name, **values, "case_seconds": seconds, **where()}
            before = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, before + json.dumps(record) + "\n")
            print(json.dumps(values), flush=True)
        self.show()
        left = [name for name in wanted if name not in self.records() and name not in failed]
        for what, names in (("failed", failed), ("left for the next call", left)):
            if names:
                print(f"{what}: {', '.join(names)}")
        return int(bool(failed or left))

    def show(self) -> None:
        """A table for each set of columns among the records."""
        print(tables(list(self.records().values())))


def tables(records: list[dict[str, Any]]) -> str:
    """Markdown tables: cases with the same columns share one."""
    hidden = {"case", *where()}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        columns = tuple(key for key in record if key not in hidden)
        groups.setdefault(columns, []).append(record)
    lines = []
    for columns, rows in groups.items():
        lines += ["", f"| case | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells = [str(row["case"]), *(_cell(row[column]) for column in columns)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
    return str(value)


def where() -> dict[str, Any]:
    """The machine, the versions and the date."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "card": card,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def advbench(*words: str) -> float:
    """Run a command of advbench; returns its seconds. Raises CalledProcessError if it fails."""
    begin = time.perf_counter()
    print("advbench", *words, flush=True)
    command = [sys.executable, "-m", "advbench", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def results(folder: Path) -> dict[str, Any]:
    """What an evaluation found, in a line."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    n = found["data"]["n"]
    return {
        "n": n,
        "clean": round(n * found["clean"]["acc"]),
        "robust": round(n * found["robust"]["acc"]),
        "seconds": found["provenance"]["seconds"],
        "stages": {stage["name"]: stage["seconds"] for stage in found["stages"]},
    }


def settings(given: argparse.Namespace) -> list[str]:
    """The data, the net and the threat of all trainings: ResNet-18 on CIFAR-10, or the smallest."""
    if given.tiny:
        return ["data=digits", "backbone=convnet", "threat=linf_015"]
    if given.data is None:
        raise SystemExit("give --data FILE.npz, which images.py unpacks, or --tiny")
    return ["data=npz", f"data.path={given.data}", "data.augment.crop=4", "data.augment.flip=true",
            "backbone=resnet18", "threat=linf_8"]  # fmt: skip


def device() -> torch.device:
    """The card, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
