"""Where a run lives, and the config that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from advbench import config
from advbench.errors import UserError
from advbench.files import short_hash
from advbench.runs import directory


@dataclass(frozen=True)
class Home:
    """Where a run is to live: in ``folder`` itself, or in a directory of its own inside it."""

    folder: Path
    exact: bool

    def of(self, name: str, identity: Mapping[str, Any]) -> Path:
        return self.folder if self.exact else self.folder / f"{name}-{short_hash(identity)}"


def resumed(run: str, kind: str) -> tuple[Home, DictConfig]:
    """The directory and the config of an interrupted run."""
    folder = Path(run)
    if directory.kind_in(folder) != kind:
        raise UserError(f"resume={run} is not the directory of an advbench {kind} run")
    directory.refuse_links(folder)
    return Home(folder, exact=True), config.read(folder / directory.CONFIG)


FILES = ("path", "extra")
"""Keys of ``data`` that name the user's own arrays, whose content is hashed beside the config."""


def kept_config(cfg: DictConfig, choices: Mapping[str, str]) -> DictConfig:
    """The config as a run keeps it: resolved, with the names of the chosen options.

    Files of data are kept with their whole path, so that a command in another directory finds
    them, and not others of that name.
    """
    kept = OmegaConf.create(config.plain(cfg))
    for key in FILES:
        if kept.data is not None and isinstance(file := kept.data.get(key), str):
            kept.data[key] = str(Path(file).expanduser().absolute())
    with open_dict(kept):
        kept.choices = {
            group: name
            for group, name in choices.items()
            if group in (*config.GROUPS, "experiment") and group != "logger" and name is not None
        }
    return kept
