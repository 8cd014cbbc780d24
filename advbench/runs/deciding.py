"""The settings that decide the outcome of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advbench import config
from advbench.config import roles
from advbench.config.roles import Role

DECIDING = Role.OUTCOME | Role.SITTING
"""Roles of the keys that a training is known by. ``resume`` is null in all of them."""


def deciding(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the outcome of a training, of its plain config.

    Left out is where files are whose content is hashed beside it, who hears of the run, and the
    name of the experiment, since what that chooses is there. Images that are read while they are
    used are known by their names and sizes alone, so their place stays.
    """
    values = _having(DECIDING, kept, roles.of(config.TrainConfig))
    for group in config.GROUPS:
        if isinstance(node := values.get(group), Mapping):
            values[group] = _having(DECIDING, node, config.roles_of(node, group))
    if isinstance(choices := values.get("choices"), Mapping):
        values["choices"] = {group: v for group, v in choices.items() if group != "experiment"}
    return values


def _having(role: Role, values: Mapping[str, Any], declared: Mapping[str, Role]) -> dict[str, Any]:
    """The values whose keys have one of the roles."""
    return {k: v for k, v in values.items() if declared.get(k, Role.OUTCOME) & role}
