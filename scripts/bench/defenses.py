#!/usr/bin/env python
"""Claim and truth of each defense side by side: trains small models, evaluates each five ways.

    python scripts/bench/defenses.py --folder DIR [--seeds 0 1 2] [--rows hpm sparta ...]
    python scripts/bench/defenses.py --folder DIR --table

Every training and evaluation is an ``advbench`` command with a directory of its own inside DIR, so
what is finished is not repeated: kill and restart at will. The columns:

    clean
    paper       the protocol of the defense's own paper (protocol=paper/NAME; PGD-20 without one)
    naive       AutoAttack standard by pyautoattack, called on the model as it is in batches of 100,
                whatever the model is; its own count of what is left
    msa         protocol=msa, which is the first part of
    adaptive    protocol=adaptive, with the plain and the robust model of the same seed as transfer

A number is robust accuracy on n images of the test split. --scale names the models and the data:
digits (embedded; minutes) or cifar10 (JPEG-75 images in a file, ResNet-20; hours).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from shared import advbench, cell, upstream

from advbench import config
from advbench.attacks.threat import Threat
from advbench.evaluation.samples import subset
from advbench.experiments.subject import TestData, candidate
from advbench.runs import directory
from advbench.runs.accuracy import Accuracy
from advbench.runs.results import Results

BATCH = 100


@dataclass(frozen=True)
class Row:
    """A model, how it is trained and what is put on it at evaluation.

    train: settings; ``{plain}`` and ``{robust}`` stand for the runs of those names.
    paper: the name of the paper's protocol.
    """

    train: str
    eval: str = ""
    paper: str = "protocol=pgd protocol.steps=20"
    of: str | None = None


def table_of(scale: str) -> dict[str, Row]:
    """The rows of a scale, by name; a row ``of`` another is evaluated on that one's run."""
    paper = "protocol=paper/"
    rows = {
        "plain": Row("recipe=standard"),
        "robust": Row("recipe=pgd_at"),
        "hpm": Row("experiment=hpm_quick init_from={robust}", paper=f"{paper}hpm"),
        "hpm-static": Row("", "defense.mix=1", f"{paper}hpm", of="hpm"),
        "hpm-context": Row("", "defense.inference=context", f"{paper}hpm", of="hpm"),
        "awnet": Row("experiment=awnet_quick", paper=f"{paper}awnet"),
        "awnet-mtard": Row(
            "defense=awnet recipe=mtard recipe.robust_teacher={robust} "
            "recipe.standard_teacher={plain}",
            paper=f"{paper}awnet",
        ),
        "sparta": Row("experiment=sparta_quick", paper=f"{paper}sparta"),
        "sparta-relu": Row("experiment=sparta_quick defense=sparta_relu", paper=f"{paper}sparta"),
        "silu": Row("recipe=pgd_at backbone.activation=silu", paper=f"{paper}sparta"),
        "jumprelu-plain": Row("", "defense=jumprelu", f"{paper}jumprelu", of="plain"),
        "jumprelu-robust": Row("", "defense=jumprelu", f"{paper}jumprelu", of="robust"),
        "jumprelu-big": Row("", "defense=jumprelu defense.jump=0.5", f"{paper}jumprelu", "robust"),
        "mfdv_snn": Row("experiment=mfdv_snn_quick", paper=f"{paper}mfdv_snn"),
        "mfdv_snn-1": Row(
            "experiment=mfdv_snn_quick defense.variance_weight=1", paper=f"{paper}mfdv_snn"
        ),
    }
    if scale == "digits":
        return rows
    common = " data=npz data.path={data} backbone=resnet20 threat=linf_8 trainer.epochs="
    long = f"{common}{{long}}"
    attacked = f"{common}{{epochs}} recipe.steps={{steps}}"
    cheap = ("plain", "mfdv_snn", "mfdv_snn-1")  # no attack in training
    return {
        name: row
        if row.of
        else replace(row, train=row.train + (long if name in cheap else attacked))
        for name, row in rows.items()
    }


def naive(run: Path, overrides: str, n: int, seed: int, out: Path) -> None:
    """AutoAttack as somebody would run it who knows nothing of the model."""
    if out.exists():
        return
    cfg = evaluation_config(run, overrides)
    trained = directory.find(run)
    splits = config.build(trained.config.data, "data")
    data = TestData(splits.info.name, splits.test, splits.info.input_shape, splits)
    subject = candidate(cfg, trained, (), data, torch.device("cpu"))
    model = subject.model.requires_grad_(False)
    threat: Threat = config.build(trained.config.threat, "threat")
    x, y = splits.test.fetch(subset(len(splits.test), n), torch.device("cpu"))
    suite = upstream(model, threat, seed, splits.info.num_classes)
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        _, label = suite.run_standard_evaluation(x, y, batch_size=BATCH)
    out.write_text(json.dumps({"robust": int((label == y).sum()), "n": n}))


