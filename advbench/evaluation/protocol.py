"""Protocols: named, versioned lists of stages, planned before anything runs.

``protocol.plan(...)`` is a pure function of what is known of the model. The stages run in order;
each sees only samples that are still correct.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from advbench.attacks.base import Attack
from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError, did_you_mean

RESERVED = {"clean", "model"}
"""What the images as they are, and the real model, are called among stages and targets."""


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

    @property
    def follows_model(self) -> bool:
        """Whether it needs the gradient of the real model."""
        return self.victim == "model" and self.attack.gradient

    def to_json(self) -> dict[str, Any]:
        attack = {"type": type(self.attack).__name__, **asdict(self.attack)}
        own = {"draws": self.eot_samples, "eps": self.eps, "only_if": self.only_if}
        return {
            "name": self.name,
            "target": self.victim,
            "why": self.why,
            "attack": attack,
            **{key: value for key, value in own.items() if value not in (1, None)},
        }


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do, and what makes it this one: what plan.json holds."""

    identity: Mapping[str, Any]
    """What must be equal for two evaluations to be the same one."""
    reasons: tuple[str, ...]
    """What the stages follow from, in words."""
    stages: tuple[Stage, ...]
    """In order of running."""
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
            "behaviour": self.behaviour,
            "tensors": self.tensors,
            "keep_images": self.keep_images,
        }
        return json.loads(json.dumps(content))  # as it stands in a file: tuples become lists there


@dataclass(frozen=True)
class Subject:
    """What a plan is made from, and nothing else."""

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


@dataclass(frozen=True)
class Protocol(ABC):
    """What all protocols share. ``version`` changes whenever the numbers could."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    surrogates: ClassVar[bool] = False
    """Whether it attacks other networks than the real model."""

    @property
    def title(self) -> str:
        """The name under which its results are kept."""
        return self.name

    @abstractmethod
    def stages(self, subject: Subject) -> list[Stage]:
        """The stages, in order of running."""

    def reasons(self, subject: Subject, stages: Sequence[Stage]) -> list[str]:
        """What follows from the traits, in words, and what these stages of the plan leave out."""
        traits, reasons = subject.traits, []
        if traits.stochastic:
            reasons.append(
                "the model is stochastic: an image is wrong if most of 10 evaluations are, and "
                "what an attack finds has to be so again in most of 30 and of 100 fresh ones"
            )
            single = [
                stage.name
                for stage in stages
                if stage.follows_model
                and stage.eot_samples == 1
                and stage.attack.queries  # a library's has none, and averages as it likes
            ]
            if single:
                reasons.append(
                    f"single draws decide each step of {', '.join(single)}: protocol=msa, and "
                    "autoattack with protocol.suite=rand, follow means over 20 (EOT)"
                )
        if traits.batch_dependent:
            reasons.append(
                f"the model is batch-dependent: its batches of {traits.batch_size} never change "
                "and are attacked as a whole; an image is broken if it is wrong in the adversarial "
                "batch, or alone among clean images"
            )
        return reasons

    def plan(self, subject: Subject) -> tuple[Stage, ...]:
        """The stages for a model with these traits, classes and surrogates.

        Raises UserError where the protocol would not measure what it says.
        """
        stages = tuple(self.stages(subject))
        names = [stage.name for stage in stages]
        for what, given in (("stage", names), ("surrogate", subject.surrogates)):
            if taken := RESERVED & set(given):
                raise UserError(f"no {what} may have the name '{taken.pop()}', which is taken")
        if len(set(names)) < len(names):
            raise UserError(
                f"protocol={self.title} has stages of the same name: {', '.join(names)}"
            )
        for number, stage in enumerate(stages):
            self._check(stage, names[:number], subject)
            stage.attack.check(subject.num_classes, subject.threat)
            if stage.follows_model and subject.traits.gradient == "none":
                raise UserError(
                    f"protocol={self.title} follows the model's gradient ({stage.name}) and the "
                    "model has none: use protocol=square, or protocol=msa"
                )
            if subject.traits.batch_dependent and not stage.attack.joint:
                raise UserError(
                    f"protocol={self.title} attacks image by image ({stage.name}) and the model is "
                    "batch-dependent: use protocol=msa, which attacks its fixed batches as a whole"
                )
        return stages

    def _check(self, stage: Stage, earlier: list[str], subject: Subject) -> None:
        """Whether a stage's own settings make sense."""
        if stage.eps is not None and stage.eps > subject.threat.radius * (1 + 1e-5):
            raise UserError(
                f"protocol={self.title}: stage {stage.name} goes to eps {stage.eps:g}, beyond the "
                f"threat, {subject.threat}"
            )
        if stage.eot_samples > 1 and not stage.attack.averages:
            raise UserError(
                f"protocol={self.title}: stage {stage.name} takes no mean over EOT samples: take "
                "fab-t in the place of fab"
            )
        if stage.only_if is None:
            return
        if stage.only_if not in earlier:
            raise UserError(
                f"protocol={self.title}: stage {stage.name} waits for '{stage.only_if}', which is "
                f"no earlier stage{did_you_mean(stage.only_if, earlier)}"
            )
        if not (subject.traits.stochastic or subject.traits.batch_dependent):
            raise UserError(
                f"protocol={self.title}: only_if (stage {stage.name}) is for models that are "
                "judged in groups; of others each sample has left when it broke"
            )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.title, "version": self.version, **asdict(self)}
