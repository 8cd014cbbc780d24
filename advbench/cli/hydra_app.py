"""``train`` and ``eval``: Hydra applications on the packaged configs."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from advbench.cli import explain
from advbench.errors import UserError, did_you_mean

DIRECTORIES = ("hydra.run.dir=", "hydra.sweep.dir=")


def run(subcommand: str, rest: list[str]) -> int:
    """Hand the subcommand's settings to Hydra, which calls the task once per job."""
    import hydra

    from advbench import config
    from advbench.cli import keys_help
    from advbench.cli.multirun import QUIET, Task, refuse_experiment, refuse_search, with_presets
    from advbench.cli.searchpath import OwnFirst, own_first

    config.register()
    own_first(rest)
    keys_help.register(subcommand, OwnFirst.folder)
    argv = sys.argv
    quiet = any(word in QUIET for word in rest)
    words = [word for word in rest if word not in QUIET]  # not a word of Hydra's
    _check_options(subcommand, words)
    refuse_search(subcommand, words)
    refuse_experiment(subcommand, words)
    job = partial(_job, subcommand, existing=_existing(subcommand, words), quiet=quiet)
    task = Task(job, [argv[0], subcommand, *rest])
    sys.argv = [f"advbench {subcommand}", *with_presets(words)]
    application = hydra.main(
        version_base="1.3", config_path="pkg://advbench.configs", config_name=subcommand
    )
    try:
        application(task)()
        return task.settle()
    except Exception as problem:
        return task.settle(problem)
    finally:
        sys.argv = argv
        task.close()


def _check_options(subcommand: str, words: list[str]) -> None:
    """Raise UserError for what Hydra answers with its usage, or with an error of Python's."""
    from hydra._internal.utils import get_args_parser

    from advbench.config import GROUPS

    def refuse(message: str) -> Any:
        raise UserError(f"{message} (advbench {subcommand} --help)")

    parser = get_args_parser()
    parser.error = refuse
    parsed = parser.parse_args(words)
    if parsed.multirun and parsed.cfg:
        raise UserError("--cfg shows the config of one run: leave out -m, with one value per key")
    for word in parsed.overrides:
        group, _, value = word.partition("=")
        if group in GROUPS and value.startswith("["):
            raise UserError(f"{word}: a list is not an option; choose one with {group}=NAME")


def _existing(subcommand: str, rest: list[str]) -> set[Path]:
    """Which directories on the way to the runs there are, before Hydra makes the others."""
    from advbench.runs import directory

    names = [word.partition("=")[2] for word in rest if word.startswith(DIRECTORIES)]
    folders = [Path(name).absolute() for name in (*names, directory.OUTPUTS / subcommand)]
    return {path for name in folders for path in (name, *name.parents) if path.exists()}


def _job(subcommand: str, cfg: Any, existing: set[Path], quiet: bool) -> tuple[int, float | None]:
    """Returns the exit code, and what a search maximises."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from advbench import config
    from advbench.console import Screen
    from advbench.experiments.evaluate import evaluate
    from advbench.experiments.home import Home
    from advbench.experiments.train import score, train
    from advbench.runs import directory

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        exact = hydra_cfg.sweep.subdir != "."
    else:
        exact = Path(hydra_cfg.run.dir) != directory.OUTPUTS / subcommand
    with suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    home, screen = Home(folder, exact), Screen(quiet=quiet)
    with _tidy(folder, existing), _noted(screen):
        _check_overrides(subcommand, cfg, hydra_cfg)
        plugins = config.load_plugins(cfg.plugins)
        if subcommand == "train":
            folder = train(cfg, hydra_cfg.runtime.choices, home, plugins, screen)
            return 0, score(folder)
        results = evaluate(cfg, hydra_cfg.runtime.choices, home, plugins, screen)
    return _strictly(results.verdict.get("label")) if cfg.strict else 0, None


def _strictly(label: str | None) -> int:
    """The exit code by the verdict: 3 if it is unreliable, 4 unless it is reliable."""
    from advbench.devices import is_first

    # One process speaks for the run; Fabric takes an exit code for a crash.
    return {"reliable": 0, "unreliable": 3}.get(label or "", 4) if is_first() else 0


def _check_overrides(subcommand: str, cfg: Any, hydra_cfg: Any) -> None:
    """Raise UserError for settings that may not stand where they stand, or would be ignored."""
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from advbench.cli.multirun import overrides
    from advbench.config import GROUPS, SCHEMAS, roles
    from advbench.config.roles import Role

    keys = [field.name for field in dataclasses.fields(SCHEMAS[subcommand])]
    for added in sorted({str(key) for key in cfg} - {*keys}):  # with +KEY=VALUE
        raise UserError(f"no key '{added}'{did_you_mean(added, keys)}")
    for group in GROUPS:
        if not isinstance(node := cfg.get(group), DictConfig | None):
            raise UserError(f"{group} is {node}, not a component: choose one with {group}=NAME")
    named = {override.partition("=")[0].lstrip("+") for override in overrides(hydra_cfg)}
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
    again = Role.SITTING | Role.LOGGING | Role.NAMES_FILE  # files run code, so they are said again
    heeded = {*roles.having(again, roles.of(SCHEMAS[subcommand]))}
    ignored = {name for name in named if name.partition(".")[0] not in heeded}
    if cfg.resume is not None and ignored:
        raise UserError(
            f"resume={cfg.resume} takes its settings from the run: leave out "
            f"{', '.join(sorted(ignored))}"
        )


@contextmanager
def _tidy(folder: Path, existing: set[Path]) -> Any:
    """A mistake leaves no empty directories behind that were not there before."""
    try:
        yield
    except UserError:
        run_folder = folder.absolute()
        if run_folder not in existing and [path.name for path in run_folder.glob("*")] == [
            "multirun.yaml"
        ]:
            (run_folder / "multirun.yaml").unlink()  # Hydra's note of a sweep that came to nothing
        for empty in (run_folder, *run_folder.parents):
            if empty in existing:
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
        screen.failed(explain.of(problem) or type(problem).__name__)
        raise


def complete(arguments: list[str], subcommands: list[str]) -> int:
    """Shell completion: ours for the subcommand, Hydra's for the settings."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    subcommand = words[1] if len(words) > 1 else ""
    if any(word.startswith("query=") for word in arguments):
        if subcommand not in ("train", "eval") or (len(words) == 2 and not line.endswith(" ")):
            print(
                " ".join(v for v in subcommands if v.startswith(subcommand))
                if len(words) < 3
                else ""
            )
            return 0
        os.environ["COMP_LINE"] = line.replace(f" {subcommand}", "", 1)
        return run(subcommand, arguments)
    return run("train", arguments)
