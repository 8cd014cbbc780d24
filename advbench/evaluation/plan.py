"""``Stage``, ``Plan``, and ``Subject``, from which a protocol makes the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from advbench.attacks.base import Attack
from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate, Traits


@dataclass(frozen=True)
class Stage:
    """An attack on a victim model. The result is always scored on the real model."""

    name: str
    """Unique in the plan; the key of its records and of its random numbers."""
    attack: Attack
    """What searches."""
    why: str
    """One line on what the stage adds."""
    victim: str = "model"
    """The attacked network: ``model``, or the name of a surrogate."""
    eot_samples: int = 1
    """Evaluations of a stochastic victim of which each query takes the mean (EOT)."""
    eps: float | None = None
    """A radius of the stage's own, at most the threat's."""
    only_if: str | None = None
    """An earlier stage: a group of a stochastic model's samples is left out unless that stage
    broke one of them."""
    only: tuple[int, ...] | None = None
    """Ids of the samples that a follow-up attacks, sorted; None for all that are still correct. A
    sample's outcome does not depend on it, so it is no part of plan.json."""

    @property
    def follows_model(self) -> bool:
        """Whether it needs the gradient of the real model."""
        return self.victim == "model" and self.attack.gradient

    def to_json(self) -> dict[str, Any]:
        attack = {"type": type(self.attack).__name__, **asdict(self.attack)}
        settings = {"draws": self.eot_samples, "eps": self.eps, "only_if": self.only_if}
        return {
            "name": self.name,
            "target": self.victim,
            "why": self.why,
            "attack": attack,
            **{key: value for key, value in settings.items() if value not in (1, None)},
        }


@dataclass(frozen=True)
class Plan:
    """The stages of an evaluation and its identity: the content of plan.json."""

    identity: Mapping[str, Any]
    """What must be equal for two evaluations to be the same one."""
    reasons: tuple[str, ...]
    """What the stages follow from, in words."""
    stages: tuple[Stage, ...]
    """In order of running."""
    follow_ups: tuple[Stage, ...] = ()
    """Stages that may follow, as ``Protocol.follow_up`` decides."""
    behaviour: Mapping[str, Any] = field(default_factory=dict)
    """Logits of a few images, see ``advbench.evaluation.identity``."""
    tensors: bool = True
    """Whether the model has any; if not, its hash says little."""
    keep_images: bool = False
    """Whether the adversarial images are kept, beside the identity: no number depends on it."""
    notes: tuple[str, ...] = ()
    """What a person should know of the model before it is attacked; not part of plan.json."""

    def to_json(self) -> dict[str, Any]:
        content = {
            "identity": self.identity,
            "reasons": self.reasons,
            "stages": [stage.to_json() for stage in self.stages],
            "follow_ups": [stage.to_json() for stage in self.follow_ups],
            "behaviour": self.behaviour,
            "tensors": self.tensors,
            "keep_images": self.keep_images,
        }
        return json.loads(json.dumps(content))  # as it stands in a file: tuples become lists there


@dataclass(frozen=True)
class Subject:
    """All that a protocol may use to make a plan."""

    traits: Traits
    """What an attacker must know of the model."""
    num_classes: int
    """Of the model."""
    threat: Threat
    """What the attacks may change."""
    seed: int = 0
    """Of the attacks of other libraries."""
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    """Other victims, by name."""
