"""The label (reliable, inconclusive, unreliable), a function of the indicators alone."""

from __future__ import annotations

from collections.abc import Sequence

from advbench.runs.judgement import Indicator, Label, Verdict

OF_THIS_MODEL = ("outputs", "records")
"""Kinds of indicators that ask whether the number is one of this model at all."""


def label(indicators: Sequence[Indicator], nothing_left: bool = False) -> Label:
    """The label of a number.

    One proof makes it unreliable, and so do two pieces of evidence of different kinds. One piece of
    evidence, or several of one kind, and anything thin make it inconclusive.

    nothing_left: the robust accuracy is 0. It cannot be too high then, whatever the gradient hides:
        only what says that it is of another model counts.
    """
    triggered = [
        indicator
        for indicator in indicators
        if indicator["triggered"] and (not nothing_left or concerns_any_number(indicator))
    ]
    classes = {indicator["class"] for indicator in triggered}
    kinds = {indicator["kind"] for indicator in triggered if indicator["class"] == "evidence"}
    if "proof" in classes or len(kinds) >= 2:
        return "unreliable"
    return "inconclusive" if classes else "reliable"


def concerns_any_number(indicator: Indicator) -> bool:
    """Whether an indicator counts against a robust accuracy of 0, too."""
    return indicator["question"] == "number" and indicator["kind"] in OF_THIS_MODEL


def verdict(
    indicators: Sequence[Indicator],
    looked_at: Sequence[str],
    passes: tuple[int, int],
    nothing_left: bool = False,
) -> Verdict:
    """The verdict as it stands in ``results.json``.

    Args:
        indicators: what was measured.
        looked_at: ids of the indicators that were computed, those that did not apply too.
        passes: rows passed forward and backward, of all phases of the evaluation.
        nothing_left: whether the robust accuracy is 0.
    """
    return Verdict(
        label=label(indicators, nothing_left),
        indicators=list(indicators),
        looked_at=list(looked_at),
        forwards=passes[0],
        backwards=passes[1],
    )
