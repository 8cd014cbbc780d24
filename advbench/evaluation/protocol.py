"""Protocols: named, versioned lists of stages, planned before anything runs.

``protocol.plan(...)`` is a pure function of what is known of the model. The stages run in order;
each sees only samples that are still correct.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.libraries import ReferenceAutoAttack, TorchAttack
from advbench.attacks.pgd import PGD
from advbench.attacks.threat import Threat
from advbench.defenses.base import Traits
from advbench.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """An attack on a target. The result is always scored on the real model.

    target: ``model``, or the name of a surrogate.  why: one line on what the stage adds.
    """

    name: str
    attack: Attack
    why: str
    target: str = "model"

    def to_json(self) -> dict[str, Any]:
        attack = {"type": type(self.attack).__name__, **asdict(self.attack)}
        return {"name": self.name, "target": self.target, "why": self.why, "attack": attack}


@dataclass(frozen=True)
class Protocol(ABC):
    """What all protocols share. ``version`` changes whenever the numbers could."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"

    @abstractmethod
    def stages(self, traits: Traits, num_classes: int, threat: Threat, seed: int) -> list[Stage]:
        """The stages, in order of running."""

    def plan(
        self, traits: Traits, num_classes: int, threat: Threat, seed: int
    ) -> tuple[Stage, ...]:
        """The stages for a model with these traits and classes.

        Raises UserError where the protocol would not measure what it says.
        """
        if traits.stochastic or traits.batch_dependent:
            kind = "stochastic" if traits.stochastic else "batch-dependent"
            raise UserError(
                f"protocol={self.name} judges a sample by one prediction and the model is {kind}"
            )
        stages = tuple(self.stages(traits, num_classes, threat, seed))
        for stage in stages:
            stage.attack.check(num_classes, threat)
        return stages

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, **asdict(self)}


@dataclass(frozen=True)
class CleanProtocol(Protocol):
    """Clean accuracy alone."""

    name: ClassVar[str] = "clean"

    def stages(self, traits: Traits, num_classes: int, threat: Threat, seed: int) -> list[Stage]:
        return []


@dataclass(frozen=True)
class PGDProtocol(Protocol):
    """PGD with a fixed step; one step without a random start is FGSM.

    loss: ce, margin or dlr.  step_size: in pixel units; None is 2.5 eps / steps.
    """

    name: ClassVar[str] = "pgd"
    steps: int = 50
    step_size: float | str | None = None
    restarts: int = 1
    loss: str = "ce"
    random_start: bool = True

    def stages(self, traits: Traits, num_classes: int, threat: Threat, seed: int) -> list[Stage]:
        attack = PGD(
            steps=self.steps,
            step_size=self.step_size,
            restarts=self.restarts,
            loss_name=self.loss,
            random_start=self.random_start,
        )
        why = f"{self.steps} steps on the {self.loss} loss, {self.restarts} start(s)"
        return [Stage(f"{self.name}-{self.loss}", attack, why)]


@dataclass(frozen=True)
class FGSMProtocol(PGDProtocol):
    """The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572)."""

    name: ClassVar[str] = "fgsm"
    steps: int = 1
    random_start: bool = False


@dataclass(frozen=True)
class APGDProtocol(Protocol):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690), ours: linf, l2 and l1, two classes and more.

    loss: ce, margin, dlr, margin_targeted or dlr_targeted.  targets: of a targeted loss, at most
    the number of classes less one are used.
    """

    name: ClassVar[str] = "apgd"
    steps: int = 100
    restarts: int = 1
    loss: str = "margin"
    targets: int = 9

    def stages(self, traits: Traits, num_classes: int, threat: Threat, seed: int) -> list[Stage]:
        attack = APGD(
            steps=self.steps,
            restarts=self.restarts,
            loss_name=self.loss,
            targets=min(self.targets, num_classes - 1),
            large_radius=threat.norm == "l1",
        )
        why = f"step size of its own, {self.steps} steps on the {self.loss} loss"
        return [Stage(f"{self.name}-{self.loss}", attack, why)]


_MEMBERS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_WHY = {
    "apgd-ce": "APGD on the cross-entropy",
    "apgd-dlr": "APGD on the DLR loss: scale of the logits does not matter",
    "apgd-t": "APGD on the targeted DLR loss, class by class",
    "fab": "smallest perturbation instead of largest loss",
    "fab-t": "smallest perturbation, class by class",
    "square": "black box: does not need a gradient",
}


@dataclass(frozen=True)
class AutoAttackProtocol(Protocol):
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690), upstream order and parameters.

    suite: standard, plus or rand.  engine: reference is the authors' own code.
    """

    name: ClassVar[str] = "autoattack"
    suite: str = "standard"
    engine: str = "reference"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("suite", self.suite, _MEMBERS),
            ("engine", self.engine, ("reference",)),
        ):
            if value not in known:
                raise UserError(f"no protocol.{what} '{value}'{did_you_mean(value, known)}")

    def stages(self, traits: Traits, num_classes: int, threat: Threat, seed: int) -> list[Stage]:
        targets = min(9, num_classes - 1)
        return [
            Stage(member, ReferenceAutoAttack(member, self.suite, targets, seed), _WHY[member])
            for member in _MEMBERS[self.suite]
        ]


@dataclass(frozen=True)
class TorchattacksProtocol(Protocol):
    """Any attack of torchattacks by name, with the referee's checks.

    attack: name of a class of torchattacks.  params: for its constructor.
    """

    name: ClassVar[str] = "torchattacks"
    attack: str = "PGD"
    params: Mapping[str, Any] = field(default_factory=dict)

    def stages(self, traits: Traits, num_classes: int, threat: Threat, seed: int) -> list[Stage]:
        attack = TorchAttack(self.attack, dict(self.params), num_classes, seed)
        why = "torchattacks' own code, with its own defaults where protocol.params is silent"
        return [Stage(f"torchattacks-{self.attack}", attack, why)]
