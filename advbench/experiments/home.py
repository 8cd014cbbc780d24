"""The directory of a run, and the config that is saved there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from advbench import config
from advbench.errors import UserError, did_you_mean
from advbench.files import short_hash
from advbench.runs import directory


@dataclass(frozen=True)
class Home:
    """The directory of a run that starts: ``folder`` itself, or a new directory inside it."""

    folder: Path
    """``hydra.run.dir``, or the folder of all runs of the subcommand."""
    exact: bool
    """Whether ``folder`` itself is the run's directory."""

    def of(self, name: str, identity: Mapping[str, Any]) -> Path:
        return self.folder if self.exact else self.folder / f"{name}-{short_hash(identity)}"


def resumed(run: str, kind: str) -> tuple[Home, DictConfig]:
    """The directory and the config of an interrupted run."""
    folder = Path(run)
    if directory.kind_in(folder) != kind:
        raise UserError(f"resume={run} is not the directory of an advbench {kind} run")
    directory.refuse_links(folder)
    return Home(folder, exact=True), kept_in(folder, kind)


def kept_in(folder: Path, kind: str) -> DictConfig:
    """The config of a run with every key that its subcommand has; an earlier version had fewer.

    Args:
        folder: the run's directory.
        kind: ``train`` or ``eval``.

    Raises:
        UserError: a key is unknown, a component is missing, or a value has another type.
    """
    path = folder / directory.CONFIG
    kept, known = config.read(path), OmegaConf.structured(config.SCHEMAS[kind])
    with open_dict(known):
        known.choices = {}
    for key in kept:
        if key not in known:
            raise UserError(f"'{path}' has no key '{key}'{did_you_mean(key, map(str, known))}")
    lacks = [group for group in known if group in GROUPS and group not in kept]
    if lacks:
        raise UserError(f"'{path}' lacks {', '.join(map(str, lacks))}: copy the run anew")
    try:
        typed = OmegaConf.merge(known, kept)
    except OmegaConfBaseException as problem:
        raise UserError(f"'{path}' can't be resumed: {str(problem).splitlines()[0]}") from None
    return OmegaConf.create(config.plain(typed))  # pyright: ignore[reportArgumentType]


GROUPS = {*config.GROUPS} - {"logger", "verdict"}
"""Components that the config of a run of any version has, if only as null."""
FILES = ("path", "extra")
"""Keys of ``data`` that name the user's own arrays, whose content is hashed beside the config."""


def kept_config(cfg: DictConfig, choices: Mapping[str, str]) -> DictConfig:
    """The config as a run keeps it: resolved, with the names of the chosen options.

    Files of data are kept with their whole path, so that a command in another directory finds
    them, and not others of that name.
    """
    saved = OmegaConf.create(config.plain(cfg))
    for key in FILES:
        if saved.data is not None and isinstance(file := saved.data.get(key), str):
            saved.data[key] = str(Path(file).expanduser().absolute())
    with open_dict(saved):
        saved.choices = {
            group: name
            for group, name in choices.items()
            if group in (*config.GROUPS, "experiment") and group != "logger" and name is not None
        }
    return saved
