"""The top level of each subcommand's config, and the groups that it is composed of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

GROUPS = {
    "data": "advbench.data.",
    "backbone": "advbench.backbones.",
    "defense": "advbench.defenses.",
    "recipe": "advbench.recipes.",
    "optimizer": "advbench.training.optimizers.",
    "threat": "advbench.attacks.threat.",
    "protocol": (
        "advbench.evaluation.protocols.",
        "advbench.evaluation.adaptive.",
        "advbench.evaluation.paper.",
    ),
    "trainer": ("advbench.training.trainer.", "advbench.evaluation.resources."),
    "logger": "advbench.training.loggers.",
}
"""Where each group's components are defined."""


INSIDE = {"defense": "members", "recipe": "of"}
"""The parameter by which a component holds others of its group: the chain's, and awp's."""


FROM_THE_RUN = {
    "data": "data=npz data.path=FILE.npz",
    "threat": "threat=linf_8, or threat.norm=l2 threat.eps=0.5",
}
"""Groups that ``eval`` takes from the run that it evaluates, and what to say without one."""


@dataclass
class TrainConfig:
    """Top level of ``advbench train``.

    seed: of everything random in the training.  init_from: a run whose weights to start from.
    resume: an interrupted run to go on with.  plugins: files of the user's own components.
    """

    seed: int = 0
    init_from: str | None = None
    resume: str | None = None
    plugins: list[str] = field(default_factory=list)
    data: Any = None
    backbone: Any = None
    defense: Any = None
    recipe: Any = None
    optimizer: Any = None
    threat: Any = None
    trainer: Any = None
    logger: Any = None


@dataclass
class EvalConfig:
    """Top level of ``advbench eval``.

    run: a training run; the newest finished one if neither ``run`` nor ``model`` is given.
    model: FILE.py:FACTORY of the user's own, with its ``weights``.  n: size of the subset of the
    test split.  adversarial: keep the adversarial images.  strict: exit with code 3 if the verdict
    is unreliable.  transfer: runs whose images may break the model too.
    traits: what an attacker must know of a ``model`` of the user's own.  resume: an interrupted
    evaluation to go on with.  budget: stop after that time, such as 10min, and go on when the
    command is repeated.
    """

    seed: int = 0
    run: str | None = None
    model: str | None = None
    weights: str | None = None
    n: int | None = None
    adversarial: bool = False
    strict: bool = False
    budget: str | None = None
    resume: str | None = None
    transfer: list[str] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    traits: Any = None
    data: Any = None
    defense: Any = None
    threat: Any = None
    protocol: Any = None
    trainer: Any = None


SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}
"""The top level of each verb."""


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    for verb, schema in SCHEMAS.items():
        store.store(name=f"{verb}_schema", node=schema)
