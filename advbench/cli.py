"""The command line: ``advbench VERB ...``.

``train`` and ``eval`` are Hydra applications on the packaged configs; the other verbs are plain.
A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import advbench.messages as messages
from advbench.errors import UserError, did_you_mean

QUIET = ("-q", "--quiet")
DIRECTORIES = ("hydra.run.dir=", "hydra.sweep.dir=")
HELP = """advbench - train adversarial defenses, and measure honestly how robust they are

usage: advbench VERB ...

  advbench doctor                       what is installed, and whether attacks are right here
  advbench train                        train on the embedded digits with PGD adversarial training
  advbench eval                         attack the newest training run with AutoAttack
  advbench list [GROUP]                 what there is: data, backbones, defenses, recipes, ...
  advbench list runs [PATH ...]         which runs there are, and what goes on with each
  advbench report outputs               tables of all results; --html FILE for a page
  advbench report --compare A B         two evaluations, image by image
  advbench copy GROUP/NAME DIR          a shipped config, to change and use with --config-dir DIR
  advbench export outputs/eval/RUN      a RobustBench entry, with what is left to fill in

Settings follow as KEY=VALUE, in any order:

  advbench train data=cifar10 data.download=true backbone=resnet18 threat=linf_8
  advbench train recipe=standard trainer.epochs=10 optimizer.lr=0.05 seed=1
  advbench train -m seed=1,2,3                        several runs, one after the other
  advbench train -m hydra/launcher=joblib seed=1,2,3  ... or side by side (also submitit_slurm, ray)
  advbench eval run=outputs/train/RUN protocol=pgd n=1000 budget=10min
  advbench eval model=my_model.py:build weights=my.pt data=npz data.path=test.npz threat=linf_8
  advbench eval model=robustbench:cifar10/Linf/NAME data.download=true

  advbench VERB --help                  every setting of that verb, with its value
  advbench train -q ...                 the outcome alone, in one line (eval too)
  advbench -sc install=bash             how to install completion (or zsh, fish)
  advbench --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Let Hydra hand its errors on instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as problem:
        return _refuse(problem)


def _refuse(problem: Exception) -> int:
    """Print a user's mistake in one line and return its exit code; raise a bug of ours again."""
    message = messages.of(problem)
    if message is None:
        raise problem
    from advbench.console import printable

    print(f"advbench: {printable(message)}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": lambda rest: _hydra("train", rest),
        "eval": lambda rest: _hydra("eval", rest),
        "report": _report,
        "list": _list,
        "copy": _copy,
        "doctor": _doctor,
        "export": _export,
    }
    if any(word in ("-sc", "--shell-completion", "--shell_completion") for word in arguments):
        return _complete(arguments, list(verbs))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "-V" or "--version" in arguments:  # which Hydra would answer with its own
        print(f"advbench {version('advbench')}")
        return 0
    verb, *rest = arguments
    if verb not in verbs:
        raise UserError(f"there is no verb '{verb}'{did_you_mean(verb, verbs)} (advbench --help)")
    return verbs[verb](rest)


# --- train and eval -----------------------------------------------------------------------------


def _hydra(verb: str, rest: list[str]) -> int:
    """Hand the verb's settings to Hydra, which calls the task once per job."""
    import hydra

    from advbench import config
    from advbench.searchpath import own_first
    from advbench.sweeps import Task, refuse_search, with_presets

    config.register()
    own_first(rest)
    given = sys.argv
    quiet = any(word in QUIET for word in rest)
    words = [word for word in rest if word not in QUIET]  # not a word of Hydra's
    _check_options(verb, words)
    refuse_search(verb, words)
    job = partial(_job, verb, there=_existing(verb, words), quiet=quiet)
    task = Task(job, [given[0], verb, *rest])
    sys.argv = [f"advbench {verb}", *with_presets(words)]
    run = hydra.main(version_base="1.3", config_path="pkg://advbench.configs", config_name=verb)
    try:
        run(task)()
        return task.settle()
    except Exception as problem:
        return task.settle(problem)
    finally:
        sys.argv = given
        task.close()


