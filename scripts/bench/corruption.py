"""One random bit at a time is flipped in the files of runs: is it noticed, harmless or silent?

    python scripts/bench/corruption.py --flips 200 --out benchmarks/data/corruption.jsonl

Four runs on a few digits: a training and an evaluation, each finished and interrupted. A bit of one
of their files is flipped in a copy; then the command is repeated, the run listed, its model loaded
and its records read. Noticed: one line with exit code 2, or a note. Harmless: all numbers are those
of the run as it was. Silent: other numbers without a word, which must not happen. Crash: another
exception than the one line, which must not happen either.
Files of a run that stand in --out with as many flips are left out, so that a later sitting goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from omegaconf import DictConfig, open_dict
from shared import append

from advbench import config
from advbench.cli import list_runs
from advbench.console import Screen
from advbench.errors import UserError
from advbench.evaluation.store import read_images, read_samples
from advbench.experiments import models
from advbench.experiments.evaluate import evaluate
from advbench.experiments.home import Home
from advbench.experiments.train import train
from advbench.files import file_sha256
from advbench.report.validation import Trained
from advbench.runs import directory
from advbench.training.checkpoint import Checkpoints
from advbench.training.metrics import read_table
from advbench.training.summary import Summary

CASES = {"training, finished": "train", "training, interrupted": "train-cut",
         "evaluation, finished": "eval", "evaluation, interrupted": "eval-cut"}  # fmt: skip
"""The directory of each run."""
LATE = 45
"""Queries after which the time of the interrupted evaluation is up."""
OUTCOMES = ("noticed", "harmless", "silent", "crash")
TRAIN = ["data=npz", "data.path=digits.npz", "data.val=20", "trainer.epochs=3", "recipe.steps=1",
         "trainer.batch_size=32", "trainer.val_steps=1"]  # fmt: skip
EVAL = ["protocol=pgd", "protocol.steps=20", "protocol.restarts=3", "n=16", "trainer.batch_size=8"]
TIMES = ("seconds", "provenance", "files", "checksum")
"""Keys of what differs between equal runs."""
WORDS = ("damaged", "is missing", "checksums", "edited", "changed", "interrupted")
"""Of lines that say that something is not as it was."""


class Lines(Screen):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


Look = Callable[[Path], tuple[dict[str, Any], list[str]]]


@dataclass(frozen=True)
class Case:
    """A run, and what is seen of it."""

    name: str
    """For people."""
    folder: Path
    """The run as it was."""
    look: Look
    """Gets a copy of the run; what it shows, and what it says."""

    @property
    def files(self) -> list[str]:
        """The files that numbers may rest on."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        left_out = (".lock", "log.txt", "curves.png")
        return [str(p.relative_to(self.folder)) for p in found if p.name not in left_out]


