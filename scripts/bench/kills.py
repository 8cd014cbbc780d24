"""Commands that are killed at random moments and repeated, against the same commands left alone.

    python scripts/bench/kills.py --kills 50 --out benchmarks/data/kills.jsonl

For each case the command runs once to its end. Then it is killed at random moments and repeated
until it ends, in a new directory each time it has ended, until there were enough kills. The files
that hold what was computed have to be the same, byte for byte. Processes are forked from one that
has imported everything, so that most kills meet the work and not its beginning.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
QUICK = ["trainer.epochs=2", "trainer.save_every=0.2"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["advbench.cli.hydra_app", "advbench.experiments.evaluate", "advbench.experiments.train"]
)


@dataclass(frozen=True)
class Case:
    """A command."""

    name: str
    """For people."""
    words: Sequence[str]
    """Of the command line, less the directory."""
    files: Sequence[str]
    """That have to be the same in the end."""


def cases(work: Path) -> list[Case]:
    """The commands, and before them the runs that they attack."""
    weights, records = ["model.safetensors", "last.safetensors"], ["samples.parquet"]
    for name in ("hpm", "mfdv_snn"):
        folder = work / name
        if not (folder / "summary.json").exists():
            # One epoch teaches an SNN nothing: no sample would be left to attack.
            epochs = ["trainer.epochs=1"] if name == "hpm" else []
            finish(["train", f"experiment={name}_quick", *epochs], folder)
    plain = work / "plain"
    if not (plain / "summary.json").exists():
        finish(["train", *QUICK], plain)
    msa = ["eval", "protocol=msa", "protocol.square=200", "protocol.draws=4", "n=40"]
    return [
        Case("train", ["train", *QUICK, "recipe.steps=10"], weights),
        Case("autoattack", ["eval", f"run={plain}", "protocol=autoattack", "n=40"], records),
        Case("msa, batch-dependent (HPM)", [*msa, f"run={work / 'hpm'}"], records),
        Case("msa, stochastic (MFDV-SNN)", [*msa, f"run={work / 'mfdv_snn'}"], records),
    ]


def command(words: Sequence[str], folder: Path) -> None:
    """What a process does: one command, without a word."""
    from advbench.cli.main import main

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{folder}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.exit(main([*words, f"hydra.run.dir={folder}"]))


def start(words: Sequence[str], folder: Path) -> BaseProcess:
    process = CONTEXT.Process(target=command, args=(list(words), folder))
    process.start()
    return process


def finish(words: Sequence[str], folder: Path) -> float:
    """Run a command to its end. Returns the seconds that it took."""
    begin = time.perf_counter()
    process = start(words, folder)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {process.exitcode}: see {folder}.stderr")
    return time.perf_counter() - begin


def content(case: Case, folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in case.files]


def measure(case: Case, work: Path, kills: int, chance: random.Random) -> dict[str, object]:
    """Kill and repeat a command. Returns what became of it."""
    home = work / "kills" / re.sub(r"\W+", "-", case.name)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    seconds = finish(case.words, home / "whole")
    wanted, killed, same = content(case, home / "whole"), 0, []
    while killed < kills or not same:
        folder = home / str(len(same))
        while True:
            process = start(case.words, folder)
            if killed < kills:
                process.join(chance.uniform(0.0, 0.6 * seconds))
                if process.is_alive():
                    number = chance.choice(SIGNALS) if chance.random() < 0.4 else signal.SIGKILL
                    assert process.pid is not None
                    os.kill(process.pid, number)
                    killed += 1
            process.join()
            if process.exitcode == 0:
                break
        same.append(content(case, folder) == wanted)
        shutil.rmtree(folder)
    return {
        "case": case.name, "kills": killed, "ends": len(same), "same_bytes": sum(same),
        "seconds_alone": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench/kills"))
    parser.add_argument("--out", type=Path, help="a file that gets a line for each case")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    for case in cases(work):
        if not case.name.startswith(given.only):
            continue
        row = measure(case, work, given.kills, random.Random(given.seed))
        print(json.dumps(row), flush=True)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
