"""The command that makes a run again, from the config that the run keeps."""

from __future__ import annotations

import importlib.resources
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from advbench import config
from advbench.config import roles
from advbench.config.roles import Role
from advbench.config.words import setting
from advbench.errors import UserError
from advbench.runs import directory


def command(kept: Mapping[str, Any], folder: Path | None = None) -> str:
    """The command that repeats a run: every choice and value that is not the default.

    An option of the user's own is a file elsewhere; the line has a placeholder for its folder. An
    experiment is written as the options that it chooses.

    Args:
        kept: ``config.yaml`` of a training or an evaluation, as plain dicts and lists.
        folder: the run's directory; the line names it unless the program chose it.

    Returns:
        A line for the shell.

    Raises:
        UserError: the config has no choices, or is not of a training or an evaluation.
    """
    subcommand, choices = directory.kind_of(kept), kept.get("choices")
    if subcommand is None or not isinstance(choices, Mapping):
        raise UserError("the run's config does not say which options were chosen")
    usual = _defaults(subcommand)
    words, own = [], []
    for group in config.GROUPS:
        node, chosen = kept.get(group), choices.get(group)
        if not isinstance(node, Mapping) or not isinstance(chosen, str):
            continue
        shipped = _shipped(group, chosen)
        written = roles.having(Role.FROM_DATA, config.roles_of(node, group))
        node = {k: v for k, v in node.items() if k not in written or shipped.get(k)}
        if chosen != usual[group]:
            words.append(setting(group, chosen))
        if shipped:
            words += _differences(group, node, shipped)
        else:
            own.append(f"{group}/{chosen}.yaml")
            words += [setting(f"{group}.{k}", v) for k, v in node.items() if k != "_target_"]
    sitting = roles.having(Role.SITTING, roles.of(config.SCHEMAS[subcommand]))
    top = {k: v for k, v in kept.items() if k not in (*config.GROUPS, *sitting, "choices")}
    words += _differences("", top, usual)
    if folder is not None and not directory.named_by_key(folder, subcommand):
        words.append(setting("hydra.run.dir", str(folder)))
    where = ["--config-dir", f"DIR with {' and '.join(own)}"] if own else []
    return shlex.join(["advbench", subcommand, *where, *words])


@cache
def _defaults(subcommand: str) -> dict[str, Any]:
    """The option of each group, and the values of the top level."""
    text = (importlib.resources.files("advbench.configs") / f"{subcommand}.yaml").read_text("utf-8")
    values = config.plain(OmegaConf.create(text))
    options: dict[str, Any] = {}
    for line in values.pop("defaults"):
        options |= line if isinstance(line, dict) else {}
    return {**values, **options}


@cache
def _shipped(group: str, name: str) -> dict[str, Any]:
    """The option as a run keeps it; empty for one of the user's own."""
    try:
        node = config.shipped(group, name)
    except UserError:
        return {}
    return config.plain(config.spelled_out(node, group) if group in config.INSIDE else node)


def _differences(prefix: str, node: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    """``KEY=VALUE`` for each value of the node that ``usual`` has not; ``+`` adds a new key."""
    for key, value in node.items():
        full = f"{prefix}.{key}" if prefix else str(key)
        default = usual.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping) and "_target_" not in value:
            yield from _differences(full, value, default)
        elif value != default:
            yield setting(full if key in usual else f"+{full}", value)
