"""The top level of each subcommand's config, and the groups that it is composed of."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore

from advbench.config.roles import Role

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
        "advbench.evaluation.express.",
        "advbench.evaluation.paper.",
    ),
    "trainer": ("advbench.training.trainer.", "advbench.evaluation.resources."),
    "logger": "advbench.training.loggers.",
    "verdict": "advbench.verdict.judge.",
}
"""Where each group's components are defined."""


INSIDE = {"defense": "members", "recipe": "of"}
"""The parameter by which a component holds others of its group: the chain's, and awp's."""


@dataclass
class TrainConfig:
    """Top level of ``advbench train``."""

    seed: int = 0
    """Seed of everything random in the training."""
    init_from: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_RUN})
    """A run whose weights to start from."""
    resume: str | None = field(default=None, metadata={"role": Role.SITTING})
    """An interrupted training to resume."""
    plugins: list[str] = field(default_factory=list, metadata={"role": Role.NAMES_FILE})
    """Files of your own components, on the command line only."""
    data: Any = None
    """The images, and what part of them is held out."""
    backbone: Any = None
    """The network."""
    defense: Any = None
    """What is put on the network."""
    recipe: Any = None
    """The loss, and the adversarial images in it."""
    optimizer: Any = None
    """The optimizer and the schedule of its learning rate."""
    threat: Any = None
    """The norm and the budget of the adversarial images."""
    trainer: Any = field(default=None, metadata={"home": "advbench.training."})
    """Epochs, batch size, devices and precision."""
    logger: Any = field(default=None, metadata={"role": Role.LOGGING})
    """Where the metrics go besides the run's own files."""


@dataclass
class EvalConfig:
    """Top level of ``advbench eval``."""

    seed: int = 0
    """Seed of the attacks."""
    run: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_RUN})
    """A training run; the newest finished one if neither run nor model is given."""
    model: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_FILE})
    """A model of your own, FILE.py:FACTORY, or robustbench:DATA/THREAT/NAME."""
    weights: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_FILE})
    """The weights of model: safetensors, or a state_dict saved by torch.save."""
    n: int | None = None
    """Size of a fixed pseudo-random subset of the test split; null is all of it."""
    adversarial: bool | None = None
    """Keep the adversarial images; null does where they take less than 100 MB."""
    strict: bool = field(default=False, metadata={"role": Role.SITTING})
    """Exit with code 3 if the verdict is unreliable, 4 if inconclusive or unknown."""
    budget: str | None = field(default=None, metadata={"role": Role.SITTING})
    """Stop after a time (10min) or 2e6passes in all; the same command resumes."""
    resume: str | None = field(default=None, metadata={"role": Role.SITTING})
    """An interrupted evaluation to resume."""
    transfer: list[str] = field(
        default_factory=list, metadata={"role": Role.OUTCOME | Role.NAMES_RUN}
    )
    """Runs on the same data, whose adversarial images are tried on the model too."""
    plugins: list[str] = field(default_factory=list, metadata={"role": Role.NAMES_FILE})
    """Files of your own components, on the command line only."""
    traits: Any = None
    """What an attacker must know of a model of your own."""
    data: Any = field(default=None, metadata={"without_run": "data=npz data.path=FILE.npz"})
    """The test images; those of the run if nothing is given."""
    defense: Any = None
    """A defense to put on the model; the run's own if nothing is given."""
    threat: Any = field(
        default=None,
        metadata={"without_run": "threat=linf_8, or threat.norm=l2 threat.eps=0.5"},
    )
    """The norm and the budget of the attacks; those of the run if nothing is given."""
    protocol: Any = None
    """The attacks."""
    verdict: Any = None
    """Whether the number can be trusted: which indicators are computed."""
    trainer: Any = field(default=None, metadata={"home": "advbench.evaluation."})
    """The devices, and how the model runs on them."""


SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}
"""The top level of each subcommand."""


FROM_THE_RUN = {
    f.name: f.metadata["without_run"] for f in fields(EvalConfig) if "without_run" in f.metadata
}
"""Groups that ``eval`` takes from the run that it evaluates, and what to say without one."""


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    for subcommand, schema in SCHEMAS.items():
        store.store(name=f"{subcommand}_schema", node=schema)
