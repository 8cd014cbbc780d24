"""The job: what all parts of an evaluation share (model, samples, threat, batch size, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation.checks import learns
from advbench.evaluation.deadline import PassCounter
from advbench.evaluation.fast_model import FastModelOptions
from advbench.evaluation.samples import Samples
from advbench.progress import NullProgress, Progress

CLEAN = "clean"
"""The name under which the records of the clean images are kept."""


def never() -> bool:
    """The deadline of an evaluation without a budget."""
    return False


@dataclass(frozen=True)
class Job:
    """What is attacked, and how. Evaluation, engine and searches share this object.

    Raises:
        UserError: for a batch size below 1, and for a surrogate in training mode.
    """

    model: nn.Module
    """The real model, in evaluation mode on its device; it alone decides what is broken."""
    samples: Samples
    """The images that are attacked, with their labels."""
    threat: Threat
    """What an attack may change."""
    traits: Traits = field(default_factory=Traits)
    """What an attacker must know of the model."""
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    """Other networks that stages attack, by name."""
    seed: int = 0
    """Of all random numbers, which are keyed by it, the stage, the sample and the iteration."""
    batch_size: int = 250
    """Samples attacked side by side, at most."""
    fast_model: FastModelOptions = field(default_factory=FastModelOptions)
    """Precision and compilation of the model's copy that searches run on."""
    deterministic: bool = False
    """On a GPU, the same bits in every run, at some cost."""
    keep_images: bool = False
    """Whether the adversarial images are kept."""
    rank: int = 0
    """Of this process among those that share the work."""
    world_size: int = 1
    """Processes that share the work; each takes every ``world_size``-th sample."""
    progress: Progress = field(default_factory=NullProgress)
    """Shows how far the work is."""
    deadline: Callable[[], bool] = never
    """Whether time is up; read between two queries."""
    passes: PassCounter = field(default_factory=PassCounter)
    """Counts the passes where there is a budget of them; read between two queries too."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"a batch size of {self.batch_size} is not at least 1")
        for name, surrogate in self.surrogates.items():
            if learns(surrogate.model):  # it would write into statistics that it shares
                raise UserError(
                    f"surrogate '{name}' is in training mode: call .eval() on its model"
                )
