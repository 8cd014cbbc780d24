"""Protocol ``express``: a short search, then AutoAttack on a few survivors, the audit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from advbench.attacks.apgd import APGD
from advbench.attacks.express import Express
from advbench.errors import UserError
from advbench.evaluation.estimate import estimate, sample_size
from advbench.evaluation.job import CLEAN
from advbench.evaluation.phases import Findings, FollowUp, keyed_sample
from advbench.evaluation.plan import Plan, Stage, Subject
from advbench.evaluation.protocol import Effort, Protocol
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.runs.accuracy import Estimate
from advbench.runs.judgement import Indicator

STAGE = "express"
FIRST_IN_L1 = "express-ce"
MISLEADING = frozenset({
    "probabilities", "zero_gradient", "gradient_mismatch", "unbounded", "noise", "one_step",
    "black_box", "surrogate_gap", "logit_scale", "monotone",
})  # fmt: skip
"""Indicators that say, if they are triggered, that gradients mislead."""


@dataclass(frozen=True)
class ExpressProtocol(Protocol):
    """Express on every sample, AutoAttack on a few of the survivors.

    Express is 20 steps on the cross-entropy and 20 on the margin of each of three classes; in l1 of
    nine, after one start of AutoAttack's APGD-CE. Then AutoAttack attacks a keyed sample of the
    survivors, the audit: it says, with an exact interval, what AutoAttack would leave of all
    images. Where it breaks too many, it attacks all survivors.
    """

    name: ClassVar[str] = "express"
    steps: int = 20
    """Of each search, at least 2."""
    targets: int = 3
    """Targeted searches, in l1 three times as many; at most the number of classes less one."""
    draws: int = 20
    """EOT samples of each gradient of a stochastic model."""
    audit: int | str = 64
    """Survivors that AutoAttack attacks: a number, 0 for none, ``all``, or ``±0.3``: as many as an
    interval of that half-width, in points, needs where the audit breaks nothing."""
    escalate: bool = True
    """Whether AutoAttack attacks all survivors where the audit breaks too many, or an indicator
    says that gradients mislead."""
    tolerance: float = 0.01
    """Too many: two or more, and a share of the audited above this."""

    def __post_init__(self) -> None:
        if min(self.steps - 1, self.draws, self.targets) < 1:
            raise UserError("protocol=express needs steps >= 2, targets >= 1 and draws >= 1")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"protocol.tolerance={self.tolerance} is not a share from 0 to 1")
        self.audited(survivors=1, n=1)

    def audited(self, survivors: int, n: int) -> int:
        """How many of the survivors of n images the audit attacks.

        Args:
            survivors: images that are still correct after Express, at most ``n``.
            n: images of the evaluation.

        Raises:
            UserError: for an ``audit`` that means nothing.
        """
        text = str(self.audit).strip()
        if text == "all":
            return survivors
        if re.fullmatch(r"\d+", text):
            return min(int(text), survivors)
        if match := re.fullmatch(r"(?:±|\+-|\+/-)\s*(\d+\.?\d*|\.\d+)", text):
            return sample_size(float(match[1]), n, survivors)
        raise UserError(
            f"protocol.audit={self.audit} is no number of samples: write 64, all, 0 or +-0.3"
        )

    def suite(self, subject: Subject) -> AutoAttackProtocol:
        """The suite of AutoAttack for such a model."""
        return AutoAttackProtocol(suite="rand" if subject.traits.stochastic else "standard")

    @property
    def effort(self) -> Effort:
        return "cheap"

    def stages(self, subject: Subject) -> list[Stage]:
        return express_stages(subject, self.steps, self.targets, self.draws)

    def may_follow(self, subject: Subject) -> list[Stage]:
        return self.suite(subject).stages(subject)

    def reasons(self, subject: Subject, stages: Sequence[Stage]) -> list[str]:
        claim = (
            f"then AutoAttack on {self.audit} of the survivors: an estimate of what it would leave"
            if str(self.audit) != "0"
            else "no audit (protocol.audit=0): nothing is claimed of AutoAttack's number"
        )
        return [*super().reasons(subject, stages), claim]

    def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
        ran = {stage.name: stage for stage in findings.stages}
        audit_stage = ran.get(plan.follow_ups[0].name)
        if audit_stage is not None and audit_stage.only is None:
            return None
        if self.escalate and (indicator := misleading(findings.indicators)) is not None:
            return _because(
                plan.follow_ups, f"{indicator['id']} was triggered, so on all survivors"
            )
        survivors = findings.survivors(plan.stages)
        if audit_stage is not None:
            return self._escalation(plan, findings, survivors)
        size = self.audited(len(survivors), len(findings.records[CLEAN]))
        if not size:
            return None
        if size == len(survivors):
            return _because(plan.follow_ups, f"audit of all {size} survivors")
        audited_ids = keyed_sample(survivors, size, findings.seed)
        stages = (replace(stage, only=audited_ids) for stage in plan.follow_ups)
        return _because(stages, f"audit of {size} of {len(survivors)} survivors")

    def _escalation(self, plan: Plan, findings: Findings, survivors: np.ndarray) -> FollowUp | None:
        audited, broken = _audit(plan, findings, survivors)
        # One odd sample escalates nothing: AutoAttack's own draws decide about as many.
        if not self.escalate or broken < 2 or broken <= self.tolerance * audited:
            return None
        return _because(
            plan.follow_ups,
            f"the audit broke {broken} of {audited} (protocol.tolerance={self.tolerance:g}), so on "
            "all survivors",
        )

    def estimate(self, plan: Plan, findings: Findings) -> Estimate | None:
        survivors, n = findings.survivors(plan.stages), len(findings.records[CLEAN])
        no_audit = str(self.audit) == "0" and len(findings.stages) == len(plan.stages)
        if no_audit or not len(survivors):
            return None
        return estimate("AutoAttack", n, len(survivors), *_audit(plan, findings, survivors))


def express_stages(
    subject: Subject, steps: int = 20, targets: int = 3, draws: int = 1
) -> list[Stage]:
    """Express on the model.

    Args:
        subject: what is attacked; there are no more targets than it has wrong classes.
        steps: of each search, at least 2.
        targets: targeted searches, at least 1; in l1 three times as many.
        draws: EOT samples, where the model is stochastic.
    """
    in_l1 = subject.threat.norm == "l1"
    targets = min(3 * targets if in_l1 else targets, subject.num_classes - 1)
    attack = Express(steps=steps, targets=targets)
    why = f"{steps} steps on the cross-entropy and on each of {attack.targets} targets"
    stages = [Stage(STAGE, attack, why)]
    if in_l1:
        why = "one start of AutoAttack's APGD-CE, since in l1 shorter searches miss much"
        stages.insert(0, Stage(FIRST_IN_L1, APGD(large_radius=True), why))
    eot_samples = draws if subject.traits.stochastic else 1
    return [replace(stage, eot_samples=eot_samples) for stage in stages]


def misleading(indicators: Sequence[Indicator]) -> Indicator | None:
    """The first triggered indicator that says that gradients mislead."""
    return next((i for i in indicators if i["triggered"] and i["id"] in MISLEADING), None)


def _audit(plan: Plan, findings: Findings, survivors: np.ndarray) -> tuple[int, int]:
    """How many of the ``survivors`` AutoAttack attacked, and broke."""
    names = {stage.name for stage in plan.follow_ups}
    suite = [stage for stage in findings.stages if stage.name in names]
    audited_ids = next((stage.only for stage in suite), ())
    audited = survivors if audited_ids is None else survivors[np.isin(survivors, audited_ids)]
    robust = findings.survivors((*plan.stages, *suite))
    return len(audited), int((~np.isin(audited, robust)).sum())


def _because(stages: Iterable[Stage], reason: str) -> FollowUp:
    """The stages, each with the reason for them."""
    with_reason = tuple(replace(stage, why=f"{reason}: {stage.why}") for stage in stages)
    return FollowUp(with_reason, f"AutoAttack follows: {reason}")
