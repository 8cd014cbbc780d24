"""The base class of protocols: named, versioned lists of stages, planned before anything runs.

``protocol.plan(...)`` is a pure function of the ``Subject``. The stages run in order;
each sees only samples that are still correct.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from advbench.errors import UserError, did_you_mean
from advbench.evaluation.phases import Findings, FollowUp
from advbench.evaluation.plan import Plan, Stage, Subject
from advbench.runs.accuracy import Estimate

Effort = Literal["free", "cheap", "all"]
"""Which indicators of the verdict are computed, by their cost."""

RESERVED = {"clean", "model"}
"""What the images as they are, and the real model, are called among stages and targets."""


@dataclass(frozen=True)
class Protocol(ABC):
    """What all protocols share. ``version`` changes whenever the numbers could."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    surrogates: ClassVar[bool] = False
    """Whether it attacks other networks than the real model."""

    @property
    def title(self) -> str:
        """The protocol's name in results."""
        return self.name

    @property
    def effort(self) -> Effort:
        """The indicators of the verdict by default: free after a single attack."""
        return "free"

    @abstractmethod
    def stages(self, subject: Subject) -> list[Stage]:
        """The stages, in order of running; a pure function.

        Args:
            subject: traits, classes, threat and surrogates of what is attacked.

        Raises:
            UserError: where the protocol is not defined for such a model or threat.
        """

    def may_follow(self, subject: Subject) -> list[Stage]:
        """The stages from which ``follow_up`` chooses, for such a ``subject``; none by default."""
        return []

    def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
        """What is to run after ``findings.stages``; None for nothing.

        A pure function: an evaluation that is resumed asks again and gets the same answer.

        Args:
            plan: of this protocol; the stages to choose from are its ``follow_ups``.
            findings: of the plan's stages and of the follow-ups before.
        """
        return None

    def estimate(self, plan: Plan, findings: Findings) -> Estimate | None:
        """What a suite would leave that attacked some of the samples; None if nothing is claimed.

        Args:
            plan: of this protocol.
            findings: of all stages, at the end.
        """
        return None

    def reasons(self, subject: Subject, stages: Sequence[Stage]) -> list[str]:
        """What follows from the traits, in words, and what these stages of the plan leave out.

        Args:
            subject: what is attacked.
            stages: of the plan.

        Returns:
            Sentences; ``plan.json`` keeps them, the command line shows them.
        """
        traits, reasons = subject.traits, []
        if traits.stochastic:
            reasons.append(
                "the model is stochastic: an image is wrong if most of 10 evaluations are, and a "
                "successful attack is confirmed by most of 30 and of 100 fresh ones"
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
                    f"a single EOT sample decides each step of {', '.join(single)}: protocol=msa, "
                    "and autoattack with protocol.suite=rand, take the mean of 20"
                )
        if traits.batch_dependent:
            reasons.append(
                f"the model is batch-dependent: its batches of {traits.batch_size} never change "
                "and are attacked as a whole; an image is broken if it is wrong in the adversarial "
                "batch, or alone among clean images"
            )
        return reasons

    def plan(self, subject: Subject) -> tuple[Stage, ...]:
        """The stages for such a ``subject``, checked.

        Raises:
            UserError: where the protocol would not measure what it says.
        """
        stages = tuple(self.stages(subject))
        self._check_all((*stages, *self.may_follow(subject)), subject)
        return stages

    def _check_all(self, stages: Sequence[Stage], subject: Subject) -> None:
        """Check the stages that run, or may run. Raises UserError."""
        names = [stage.name for stage in stages]
        for what, used_names in (("stage", names), ("surrogate", subject.surrogates)):
            if reserved := RESERVED & set(used_names):
                raise UserError(f"no {what} may have the name '{reserved.pop()}', which is taken")
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