def _check_options(verb: str, words: list[str]) -> None:
    """Raise UserError for what Hydra's own parser would answer with its usage."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> Any:
        raise UserError(f"{message} (advbench {verb} --help)")

    parser = get_args_parser()
    parser.error = refuse
    given = parser.parse_args(words)
    if given.multirun and given.cfg:
        raise UserError("--cfg shows the config of one run: leave out -m, with one value per key")


def _existing(verb: str, rest: list[str]) -> set[Path]:
    """Which directories on the way to the runs there are, before Hydra makes the others."""
    from advbench import runs

    said = [word.partition("=")[2] for word in rest if word.startswith(DIRECTORIES)]
    wanted = [Path(name).absolute() for name in (*said, runs.OUTPUTS / verb)]
    return {path for name in wanted for path in (name, *name.parents) if path.exists()}


def _job(verb: str, cfg: Any, there: set[Path], quiet: bool) -> tuple[int, float | None]:
    """Returns the exit code, and what a search maximises."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from advbench import config, experiments, runs
    from advbench.console import Screen

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        exact = hydra_cfg.sweep.subdir != "."
    else:
        exact = Path(hydra_cfg.run.dir) != runs.OUTPUTS / verb
    with suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    home, screen = experiments.Home(folder, exact), Screen(quiet=quiet)
    with _tidy(folder, there), _noted(screen):
        _check_overrides(verb, cfg, hydra_cfg)
        plugins = config.load_plugins(cfg.plugins)
        if verb == "train":
            folder = experiments.train(cfg, hydra_cfg.runtime.choices, home, plugins, screen)
            return 0, experiments.score(folder)
        results = experiments.evaluate(cfg, hydra_cfg.runtime.choices, home, plugins, screen)
    return _strictly(results.verdict["label"]) if cfg.strict else 0, None


def _strictly(label: str | None) -> int:
    """The exit code by the verdict: 3 if it is unreliable, or was not computed, which is said."""
    from advbench.devices import is_first

    if not is_first():  # one process speaks for the run; Fabric takes an exit code for a crash
        return 0
    if label is None:
        print("advbench: strict=true: no verdict on the reliability was computed", file=sys.stderr)
    return 3 if label in (None, "unreliable") else 0


def _check_overrides(verb: str, cfg: Any, hydra_cfg: Any) -> None:
    """Raise UserError for settings that may not stand where they stand, or would be ignored."""
    from hydra.types import RunMode

    from advbench.config import SCHEMAS

    keys = [field.name for field in dataclasses.fields(SCHEMAS[verb])]
    for added in sorted({str(key) for key in cfg} - {*keys}):  # with +KEY=VALUE
        raise UserError(f"no key '{added}'{did_you_mean(added, keys)}")
    named = {override.partition("=")[0].lstrip("+") for override in hydra_cfg.overrides.task}
    if cfg.plugins and "plugins" not in named:
        raise UserError("plugins=[FILE.py] runs code, so it may be given on the command line only")
    if not -(2**63) <= cfg.seed < 2**63:
        raise UserError(f"seed={cfg.seed} is too large: take a whole number below 2**63")
    if "threat.norm" in named and not named & {"threat", "threat.eps"}:
        raise UserError("another norm has other lengths: give threat.eps=... as well")
    if hydra_cfg.mode == RunMode.MULTIRUN and any(
        override.startswith("hydra.run.dir=") for override in hydra_cfg.overrides.hydra
    ):
        raise UserError("hydra.run.dir is for one run; with -m say where with hydra.sweep.dir=DIR")
    heeded = {"resume", "plugins", "strict", "model", "weights", "budget", "logger"}
    ignored = {name for name in named if name.partition(".")[0] not in heeded}
    if cfg.resume is not None and ignored:
        raise UserError(
            f"resume={cfg.resume} takes its settings from the run: leave out "
            f"{', '.join(sorted(ignored))}"
        )