def composed(subcommand: str, words: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """A config and the names of its options, as the command line would make them."""
    from hydra import compose, initialize_config_module

    config.register()
    with initialize_config_module("advbench.configs", version_base="1.3"):
        cfg = compose(subcommand, overrides=words, return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def run(subcommand: str, words: list[str], folder: Path) -> list[str]:
    """One command in this process, without Hydra's own work. Returns what it said."""
    cfg, choices = composed(subcommand, words)
    return repeat(subcommand, cfg, choices, folder)


def repeat(subcommand: str, cfg: DictConfig, choices: Mapping[str, str], folder: Path) -> list[str]:
    """The same with a config that exists."""
    work = train if subcommand == "train" else evaluate
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        screen = Lines()
        work(cfg.copy(), choices, Home(folder, exact=True), (), screen)
    return screen.said


def make(work: Path, seed: int = 0) -> None:
    """The runs of a seed, in a directory inside the current one."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    np.savez("digits.npz", x_train=images[:180], y_train=labels[:180],
             x_test=images[180:240], y_test=labels[180:240])  # fmt: skip
    done, cut, own = work / "train", work / "train-cut", f"seed={seed}"
    run("train", [*TRAIN, own], done)
    save_inside, calls = Checkpoints.save_inside, []

    def kill(self: Checkpoints, state: Mapping[str, Any]) -> None:
        save_inside(self, state)
        calls.append(state["position"]["epoch"])
        if calls[-1] == 2:
            raise KeyboardInterrupt

    with patch.object(Checkpoints, "save_inside", kill), contextlib.suppress(KeyboardInterrupt):
        run("train", [*TRAIN, own, "trainer.save_every=0"], cut)
    attack = [*EVAL, own, f"run={done}"]
    run("eval", attack, work / "eval")
    asked = count()
    with patch("advbench.evaluation.evaluation.Deadline", lambda _: lambda: next(asked) > LATE):
        run("eval", attack, work / "eval-cut")


def cases_in(work: Path) -> list[Case]:
    """The four runs that ``make`` left in a directory, and what is seen of each."""
    looks = {"training": training(), "evaluation": evaluation()}
    return [Case(n, work / folder, looks[n.partition(",")[0]]) for n, folder in CASES.items()]


def training() -> Look:
    """What is seen of a training: it is listed, resumed or repeated, and its model is loaded."""
    cfg, choices = composed("train", ["resume=x"])
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def look(folder: Path) -> tuple[dict[str, Any], list[str]]:
        listed, said = look_at(folder)
        cfg.resume = str(folder)
        said += repeat("train", cfg, choices, folder)
        run = directory.find(folder)
        model, _ = models.from_run(run)
        with torch.no_grad():
            logits = model(x).tolist()
        summary, rows = Summary.load(folder / "summary.json"), read_table(folder / "metrics.csv")
        trained = Trained.read(folder)
        return plain({
            "listed": listed, "logits": logits, "val": summary.val, "last": summary.last,
            "rows": rows, "trained": (trained.clean, trained.robust, trained.n),
            "weights": [file_sha256(folder / f"{n}.safetensors") for n in ("model", "last")],
        }), said  # fmt: skip

    return look


def evaluation() -> Look:
    """What is seen of an evaluation: it is listed, resumed or repeated, its records are read."""
    cfg, choices = composed("eval", ["resume=x"])

    def look(folder: Path) -> tuple[dict[str, Any], list[str]]:
        listed, said = look_at(folder)
        cfg.resume = str(folder)
        said += repeat("eval", cfg, choices, folder)
        results = json.loads((folder / "results.json").read_text())
        records = {
            stage: {name: column.tolist() for name, column in vars(part).items()}
            for stage, part in read_samples(folder).items()
        }
        images = read_images(folder)
        return plain({
            "listed": listed, "records": records,
            "results": results,
            "images": None if images is None else (images.ids.tolist(), images.x.tobytes().hex()),
        }), said  # fmt: skip

    return look


def look_at(folder: Path) -> tuple[str, list[str]]:
    """The number that a list of runs shows of one, and what it says of its state."""
    found = list_runs.look(folder)
    return ("", ["missing"]) if found is None else (found.robust, [f"{found.state} {found.where}"])


def plain(value: Any) -> Any:
    """A value without the times in it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return repr(value) if isinstance(value, float) else value


def outcome(case: Case, change: Callable[[Path], None], copy: Path, whole: Any) -> tuple[str, str]:
    """What comes of a change of a copy: one of OUTCOMES, and what was said.

    whole: what ``case.look`` shows of the run as it was.
    """
    change(fresh(case, copy))
    try:
        shown, said = case.look(copy)
    except UserError as problem:
        text = str(problem)
        return ("noticed" if "\n" not in text else "crash"), text
    except Exception as problem:
        return "crash", f"{type(problem).__name__}: {problem}"
    if shown["listed"] == "-":  # no number is no wrong one
        shown["listed"] = whole[0]["listed"]
    if shown == whole[0]:
        return "harmless", ""
    new = [line for line in said if line not in whole[1] and any(word in line for word in WORDS)]
    return ("noticed", "; ".join(new)) if new else ("silent", differing(shown, whole[0]))


def differing(ours: Any, theirs: Any, name: str = "") -> str:
    """The first place where two values differ."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                return differing(ours.get(key), theirs.get(key), f"{name}/{key}")
    return f"{name}: {ours!r:.60} and {theirs!r:.60}"


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def flips(
    case: Case, names: Sequence[str], copy: Path, number: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Flip bits in files of a run. Returns the counts, a row for each file."""
    whole = case.look(fresh(case, copy))
    for name in names:
        chance, found = random.Random(f"{seed}/{case.name}/{name}"), Counter()
        for _ in range(number):
            kind, why = outcome(case, lambda at: flip(at / name, chance), copy, whole)  # noqa: B023
            found[kind] += 1
            if kind in ("silent", "crash"):
                print(f"{kind}: {case.name}, {name}: {why}", flush=True)
        yield {"run": case.name, "file": name, **{kind: found[kind] for kind in OUTCOMES}}


def fresh(case: Case, copy: Path) -> Path:
    """A copy of a run as it was."""
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(case.folder, copy))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=200, help="of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the bits")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench/corruption"))
    parser.add_argument("--out", type=Path, help="a file that gets a line for each file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = None if given.out is None else given.out.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)
    shutil.rmtree("runs", ignore_errors=True)
    make(Path("runs"))
    done = set()
    if out is not None and out.exists():
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        done = {
            (row["run"], row["file"])
            for row in rows
            if sum(row[kind] for kind in OUTCOMES) == given.flips
        }
    for case in cases_in(Path("runs")):
        left = [name for name in case.files if (case.name, name) not in done]
        if not case.name.startswith(given.only) or not left:
            continue
        for row in flips(case, left, Path(f"copy-{os.getpid()}"), given.flips, given.seed):
            print(json.dumps(row), flush=True)
            if out is not None:
                append(out, row)


if __name__ == "__main__":
    main()
