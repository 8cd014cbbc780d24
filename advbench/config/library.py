"""The shipped options of each group."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from advbench.errors import UserError, did_you_mean


def shipped(group: str, name: str) -> DictConfig:
    """The node of a shipped option, such as ``shipped("threat", "linf_8")``.

    Args:
        group: such as ``threat``.
        name: of the option; one of a subfolder is FOLDER/NAME.

    Raises:
        UserError: with the nearest name, if there is none.
    """
    names = options(group)
    if name not in names:
        raise UserError(f"no {group} '{name}'{did_you_mean(name, names)}")
    cfg = OmegaConf.create(names[name].read_text(encoding="utf-8"))
    assert isinstance(cfg, DictConfig)
    return cfg


def options(group: str) -> Mapping[str, Any]:
    """The shipped options of ``group`` and their files; those of a subfolder as FOLDER/NAME."""
    files: dict[str, Any] = {}
    for file in (importlib.resources.files("advbench.configs") / group).iterdir():
        if file.name.endswith(".yaml"):
            files[file.name.removesuffix(".yaml")] = file
        elif file.is_dir():
            files |= {f"{file.name}/{n}": f for n, f in options(f"{group}/{file.name}").items()}
    return dict(sorted(files.items()))
