"""Random lists of overrides, as tired people type them; and what becomes of a command with them.

    python tests/fuzzing.py train 1000 --seed 0

prints the counts, and exits with 1 if one of them was no clean answer.
Nothing is trained or attacked: each command ends with exit code 0 where its work would begin.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from omegaconf import OmegaConf

from advbench import config
from advbench.cli.main import main
from advbench.config.words import setting
from advbench.evaluation.evaluation import Evaluation
from advbench.training.trainer import Trainer

SECONDS = 60
"""A command that takes longer hangs."""

LEFT_OUT = ("devices", "num_nodes", "accelerator", "strategy", "compile", "download", "workers")
"""Keys that start other processes, compile or ask the network."""

USUAL = {
    "train": {"data": "digits", "backbone": "convnet", "defense": "none", "recipe": "pgd_at",
              "optimizer": "sgd", "threat": "linf_015", "trainer": "default"},
    "eval": {"data": "run", "defense": "run", "threat": "run", "protocol": "autoattack",
             "trainer": "evaluation"},
}  # fmt: skip
"""The options that a subcommand takes where nothing is said."""

VALUES = (
    "0", "1", "-1", "2", "0.5", "-0.1", "1e-3", "1e9", "1000000000", "99999999999999999999", "inf",
    "nan", "null", "true", "false", "''", "x", "ä", "8/255", "1/0", "[]", "[1]", "[1,2,x]", "{}",
    "{a:1}", "{a:{b:[1]}}", "${nope}", "${seed}", "${oc.env:NOPE}", "???", "all", "a b", "'a,b'",
    "1,2", "/dev/null", "..", "~", "m.py:build", "tiny.npz", "good", "*", "\\", "0x10", "1_000",
)  # fmt: skip
JUNK = (
    "=", "==", "=1", "seed==1", "seed=", "seed", "+seed=1", "++seed=2", "~seed", "~data", "a.b.c=1",
    "seed=1=2", "data.=1", ".data=1", "data..path=1", "[", "seed=[", "seed={", "seed='", 'seed="',
    "--nope", "-x", "--cfg", "-m", "--multirun", "good", "tiny.npz", "/", "@", "data@x=digits",
    "hydra.run.dir=here", "hydra.run.dir=tiny.npz", "hydra.nope=1", "é=1", "hydra/launcher=nope",
    "plugins=[no.py]", "plugins=no.py", "+plugins=[1]", "defense.members=[hpm]", "experiment=nope",
    "traits.gradient=exact", "budget=0", "budget=-1s", "transfer=[good]", "adversarial=maybe",
    "_target_=os.system", "data._target_=os.system", "+x={_target_: os.system}", "defaults=[]",
)  # fmt: skip


def keys(verb: str) -> dict[str, Any]:
    """All keys of a subcommand's shipped configs, with a value that each has somewhere."""
    found = config.plain(OmegaConf.structured(config.SCHEMAS[verb]))
    for group in config.GROUPS:
        if group in found:
            nodes = [config.shipped(group, name) for name in config.options(group)]
            found |= {f"{group}.{k}": v for node in nodes for k, v in config.plain(node).items()}
    return {key: found[key] for key in sorted(found) if key.rpartition(".")[2] not in LEFT_OUT}


def careful(chance: random.Random, verb: str) -> list[str]:
    """The arguments of a command whose every key is known where it stands; few values are odd."""
    made = [verb, *(["run=good"] if verb == "eval" else [])]
    groups = list(USUAL[verb])
    changed = chance.sample(groups, chance.choice([0, 0, 1, 1, 2]))
    for group in groups:
        name = USUAL[verb][group]
        if group in changed:
            name = chance.choice([name, *config.options(group)])
            made.append(f"{group}={name}")
        if name == "run":
            continue
        for key, value in config.plain(config.shipped(group, name)).items():
            if key not in ("_target_", *LEFT_OUT) and chance.random() < 0.08:
                odd = chance.random() < 0.15
                said = chance.choice(VALUES) if odd else setting("", near(chance, value))[1:]
                made.append(f"{group}.{key}={said}")
    if chance.random() < 0.3:
        made.append(f"seed={chance.choice([0, 7, 2**40])}")
    return made


