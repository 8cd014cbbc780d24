"""The settings that distinguish runs: names, the seed, and values, by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from advbench import config
from advbench.attacks.threat import pixels
from advbench.config import roles
from advbench.config.roles import Role
from advbench.errors import UserError
from advbench.files import short_hash
from advbench.runs import directory
from advbench.text import threat_name

BY_RUN = r"(-s\d+)?(-[0-9a-f]{8})?$"
"""What a run's folder adds to the names of its components: bases of several seeds are one way to
begin."""


def settings_of(trained: DictConfig, defense: Any) -> dict[str, Any]:
    """What sets one run apart from another, by key: names, the seed of the training, and values.

    Where things lie and on what machine they run is left out.
    """
    return {key: value for key, (value, _) in with_roles(trained, defense).items()}


def with_roles(trained: DictConfig, defense: Any) -> dict[str, tuple[Any, Role]]:
    """The same, each with the roles of its key."""
    groups = ("backbone", "defense", "recipe", "optimizer")
    threat = trained.get("threat")
    plain = {
        **{key: trained.choices.get(key, "own") for key in groups},
        "training.data": _data_name(trained),
        "training.threat": None
        if threat is None
        else threat_name(threat.norm, pixels(threat.eps, "threat.eps")),
        "seed": trained.seed,
    }
    settings = {
        **{key: (value, Role.OUTCOME) for key, value in plain.items()},
        "init_from": (trained.get("init_from"), roles.of(config.TrainConfig)["init_from"]),
        **_of_the_trainer(trained.trainer),
        **{k: v for k, v in _leaves("data", trained.data, "data").items() if not v[1] & Role.PLACE},
        **_leaves("backbone", trained.backbone, "backbone"),
        **_leaves("optimizer", trained.optimizer, "optimizer"),
        **_leaves("recipe", trained.recipe, "recipe"),
        **_leaves("defense", defense, "defense"),
    }
    for key, (value, role) in settings.items():
        if value is not None and role & (Role.NAMES_RUN | Role.NAMES_FILE):
            kind = _kind(value) if role & Role.NAMES_RUN else ""
            settings[key] = (without_seed(value) + kind, role)
    return settings


def _of_the_trainer(node: DictConfig) -> dict[str, tuple[Any, Role]]:
    """What changes the outcome of a training on any machine: which weights are kept too."""
    declared = config.roles_of(node, "trainer").items()
    relevant = {k: role for k, role in declared if role & Role.OUTCOME and not role & Role.RESOURCE}
    return {
        "epochs" if key == "epochs" else f"trainer.{key}": (node.get(key), role)
        for key, role in relevant.items()
    }


def without_seed(run: str) -> str:
    """The name of a run's directory without the parts that its seed decides."""
    return re.sub(BY_RUN, "", Path(run).resolve().name)


def _kind(run: str) -> str:
    """What sets a run apart from those of its name but for the seed; nothing if it is gone."""
    try:
        trained = directory.find(run).config
    except UserError:
        return ""
    settings = settings_of(trained, trained.defense)
    return f"-{short_hash({key: v for key, v in settings.items() if key != 'seed'})}"


def _data_name(trained: DictConfig) -> str:
    """What a run was trained on; of files and folders of the user's own, with their name."""
    choice, node = str(trained.choices.get("data", "own")), trained.data
    path = node.get("path") or node.get("root")
    if "name" not in node or path is None:
        return choice
    return node.name or f"{choice}:{Path(path).stem}"


def flat(group: str, node: Any) -> dict[str, Any]:
    """The plain values of a group's node, by full key; those of a node inside it by theirs."""
    return {key: value for key, (value, _) in _leaves(group, node, group).items()}


def _leaves(prefix: str, node: Any, group: str | None) -> dict[str, tuple[Any, Role]]:
    """The same, each with its roles.

    prefix: of the keys.  group: of the node; None for a mapping that is no component.
    """
    leaves: dict[str, tuple[Any, Role]] = {}
    values = config.plain(node)
    declared = {} if group is None else config.roles_of(values, group)
    for key, value in values.items():
        full, role = f"{prefix}.{key}", declared.get(key, Role.OUTCOME)
        if key in config.INSIDE.values():
            inside = value or [] if isinstance(value, list | None) else [value]
            names = [member["_target_"].rpartition(".")[2].lower() for member in inside]
            leaves[full] = ("+".join(names), role)
            for name, member in zip(names, inside, strict=True):
                leaves |= _leaves(f"{prefix}.{name}", OmegaConf.create(member), group)
        elif isinstance(value, dict):
            inner = _leaves(full, OmegaConf.create(value), None)
            leaves |= {name: (part, role) for name, (part, _) in inner.items()}
        elif key != "_target_":
            leaves[full] = (str(value) if isinstance(value, list) else value, role)
    return leaves
