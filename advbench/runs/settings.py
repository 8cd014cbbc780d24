"""What sets one run apart from another: names, the seed, and values, by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from advbench import config
from advbench.attacks.threat import pixels
from advbench.errors import UserError
from advbench.files import short_hash
from advbench.runs import directory
from advbench.text import threat_name

BY_RUN = r"(-s\d+)?(-[0-9a-f]{8})?$"
"""What a run's folder adds to the names of its components: bases of several seeds are one way to
begin."""


OF_THE_TRAINER = (
    "batch_size", "precision", "clip_grad", "ema", "val_steps", "devices", "sync_batchnorm"
)  # fmt: skip
"""What changes the outcome of a training: which weights are kept is part of it."""


PLACES = {f"data.{key}" for key in ("path", "root", "download", "name")}


RUNS = {"init_from", "robust_teacher", "standard_teacher"}


PATHS = {"extra", "weights"}
"""Last words of keys whose values are runs, and of those whose values are files."""


def settings_of(trained: DictConfig, defense: Any) -> dict[str, Any]:
    """What sets one run apart from another, by key: names, the seed of the training, and values.

    Where things lie and on what machine they run is left out.
    """
    groups = ("backbone", "defense", "recipe", "optimizer")
    names = {key: trained.choices.get(key, "own") for key in groups}
    threat = trained.get("threat")
    settings = {
        **names,
        "training.data": _data_name(trained),
        "training.threat": None
        if threat is None
        else threat_name(threat.norm, pixels(threat.eps, "threat.eps")),
        "seed": trained.seed,
        "init_from": trained.get("init_from"),
        "epochs": trained.trainer.get("epochs"),
        **{f"trainer.{key}": trained.trainer.get(key) for key in OF_THE_TRAINER},
        **{key: v for key, v in flat("data", trained.data).items() if key not in PLACES},
        **flat("backbone", trained.backbone),
        **flat("optimizer", trained.optimizer),
        **flat("recipe", trained.recipe),
        **flat("defense", defense),
    }
    for key, value in settings.items():
        word = key.rpartition(".")[2]
        if value is not None and word in RUNS | PATHS:
            settings[key] = without_seed(value)
            if word in RUNS:
                settings[key] += _kind(value)
    return settings


def without_seed(run: str) -> str:
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
    place = node.get("path") or node.get("root")
    if "name" not in node or place is None:
        return choice
    return node.name or f"{choice}:{Path(place).stem}"


def flat(group: str, node: Any) -> dict[str, Any]:
    """The plain values of a group's node, by full key; those of a node inside it by theirs."""
    found: dict[str, Any] = {}
    for key, value in config.plain(node).items():
        if key in config.INSIDE.values():
            inside = value or [] if isinstance(value, list | None) else [value]
            names = [member["_target_"].rpartition(".")[2].lower() for member in inside]
            found[f"{group}.{key}"] = "+".join(names)
            for name, member in zip(names, inside, strict=True):
                found |= flat(f"{group}.{name}", OmegaConf.create(member))
        elif isinstance(value, dict):
            found |= flat(f"{group}.{key}", OmegaConf.create(value))
        elif key != "_target_":
            found[f"{group}.{key}"] = str(value) if isinstance(value, list) else value
    return found
