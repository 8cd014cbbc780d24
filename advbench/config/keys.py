"""The roles of the keys of a group's node."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig

from advbench.config import roles
from advbench.config.instantiate import target_of
from advbench.config.library import options, shipped
from advbench.config.roles import Role
from advbench.errors import UserError


def roles_of(node: Mapping[str, Any] | DictConfig, group: str) -> Mapping[str, Role]:
    """The role of each key of a component; what it does not name decides the outcome.

    Keys of the user's own component are what keys of these names are in the shipped component that
    is most like it. Its code is not read, so a report knows them without it.

    Args:
        node: ``_target_`` and parameters.
        group: such as ``defense``.
    """
    try:
        return roles.of(target_of(node, group))
    except UserError:
        alike = sorted(shipped_roles(group), key=lambda declared: len(declared.keys() & set(node)))
        return {key: role for declared in alike for key, role in declared.items() if key in node}


@cache
def shipped_roles(group: str) -> tuple[Mapping[str, Role], ...]:
    """The roles of the shipped components of a group, the last option first."""
    nodes = [shipped(group, name) for name in options(group)]
    targets = dict.fromkeys(target_of(node, group) for node in nodes if node.get("_target_"))
    return tuple(roles.of(target) for target in reversed(targets))
