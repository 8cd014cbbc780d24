"""What a key of a config is for, said where the key is declared.

    root: str = field(default="data", metadata={"role": Role.PLACE})

Names of runs, resuming, tables and what ``eval`` takes are derived from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from enum import Flag, auto
from typing import Any


class Role(Flag):
    """Roles of a key, which may have several. A key without a declared role decides the outcome."""

    OUTCOME = auto()
    """Decides the outcome."""
    PLACE = auto()
    """Says where files are, or what they are called."""
    LOGGING = auto()
    """Says who hears of the run."""
    RESOURCE = auto()
    """Says where and how it runs."""
    SITTING = auto()
    """Is of one sitting, such as a time limit."""
    EVALUATION = auto()
    """May be changed when a finished run is evaluated."""
    NAMES_RUN = auto()
    """Its value is a run, or several."""
    NAMES_FILE = auto()
    """Its value is a file of the user's own, or several."""
    FROM_DATA = auto()
    """Is written by the data where it is not given."""


def of(component: Callable[..., Any]) -> dict[str, Role]:
    """The role of each parameter of a component.

    A class that gives a key of its base another default keeps the base's role.
    """
    return {name: _declared(component, name) for name in inspect.signature(component).parameters}


def _declared(component: Callable[..., Any], key: str) -> Role:
    for cls in getattr(component, "__mro__", ()):
        field = cls.__dict__.get("__dataclass_fields__", {}).get(key)
        if field is not None and "role" in field.metadata:
            return field.metadata["role"]
    return Role.OUTCOME


def having(role: Role, roles: Mapping[str, Role]) -> Iterable[str]:
    """The keys that have the role, or one of several."""
    return [key for key, its in roles.items() if its & role]