@contextmanager
def _tidy(folder: Path, there: set[Path]) -> Any:
    """A mistake leaves no empty directories behind that were not there before."""
    try:
        yield
    except UserError:
        home = folder.absolute()
        if home not in there and [path.name for path in home.glob("*")] == ["multirun.yaml"]:
            (home / "multirun.yaml").unlink()  # Hydra's note of a sweep that came to nothing
        for empty in (home, *home.parents):
            if empty in there:
                break
            try:
                empty.rmdir()
            except OSError:
                break
        raise


@contextmanager
def _noted(screen: Any) -> Any:
    """A mistake that ends a run is in its log too."""
    try:
        yield
    except Exception as problem:
        screen.failed(messages.of(problem) or type(problem).__name__)
        raise


def _complete(arguments: list[str], verbs: list[str]) -> int:
    """Shell completion: ours for the verb, Hydra's for the settings."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    verb = words[1] if len(words) > 1 else ""
    if any(word.startswith("query=") for word in arguments):
        if verb not in ("train", "eval") or (len(words) == 2 and not line.endswith(" ")):
            print(" ".join(v for v in verbs if v.startswith(verb)) if len(words) < 3 else "")
            return 0
        os.environ["COMP_LINE"] = line.replace(f" {verb}", "", 1)
        return _hydra(verb, arguments)
    return _hydra("train", arguments)


# --- the other verbs ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} ({self.prog} --help)")


def _report(arguments: list[str]) -> int:
    from advbench.report import verb

    parser = _Parser("advbench report", description="Tables of the results below some folders.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: outputs")
    verb.declare(parser)
    verb.run(parser.parse_args(arguments))
    return 0


def _list(arguments: list[str]) -> int:
    from advbench import runs
    from advbench.report import catalogue, inventory

    parser = _Parser(
        "advbench list",
        description="What there is to choose from; 'advbench list runs': what there is of runs.",
    )
    parser.add_argument(
        "group", nargs="?", help="such as defenses, or runs; without it, all groups"
    )
    parser.add_argument("paths", nargs="*", help="of 'list runs': where to look; default: outputs")
    given = parser.parse_args(arguments)
    if given.group in ("run", "runs"):
        inventory.show([Path(path) for path in given.paths or [runs.OUTPUTS]])
    elif given.paths:
        raise UserError(f"list {given.group} takes no paths; 'advbench list runs PATH' does")
    else:
        catalogue.show(given.group)
    return 0


def _copy(arguments: list[str]) -> int:
    from advbench.report import catalogue

    parser = _Parser(
        "advbench copy",
        description="Copy a shipped config to a folder of your own, which --config-dir then adds.",
    )
    parser.add_argument("config", help="GROUP/NAME, such as experiment/cifar10_pgd_at")
    parser.add_argument("folder", nargs="?", default=".", help="default: here")
    given = parser.parse_args(arguments)
    print(catalogue.copy(given.config, Path(given.folder)))
    return 0


def _doctor(arguments: list[str]) -> int:
    parser = _Parser(
        "advbench doctor",
        description="What is installed, what this machine can do, and a self-test of the attacks. "
        "Exit code 1 if it fails.",
    )
    parser.add_argument("--data-root", default="data", help="where data sets are; default: data")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(arguments)
    from advbench import doctor, runs

    findings = doctor.examine(Path(given.data_root), runs.OUTPUTS)
    if given.json:
        print(json.dumps(doctor.to_json(findings), indent=2))
    else:
        doctor.show(findings)
    return 0 if doctor.healthy(findings) else 1


def _export(arguments: list[str]) -> int:
    from advbench.report import model_info

    parser = _Parser(
        "advbench export",
        description="An evaluation as a model_info file of RobustBench; what it can't know is "
        "empty, to be filled in.",
    )
    parser.add_argument("run", help="the directory of a finished evaluation")
    parser.add_argument("--out", metavar="FILE", help="default: print it")
    given = parser.parse_args(arguments)
    model_info.export(Path(given.run), None if given.out is None else Path(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