def near(chance: random.Random, value: Any) -> Any:
    """A value of the same type, that is often allowed too."""
    if isinstance(value, bool):
        return chance.random() < 0.5
    if isinstance(value, int | float):
        return chance.choice([value, 2 * value, type(value)(value / 2), value + 1])
    return value


def words(chance: random.Random, verb: str, known: dict[str, Any]) -> list[str]:
    """The arguments of one command."""
    if chance.random() < 0.5:
        return careful(chance, verb)
    made = [verb, *(["run=good"] if verb == "eval" and chance.random() < 0.7 else [])]
    for _ in range(chance.randint(1, 3)):
        kind = chance.random()
        if kind < 0.5:
            key = chance.choice(list(known))
            value = setting("", known[key])[1:] if chance.random() < 0.5 else chance.choice(VALUES)
            if chance.random() < 0.15:  # a slip
                at = chance.randrange(len(key))
                key = key[:at] + chance.choice(["", "x", key[at] * 2]) + key[at + 1 :]
            sign = chance.choice([*[""] * 9, "+", "++", "~"])
            made.append(f"{sign}{key}={value}")
        elif kind < 0.85:
            group = chance.choice([*config.GROUPS, "experiment"])
            name = chance.choice([*config.options(group), "nope", "null", ""])
            made.append(f"{group}={chance.choice([*[name] * 6, name.upper(), name[1:]])}")
        else:
            made.append(chance.choice(JUNK))
    return made


class Began(Exception):
    """The work of a command would begin here."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Raise TimeoutError for what takes too long."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(arguments: list[str]) -> tuple[str, str]:
    """What a command came to, and what it said: ok, refused, or anything else that is a fault."""
    out, err = io.StringIO(), io.StringIO()

    def begin(*_: Any, **__: Any) -> Any:
        raise Began

    place, environment = Path.cwd(), dict(os.environ)
    try:
        with (
            patch.object(Trainer, "fit", begin),
            patch.object(Evaluation, "execute", begin),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            in_time(),
        ):
            status = main(arguments)
    except Began:
        return "ok", ""
    except BaseException as problem:
        return f"raised {type(problem).__name__}", str(problem)
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)
    said = err.getvalue()
    if status == 0 or (status == 1 and "Began" in said):  # of a sweep
        return "ok", said
    lines = [line for line in said.splitlines() if line]
    clean = status == 2 and lines and all("advbench: " in line for line in lines)
    one = clean and (len(lines) == 1 or any(word in ("-m", "--multirun") for word in arguments))
    return ("refused" if one else f"exit {status} with {len(lines)} lines"), said


def playground() -> None:
    """Fill the current directory with data and a finished run, to which the overrides refer."""
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    labels = np.arange(64) % 10
    np.savez("tiny.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    small = ["trainer.epochs=1", "recipe.steps=1", "trainer.val_steps=1", "-q"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "hydra.run.dir=good", *small]) == 0


def run(verb: str, count: int, seed: int) -> tuple[Counter[str], list[tuple[list[str], str, str]]]:
    """How many commands came to what, and each that gave no clean answer."""
    chance, known = random.Random(f"{verb} {seed}"), keys(verb)
    counts: Counter[str] = Counter()
    faults = []
    for _ in range(count):
        arguments = words(chance, verb, known)
        came, said = answer(arguments)
        counts[came] += 1
        if came not in ("ok", "refused"):
            faults.append((arguments, came, said))
    return counts, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["train", "eval"])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        playground()
        counts, faults = run(given.verb, given.count, given.seed)
        os.chdir("/")
    for arguments, came, said in faults:
        print(arguments, came, said[-600:], sep="\n  ")
    print(f"{given.verb}, seed {given.seed}: {dict(counts)} in {time.monotonic() - began:.0f} s")
    sys.exit(bool(faults))
