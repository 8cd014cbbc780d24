"""Protocols ``msa`` and ``adaptive``, planned from the traits and surrogates of a defense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.square import Square
from advbench.defenses.base import Surrogate
from advbench.errors import UserError, did_you_mean
from advbench.evaluation.express import express_stages
from advbench.evaluation.phases import Findings, FollowUp
from advbench.evaluation.plan import Plan
from advbench.evaluation.protocol import Effort, Protocol, Stage, Subject
from advbench.evaluation.protocols import WHY, autoattack, why

Surrogates = Mapping[str, Surrogate]
SEARCHES = ("full", "express")


SETTLES_GRADIENT, SETTLES_EFFORT = "square-long", "apgd-margin-longest"
"""Stages that follow where an indicator of the verdict asks for them."""
NOT_BY_ATTACK = ("outputs", "records")
"""Kinds of indicators that no attack settles."""


@dataclass(frozen=True)
class MSAProtocol(Protocol):
    """Mixed Surrogate Attack: AutoAttack on the real model and on each of its surrogates.

    Where the real gradient is usable, AutoAttack attacks the real model along it; APGD-CE and
    APGD-T attack every surrogate that the defense names. Every image is scored on the real model,
    and a sample has to survive all of it.

    FAB is left out on surrogates: it stops at the surrogate's boundary, short of the model's. On a
    surrogate with a loss of its own, only that loss is raised.

    Raises:
        UserError: for values out of these ranges.
    """

    name: ClassVar[str] = "msa"
    surrogates: ClassVar[bool] = True
    draws: int = 20
    """EOT samples of each gradient of a stochastic victim, at least 1."""
    square: int = 5000
    """Queries of the black-box attack; 0 leaves it out."""
    search: str = "full"
    """``full``, or ``express``: the search of ``protocol=express`` in the place of APGD-CE and
    APGD-T."""

    def __post_init__(self) -> None:
        if self.draws < 1 or self.square < 0:
            raise UserError(f"protocol={self.name} needs draws >= 1 and square >= 0")
        if self.search not in SEARCHES:
            hint = did_you_mean(self.search, SEARCHES)
            raise UserError(f"no protocol.search '{self.search}'{hint}")

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        if self.search == "full":  # as it was before there was another
            del values["search"]
        return values

    def reasons(self, subject: Subject, stages: Sequence[Stage]) -> list[str]:
        reasons, gradient = super().reasons(subject, stages), subject.traits.gradient
        words = {
            "exact": "the model's own gradient is exact: AutoAttack runs along it",
            "discontinuous": "the model is discontinuous: its own gradient does not see the jumps",
            "straight_through": "the model's gradient passes straight through an argmax: it is "
            "that of another function",
            "none": "the model has no gradient: black box and surrogates alone",
        }
        reasons.append(words[gradient])
        if subject.traits.stochastic and self.draws > 1:
            reasons.append(f"gradients of the model are means over {self.draws} EOT samples")
        if gradient != "exact" and not subject.surrogates:
            reasons.append("it names no surrogate: the result is no more than a first look")
        return reasons

    @property
    def effort(self) -> Effort:
        return "cheap"

    def stages(self, subject: Subject) -> list[Stage]:
        if self.search == "express":
            return [*self.short_searches(subject), *self._last(subject)]
        surrogates = {name: s for name, s in subject.surrogates.items() if not s.transfer}
        return [
            *self._on_model("apgd-ce", subject),
            *self._searches(surrogates, subject),
            # On a stochastic model one search on the DLR loss instead of nine, as AutoAttack does.
            *self._on_model("apgd-dlr" if subject.traits.stochastic else "apgd-t", subject),
            *self._targeted(surrogates, subject),
            *self._last(subject),
        ]

    def short_searches(self, subject: Subject) -> list[Stage]:
        """Express on the model, along its own gradient if it has one, and on its surrogates.

        Args:
            subject: what is attacked; surrogates that only transfer images are left out.
        """
        surrogates = {name: s for name, s in subject.surrogates.items() if not s.transfer}
        own = express_stages(subject, draws=self.draws) if subject.traits.gradient != "none" else []
        return [*own, *self._express(surrogates, subject)]

    def _express(self, surrogates: Surrogates, subject: Subject) -> list[Stage]:
        """Express on each surrogate, the usual search where it has an auxiliary loss."""
        express = express_stages(subject, draws=self.draws)
        stages: list[Stage] = []
        for name, surrogate in surrogates.items():
            if surrogate.auxiliary_loss:
                stages += self._searches({name: surrogate}, subject)
            else:
                stages += [self._on(name, surrogate, s.name, s.attack) for s in express]
        return stages

    def _on_model(self, member: str, subject: Subject) -> list[Stage]:
        """A member of AutoAttack on the real model, along its own gradient if it has one."""
        if subject.traits.gradient == "none":
            return []
        draws = self.draws if subject.traits.stochastic else 1
        return [Stage(member, autoattack(member, subject), why(member, subject), eot_samples=draws)]

    def _searches(self, surrogates: Surrogates, subject: Subject) -> list[Stage]:
        """One search on each surrogate, on the loss that suits it."""
        return [
            self._on(
                name,
                surrogate,
                f"apgd-{surrogate.loss}",
                APGD(loss_name=surrogate.loss, large_radius=subject.threat.norm == "l1"),
            )
            for name, surrogate in surrogates.items()
        ]

    def _targeted(self, surrogates: Surrogates, subject: Subject) -> list[Stage]:
        """APGD-T on each surrogate, class by class."""
        attack = autoattack("apgd-t", subject)
        return [
            self._on(name, surrogate, "apgd-t", attack)
            for name, surrogate in surrogates.items()
            if not surrogate.auxiliary_loss
        ]

    def _last(self, subject: Subject) -> list[Stage]:
        """The most expensive: minimal perturbations, and the black box."""
        stages = []
        if not (subject.traits.stochastic or subject.traits.batch_dependent):
            stages += self._on_model("fab-t", subject)
        if self.square:
            stages.append(Stage("square", Square(steps=self.square), WHY["square"]))
        return stages

    def _on(self, name: str, surrogate: Surrogate, what: str, attack: Attack) -> Stage:
        """An attack on a surrogate."""
        draws = self.draws if surrogate.stochastic else 1
        return Stage(f"{what}@{name}", attack, surrogate.why, victim=name, eot_samples=draws)


@dataclass(frozen=True)
class AdaptiveProtocol(MSAProtocol):
    """What a strict reviewer runs: the Mixed Surrogate Attack, then longer and further searches.

    The number after the stages of ``msa`` is msa's. Then come, on the real model and on every
    surrogate, the margin loss from several starts with twice the steps, which also shows whether
    the shorter searches had converged; for a stochastic model more EOT samples, doubled as long as
    that still breaks images, up to 16 times as many; and the images that break other models
    (``transfer=[RUN]``: the undefended twin, a robust model of the same data).

    Then the verdict is computed. Where an indicator is triggered, what settles it follows: Square
    with four times the queries where the gradient misleads, and five times the steps where the
    search had not converged.

    Raises:
        UserError: for values out of these ranges.
    """

    name: ClassVar[str] = "adaptive"
    version: ClassVar[str] = "2"
    steps: int = 200
    """Of each of the longer searches, at least 1."""
    restarts: int = 3
    """Starts of the longer searches, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1:
            raise UserError("protocol=adaptive needs steps >= 1 and restarts >= 1")

    @property
    def effort(self) -> Effort:
        return "all"

    def stages(self, subject: Subject) -> list[Stage]:
        transfer = {name: s for name, s in subject.surrogates.items() if s.transfer}
        return [
            *super().stages(subject),
            *self._longer(subject),
            *self.more_eot_samples(subject),
            *(
                self._express(transfer, subject)
                if self.search == "express"
                else (*self._searches(transfer, subject), *self._targeted(transfer, subject))
            ),
        ]

    def may_follow(self, subject: Subject) -> list[Stage]:
        """The stages that settle the doubts of the verdict's indicators."""
        stages = []
        if self.square:
            why = f"black box, {4 * self.square} queries: what the gradient hides"
            stages.append(Stage(SETTLES_GRADIENT, Square(steps=4 * self.square), why))
        if subject.traits.gradient != "none" and not subject.traits.stochastic:
            l1 = subject.threat.norm == "l1"
            attack = APGD(steps=5 * self.steps, loss_name="margin", large_radius=l1)
            why = f"margin, {5 * self.steps} steps: what fewer steps left"
            stages.append(Stage(SETTLES_EFFORT, attack, why))
        return stages

    def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
        ran = {stage.name for stage in findings.stages}
        doubts: dict[str, list[str]] = {}
        for indicator in findings.indicators:
            if indicator["triggered"] and indicator["kind"] not in NOT_BY_ATTACK:
                effort = indicator["kind"] == "effort"
                doubts.setdefault(SETTLES_EFFORT if effort else SETTLES_GRADIENT, []).append(
                    indicator["id"]
                )
        stages = tuple(s for s in plan.follow_ups if s.name in doubts.keys() - ran)
        if not stages:
            return None
        reasons = (f"{stage.name} follows, for {', '.join(doubts[stage.name])}" for stage in stages)
        return FollowUp(stages, "; ".join(reasons))

    def _longer(self, subject: Subject) -> list[Stage]:
        """More steps and restarts on the margin, except for surrogates with a loss of their own."""
        attack = APGD(
            steps=self.steps,
            restarts=self.restarts,
            loss_name="margin",
            large_radius=subject.threat.norm == "l1",
        )
        why = f"margin, {self.steps} steps, {self.restarts} starts: whether shorter ones converged"
        stages = []
        if subject.traits.gradient != "none" and not subject.traits.stochastic:
            stages.append(Stage("apgd-margin-long", attack, why))
        return stages + [
            replace(self._on(name, surrogate, "apgd-margin-long", attack), why=why)
            for name, surrogate in subject.surrogates.items()
            if not (surrogate.auxiliary_loss or surrogate.transfer)
        ]

    def more_eot_samples(self, subject: Subject) -> list[Stage]:
        """EOT with twice as many samples each time, while that breaks more images; up to 16 times.

        Args:
            subject: what is attacked; without noise, or without a gradient, there are no stages.
        """
        if not subject.traits.stochastic or subject.traits.gradient == "none":
            return []
        stages: list[Stage] = []
        for times in (1, 2, 4, 8, 16):
            draws = times * self.draws
            attack = APGD(loss_name="margin", large_radius=subject.threat.norm == "l1")
            stages.append(
                Stage(
                    f"apgd-margin-eot{draws}",
                    attack,
                    f"margin, mean over {draws} EOT samples",
                    eot_samples=draws,
                    only_if=stages[-1].name if times > 2 else None,
                )
            )
        return stages
