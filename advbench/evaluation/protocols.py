"""The shipped protocols, except those in ``adaptive``, ``express`` and ``paper``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.fab import FAB
from advbench.attacks.libraries import ReferenceAutoAttack, TorchAttack
from advbench.attacks.losses import FEWEST_CLASSES
from advbench.attacks.pgd import PGD
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat, pixels
from advbench.errors import UserError, did_you_mean
from advbench.evaluation.protocol import Effort, Protocol, Stage, Subject


@dataclass(frozen=True)
class CleanProtocol(Protocol):
    """Clean accuracy alone."""

    name: ClassVar[str] = "clean"

    def stages(self, subject: Subject) -> list[Stage]:
        return []


@dataclass(frozen=True)
class PGDProtocol(Protocol):
    """PGD with a fixed step; one step without a random start is FGSM."""

    name: ClassVar[str] = "pgd"
    steps: int = 50
    """Steps per search, at least 1."""
    step_size: float | str | None = None
    """In pixel units, ``2/255`` or a number; None is 2.5 eps / steps."""
    restarts: int = 1
    """Searches per sample, at least 1."""
    loss: str = "ce"
    """``ce``, ``margin`` or ``dlr``."""
    random_start: bool = True
    """Start at a random point of the ball, not at the image."""

    def stages(self, subject: Subject) -> list[Stage]:
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
    """One step of eps; more make it PGD without a random start."""
    random_start: bool = False
    """Start at a random point of the ball, not at the image."""


@dataclass(frozen=True)
class APGDProtocol(Protocol):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690), ours: linf, l2, l1, two classes or more."""

    name: ClassVar[str] = "apgd"
    steps: int = 100
    """Steps per search, at least 1."""
    restarts: int = 1
    """Searches per sample, and per target for a targeted loss; at least 1."""
    loss: str = "margin"
    """``ce``, ``margin``, ``dlr``, ``margin_targeted`` or ``dlr_targeted``."""
    targets: int = 9
    """Of a targeted loss; at most the number of classes less one are used."""

    def attack(self, subject: Subject) -> APGD:
        """The attack on such a ``subject``."""
        return APGD(
            steps=self.steps,
            restarts=self.restarts,
            loss_name=self.loss,
            targets=min(self.targets, subject.num_classes - 1),
            large_radius=subject.threat.norm == "l1",
        )

    def stages(self, subject: Subject) -> list[Stage]:
        why = f"step size of its own, {self.steps} steps on the {self.loss} loss"
        return [Stage(f"{self.name}-{self.loss}", self.attack(subject), why)]


@dataclass(frozen=True)
class FABProtocol(Protocol):
    """FAB (Croce & Hein 2020, arXiv 1907.02044): the smallest perturbation, class by class."""

    name: ClassVar[str] = "fab"
    steps: int = 100
    """Steps per search, at least 1."""
    restarts: int = 1
    """Searches per sample and target, at least 1."""
    targets: int = 9
    """Classes to reach; at most the number of classes less one are used."""

    def stages(self, subject: Subject) -> list[Stage]:
        targets = min(self.targets, subject.num_classes - 1)
        attack = FAB(steps=self.steps, restarts=self.restarts, targets=targets)
        return [Stage("fab-t", attack, f"smallest perturbation, {targets} targets")]


@dataclass(frozen=True)
class SquareProtocol(Protocol):
    """The Square attack (Andriushchenko et al. 2020, arXiv 1912.00049): a black box."""

    name: ClassVar[str] = "square"
    steps: int = 5000
    """Queries per search, at least 1."""
    restarts: int = 1
    """Searches per sample, at least 1."""

    def stages(self, subject: Subject) -> list[Stage]:
        attack = Square(steps=self.steps, restarts=self.restarts)
        return [Stage("square", attack, f"black box, {self.steps} queries")]


@dataclass(frozen=True)
class CurveProtocol(APGDProtocol):
    """Robust accuracy over radii up to the threat's, one APGD stage for each.

    A sample that breaks at one radius is broken at every larger one, so a stage attacks only what
    the smaller radii left, and the curve falls by construction.
    """

    name: ClassVar[str] = "curve"
    points: int = 8
    """Evenly spaced radii, the last of which is the threat's; at least 1."""
    eps: list[float | str] | None = None
    """Radii in the place of ``points``, in pixel units, below the threat's, which is added."""

    def radii(self, threat: Threat) -> list[float]:
        """The radii in order, in pixel units; the last is that of ``threat``.

        Raises:
            UserError: for one that is not inside the threat.
        """
        if not threat.radius > 0:
            raise UserError(f"protocol={self.name} needs threat.eps above 0")
        if self.eps is None:
            if self.points < 1:
                raise UserError(f"protocol.points={self.points} is not at least 1")
            return [threat.radius * i / self.points for i in range(1, self.points + 1)]
        near = (1 - 1e-5) * threat.radius, (1 + 1e-5) * threat.radius
        given = {pixels(eps, "protocol.eps") for eps in self.eps}
        radii = sorted({eps for eps in given if not near[0] < eps < near[1]} | {threat.radius})
        if not radii[0] > 0 or radii[-1] > threat.radius:
            raise UserError(
                f"protocol.eps must lie above 0 and at most at threat.eps={threat.radius:g}"
            )
        return radii

    def stages(self, subject: Subject) -> list[Stage]:
        attack, norm = self.attack(subject), subject.threat.norm
        return [
            Stage(f"eps-{eps:.6g}", attack, f"{Threat(norm, eps)}, {self.loss}", eps=eps)
            for eps in self.radii(subject.threat)
        ]


