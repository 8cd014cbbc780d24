"""The label (reliable, inconclusive, unreliable), a function of the indicators alone."""

from __future__ import annotations

from collections.abc import Sequence

from advbench.runs.judgement import Indicator, Label, Verdict


def label(indicators: Sequence[Indicator]) -> Label:
    """The label of a number.

    One proof makes it unreliable, and so do two pieces of evidence of different kinds. One piece of
    evidence, or several of one kind, and anything thin make it inconclusive.
    """
    triggered = [indicator for indicator in indicators if indicator["triggered"]]
    classes = {indicator["class"] for indicator in triggered}
    kinds = {indicator["kind"] for indicator in triggered if indicator["class"] == "evidence"}
    if "proof" in classes or len(kinds) >= 2:
        return "unreliable"
    return "inconclusive" if classes else "reliable"


def verdict(
    indicators: Sequence[Indicator], looked_at: Sequence[str], passes: tuple[int, int]
) -> Verdict:
    """The verdict as it stands in ``results.json``.

    Args:
        indicators: what was measured.
        looked_at: ids of the indicators that were computed, those that did not apply too.
        passes: rows passed forward and backward, of all phases of the evaluation.
    """
    return Verdict(
        label=label(indicators),
        indicators=list(indicators),
        looked_at=list(looked_at),
        forwards=passes[0],
        backwards=passes[1],
    )
