#!/usr/bin/env python
"""Adversarial training of a ResNet-18 (PGD-10): time, precisions, compile modes, determinism.

    python scripts/gpu/train.py --data FILE.npz [--tiny]

full            thirty epochs in bf16-mixed: time, and the model that the other scripts attack
one-*           one epoch in each precision and compile mode
deterministic   twice one epoch with trainer.deterministic=true: the same bytes?
resume          an epoch killed in its middle and resumed against one that was not: the same bytes?
"""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sitting import Sitting, advbench, parser, settings

MODES = {
    "float32": "trainer.precision=32-true",
    "tf32": "trainer.precision=tf32",
    "bf16": "trainer.precision=bf16-mixed",
    "bf16-compile": "trainer.precision=bf16-mixed trainer.compile=default",
    "bf16-graphs": "trainer.precision=bf16-mixed trainer.compile=reduce-overhead",
}

FULL = ("trainer.epochs=30", "trainer.precision=bf16-mixed")
QUICK = ("trainer.epochs=2", "recipe.steps=2")


def train(folder: Path, words: list[str]) -> dict[str, Any]:
    """One training: seconds of the whole command and of each epoch, accuracies at its end."""
    seconds = advbench("train", *words, f"hydra.run.dir={folder}")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    numbers = {key: float(last[key]) for key in last if key.startswith("val")}
    return {"seconds": seconds, "epochs": summary.get("epochs"), "last": numbers}


def digest(folder: Path) -> str:
    """Of the weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def deterministic(folder: Path, words: list[str]) -> Mapping[str, Any]:
    words = [*words, "trainer.deterministic=true"]
    hashes = []
    for turn in ("first", "second"):
        train(folder / f"deterministic-{turn}", words)
        hashes.append(digest(folder / f"deterministic-{turn}"))
    return {"first": hashes[0], "second": hashes[1], "same": hashes[0] == hashes[1]}


def resume(folder: Path, words: list[str], patience: float) -> Mapping[str, Any]:
    words = [*words, "trainer.deterministic=true", "trainer.save_every=1"]
    train(folder / "whole", words)
    killed = folder / "killed"
    command = [sys.executable, "-m", "advbench", "train", *words, f"hydra.run.dir={killed}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "epoch.pt").exists():
        time.sleep(patience)
    caught = process.poll() is None
    process.kill()
    process.wait()
    train(killed, words)
    same = digest(killed) == digest(folder / "whole")
    return {"killed_inside": caught, "same": same}


def main() -> int:
    given = parser(__doc__).parse_args()
    sitting, words = Sitting("train", given), settings(given)
    folder = sitting.folder
    full = [*words, *(QUICK if given.tiny else FULL)]
    sitting.cases["full"] = lambda: train(folder / "full", full)
    one = [*words, "trainer.epochs=1", *(["recipe.steps=1"] if given.tiny else [])]
    for name, mode in list(MODES.items())[: 1 if given.tiny else None]:
        sitting.cases[f"one-{name}"] = partial(train, folder / f"one-{name}", [*one, *mode.split()])
    sitting.cases["deterministic"] = partial(deterministic, folder, one)
    sitting.cases["resume"] = partial(resume, folder, [*one, "trainer.epochs=2"], 0.05)
    return sitting.run()


if __name__ == "__main__":
    raise SystemExit(main())