def evaluation_config(run: Path, overrides: str) -> Any:
    """The config of ``advbench eval run=RUN OVERRIDES``, composed."""
    from hydra import compose, initialize_config_module

    config.register()
    with initialize_config_module("advbench.configs", version_base="1.3"):
        return compose("eval", [f"run={run}", *overrides.split()])


def measure(args: argparse.Namespace, seed: int) -> None:
    """Train and evaluate every row with one seed."""
    rows = table_of(args.scale)
    home = args.folder / args.scale
    runs = {name: home / f"{row.of or name}-s{seed}" for name, row in rows.items()}
    known = {**runs, "data": args.data, "epochs": args.epochs, "steps": args.steps}
    known["long"] = 3 * args.epochs
    wanted = args.rows or list(rows)
    for name in dict.fromkeys(["plain", "robust", *wanted]):
        owner = rows[rows[name].of or name]
        settings = [f"seed={seed}", *owner.train.format(**known).split()]
        advbench("train", settings, runs[name])
    for name in wanted:
        row = rows[name]
        transfer = [str(runs[twin]) for twin in ("plain", "robust") if runs[twin] != runs[name]]
        for column, settings in (
            ("paper", row.paper),
            (
                "adaptive",
                f"protocol=adaptive protocol.square={args.square} transfer=[{','.join(transfer)}]",
            ),
        ):
            advbench(
                "eval",
                f"run={runs[name]} n={args.n} seed={seed} {settings} {row.eval}".split(),
                home / f"{name}-s{seed}-{column}",
            )
        naive(runs[name], row.eval, args.n, seed, home / f"{name}-s{seed}-naive.json")


def _share(count: Mapping[str, int]) -> float:
    return count["robust"] / count["n"]


def lines(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is finished: a line per row and seed."""
    home, found = args.folder / args.scale, []
    for name in table_of(args.scale):
        for seed in args.seeds:
            paths = {c: home / f"{name}-s{seed}-{c}" for c in ("paper", "adaptive")}
            aside = home / f"{name}-s{seed}-naive.json"
            if not all((path / "results.json").exists() for path in paths.values()):
                continue
            results = {c: Results.load(path / "results.json") for c, path in paths.items()}
            n = results["adaptive"].data["n"]
            broken = {c: {s.name: s.broken for s in r.stages} for c, r in results.items()}
            found.append(
                {
                    "row": name,
                    "seed": seed,
                    "n": n,
                    "clean": results["adaptive"].clean.acc,
                    "msa": next(
                        s.robust_acc for s in results["adaptive"].stages if s.name == "square"
                    ),
                    **{column: result.robust.acc for column, result in results.items()},
                    "naive": _share(json.loads(aside.read_text())) if aside.exists() else None,
                    "measures": dict(results["adaptive"].measures),
                    "broken": broken,
                }
            )
    return found


def show(args: argparse.Namespace) -> None:
    """Means over seeds, with Wilson's interval for the images, which the seeds share."""
    columns = ("clean", "paper", "naive", "msa", "adaptive")
    print("| row | seeds | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    found = lines(args)
    for name in dict.fromkeys(line["row"] for line in found):
        mine = [line for line in found if line["row"] == name]
        cells = []
        for column in columns:
            known = [line for line in mine if line[column] is not None]
            shares = [Accuracy.of(round(line[column] * line["n"]), line["n"]) for line in known]
            cells.append(cell(shares, mine[0]["n"]) if shares else "-")
        print(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--square", type=int, default=5000)
    parser.add_argument("--data", help="of cifar10: an npz file")
    parser.add_argument(
        "--epochs", type=int, default=2, help="of cifar10; three times as many without attacks"
    )
    parser.add_argument("--steps", type=int, default=5, help="of cifar10's attacks in training")
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    parser.add_argument("--table", action="store_true", help="print what is finished")
    args = parser.parse_args()
    if not args.table:
        for seed in args.seeds:
            measure(args, seed)
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines(args)))
    show(args)


if __name__ == "__main__":
    main()
