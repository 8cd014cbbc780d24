"""Indicators that need no passes: from the records and the plan."""

from __future__ import annotations

from advbench.evaluation.protocol import Stage
from advbench.runs.accuracy import clopper_pearson
from advbench.verdict.indicator import Look, Reading

PROOF, EVIDENCE = 0.05, 0.01
"""Shares of white-box survivors that a black box must be shown to break."""


def weak_attack(look: Look) -> Reading | None:
    """Whether the attack is one that leaves much to a stronger one."""
    if look.complete:
        return Reading("a whole suite", None, False, "the protocol is a whole suite of attacks")
    names = ", ".join(stage.name for stage in look.stages)
    why = f"only {names} attacked the model: a whole suite of attacks may leave less"
    return Reading(names, None, True, why)


def black_box(look: Look) -> Reading | None:
    """Survivors of the gradient that fall to an attack without it: to Square or to transfer."""
    blind = [stage for stage in look.stages if _is_blind(look, stage)]
    if not look.white_box or not blind:
        return None
    before = look.stages[: look.stages.index(blind[0])]
    left = look.survivors([stage for stage in before if not _is_blind(look, stage)])
    if not len(left):
        return None
    fallen = {int(sample) for stage in blind for sample in look.broken(stage)} & set(left.tolist())
    k, n = len(fallen), len(left)
    low, high = clopper_pearson(k, n)
    why = (
        f"attacks that use no gradient of the model broke {k} of the {n} samples that its gradient "
        "had left"
    )
    weight = "proof" if low > PROOF else "evidence"
    return Reading(k / n, EVIDENCE, low > EVIDENCE, why, (low, high), weight)


def _is_blind(look: Look, stage: Stage) -> bool:
    """Whether a stage follows no gradient of the model, nor of a surrogate made from it."""
    victim, attack = stage.victim, stage.attack
    return not attack.gradient if victim == "model" else look.job.surrogates[victim].transfer
