#!/usr/bin/env python
"""How much memory a long evaluation and a large file take.

    python scripts/bench/memory.py --out benchmarks/data/memory.jsonl

``long``: AutoAttack on many images of a small net; the resident memory of the process is read every
half second, and its mean is taken in each quarter of the time. ``large``: n = 100 of an archive
with 50,000 float32 images of CIFAR-10's size, 614 MB; the highest resident memory, and that of the
same command on an archive of 100 such images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shared import append, machine

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)).eval()
"""
MIB = 2**10
"""KiB."""


def resident(command: Sequence[str], folder: Path) -> tuple[list[float], float]:
    """Resident memory of a command, MiB: each half second, and at most."""
    process = subprocess.Popen(
        [sys.executable, "-m", "advbench", *command], cwd=folder, stdout=subprocess.DEVNULL
    )
    path, samples, most = Path(f"/proc/{process.pid}/status"), [], 0.0
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        if "VmRSS" in fields:
            samples.append(int(fields["VmRSS"].split()[0]) / MIB)
            most = int(fields["VmHWM"].split()[0]) / MIB
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the command failed: {' '.join(command)}")
    return samples, most


def long(work: Path, n: int) -> dict[str, object]:
    """A training of a minute, and AutoAttack on n of its test images."""
    if not (work / "trained" / "summary.json").exists():
        resident(["train", "recipe=pgd_at", "hydra.run.dir=trained", "seed=0"], work)
    words = ["eval", "run=trained", f"n={n}", "verdict=none", f"hydra.run.dir=long-{n}"]
    begin = time.perf_counter()
    samples, most = resident(words, work)
    seconds = time.perf_counter() - begin
    begun = samples[int(20 / 0.5) :]  # after the imports
    quarters = [round(float(np.mean(part))) for part in np.array_split(begun, 4)]
    return {"what": "long", "n": n, "seconds": round(seconds), "quarters": quarters, "most": most}


def large(work: Path) -> dict[str, object]:
    """n = 100 of a large archive, and of a small one."""
    (work / "model.py").write_text(MODEL)
    peaks = []
    for number in (100, 50_000):
        path = work / f"{number}.npz"
        chance = np.random.default_rng(0)
        x, y = chance.random((number, 32, 32, 3), np.float32), chance.integers(0, 10, number)
        np.savez(path, x_test=x, y_test=y)
        del x
        words = ["eval", "model=model.py:build", "data=npz", f"data.path={path.name}", "n=100"]
        words += ["data.num_classes=10", "threat=linf_8", "protocol=pgd", "protocol.steps=5"]
        _, most = resident([*words, f"hydra.run.dir=large-{number}"], work)
        peaks.append(round(most))
        size = round(path.stat().st_size / 2**20)
        path.unlink()
    return {"what": "large", "file": size, "most": peaks[1], "most_of_100_images": peaks[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=300, help="images of the long evaluation")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench/memory"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.absolute()
    for row in (large(work), long(work, given.n)):
        print(row, flush=True)
        append(given.out, {**row, "machine": machine("cpu")})


if __name__ == "__main__":
    main()