_MEMBERS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


WHY = {
    "apgd-ce": "APGD on the cross-entropy",
    "apgd-dlr": "APGD on the DLR loss: scale of the logits does not matter",
    "apgd-t": "APGD on the targeted DLR loss, class by class",
    "fab": "smallest perturbation instead of largest loss",
    "fab-t": "smallest perturbation, class by class",
    "square": "black box: does not need a gradient",
}


_ENGINES = ("fast", "reference")


@dataclass(frozen=True)
class AutoAttackProtocol(Protocol):
    """AutoAttack (Croce & Hein 2020, arXiv 2003.01690), upstream order and parameters.

    With fewer than four classes, where its DLR losses are not defined, the fast engine takes the
    margin; there are never more targets than wrong classes.

    Raises:
        UserError: for names that do not exist.
    """

    name: ClassVar[str] = "autoattack"
    suite: str = "standard"
    """``standard``, ``plus``, or ``rand``, whose gradients are means over 20 EOT samples."""
    engine: str = "fast"
    """``fast`` is ours, ``reference`` is the authors' own code."""
    attacks: list[str] | None = None
    """Some of its attacks in the place of the suite's, in their order, with the parameters that
    they have in the suite. Their result is not a result of AutoAttack."""

    def __post_init__(self) -> None:
        choices = [("suite", self.suite, _MEMBERS), ("engine", self.engine, _ENGINES)]
        choices += [("attacks", name, WHY) for name in self.attacks or ()]
        for what, value, allowed in choices:
            if value not in allowed:
                raise UserError(f"no protocol.{what} '{value}'{did_you_mean(value, allowed)}")
        if self.attacks == []:
            raise UserError("protocol.attacks=[] attacks nothing: use protocol=clean")

    @property
    def effort(self) -> Effort:
        return "free" if self.attacks else "cheap"

    def stages(self, subject: Subject) -> list[Stage]:
        members = tuple(self.attacks or _MEMBERS[self.suite])
        if self.engine == "reference":
            targets = min(9, subject.num_classes - 1)
            return [
                Stage(
                    member,
                    ReferenceAutoAttack(member, self.suite, targets, subject.seed),
                    WHY[member],
                )
                for member in members
            ]
        if subject.traits.batch_dependent:
            members = tuple(member for member in members if not member.startswith("fab"))
        draws = 20 if self.suite == "rand" else 1
        return [
            Stage(
                member,
                autoattack(member, subject, self.suite),
                why(member, subject),
                eot_samples=draws,
            )
            for member in members
        ]


def why(member: str, subject: Subject) -> str:
    """What a member of AutoAttack adds, in words.

    Args:
        member: such as ``apgd-t``.
        subject: what is attacked; with few classes the loss is another one.
    """
    loss = {"apgd-dlr": "dlr", "apgd-t": "dlr_targeted"}.get(member)
    if loss is None or subject.num_classes >= FEWEST_CLASSES[loss]:
        return WHY[member]
    by_class = ", class by class" if member == "apgd-t" else ""
    return f"APGD on the margin{by_class}: the DLR loss needs {FEWEST_CLASSES[loss]} classes"


def autoattack(member: str, subject: Subject, suite: str = "standard") -> Attack:
    """A member of AutoAttack with the parameters that upstream gives it in that suite and norm.

    Args:
        member: ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t`` or ``square``.
        subject: what is attacked.
        suite: ``standard``, ``plus`` or ``rand``.
    """
    l1 = subject.threat.norm == "l1" and suite == "standard"
    restarts = 5 if suite == "plus" or l1 else 1
    num_wrong = subject.num_classes - 1
    if member == "apgd-ce":
        return APGD(loss_name="ce", restarts=restarts, large_radius=l1)
    if member == "apgd-dlr":
        loss = "dlr" if subject.num_classes >= FEWEST_CLASSES["dlr"] else "margin"
        return APGD(loss_name=loss, restarts=restarts, large_radius=l1)
    if member == "apgd-t":
        has_dlr = subject.num_classes >= FEWEST_CLASSES["dlr_targeted"]
        loss = "dlr_targeted" if has_dlr else "margin_targeted"
        return APGD(loss_name=loss, targets=min(5 if l1 else 9, num_wrong), large_radius=l1)
    if member == "fab":
        return FAB(targeted=False, restarts=restarts)
    if member == "fab-t":
        return FAB(targets=min(9, num_wrong))
    return Square()


@dataclass(frozen=True)
class TorchattacksProtocol(Protocol):
    """Any attack of torchattacks by name, with the referee's checks."""

    name: ClassVar[str] = "torchattacks"
    attack: str = "PGD"
    """A class of torchattacks, such as ``PGD``, ``MIFGSM`` or ``CW``."""
    params: dict[str, Any] = field(default_factory=dict)
    """Arguments of its constructor."""

    def stages(self, subject: Subject) -> list[Stage]:
        attack = TorchAttack(self.attack, dict(self.params), subject.num_classes, subject.seed)
        why = "torchattacks' own code, with its own defaults where protocol.params is silent"
        return [Stage(f"torchattacks-{self.attack}", attack, why)]
