"""The verdict as text: the answers to its two questions, and the next command."""

from __future__ import annotations

import re

from advbench.runs.judgement import Indicator, Question, Verdict
from advbench.runs.results import Results
from advbench.text import count
from advbench.verdict.label import concerns_any_number
from advbench.verdict.registry import INDICATORS

ASKED = {
    "number": "is the number too high?",
    "gradient": "does the model hide its gradient?",
}
"""The questions that are kept apart: one of the model's user, and one of its author."""
LABELS = {
    "reliable": "no known sign that the attacks were misled",
    "inconclusive": "there is a doubt, but no proof",
    "unreliable": "the attacks were misled: better ones may leave much less",
}
"""What a label means, in a few words."""
ANSWERS = {"proof": "yes", "evidence": "probably", "thin": "perhaps"}
"""By the strongest class of what is triggered."""


def triggered(verdict: Verdict) -> list[Indicator]:
    """The triggered indicators, the strongest first."""
    found = [sign for sign in verdict.get("indicators", ()) if sign["triggered"]]
    return sorted(found, key=lambda sign: list(ANSWERS).index(sign["class"]))


def answers(results: Results) -> dict[str, str]:
    """Each question with its answer; nothing without a label."""
    verdict = results.verdict
    if verdict.get("label") is None or not verdict.get("indicators"):
        return {}
    found = {ASKED[question]: _answer(verdict, question) for question in ("number", "gradient")}
    if _cannot_be_too_high(results):
        found[ASKED["number"]] = "no: not one image withstood the attacks"
    return found


def _cannot_be_too_high(results: Results) -> bool:
    """Whether nothing is left, of a model that is the one described."""
    signs = triggered(results.verdict)
    return results.robust.acc == 0 and not any(map(concerns_any_number, signs))


def _answer(verdict: Verdict, question: Question) -> str:
    signs = [sign for sign in triggered(verdict) if sign["question"] == question]
    if signs:
        return f"{ANSWERS[signs[0]['class']]} ({', '.join(sign['id'] for sign in signs)})"
    if triggered(verdict) and question == "number":
        return "perhaps: attacks that follow this gradient may have missed images"
    of = sum(sign["question"] == question for sign in verdict.get("indicators", ()))
    return f"no sign of it ({count(of, 'indicator')})" if of else "nothing was computed on it"


def naive(results: Results) -> float | None:
    """Robust accuracy after the attacks on the model's own gradient that came first.

    Returns:
        A share in [0, 1]; None where it is within the interval of the final number, and where the
        evaluation is unfinished.
    """
    left = None
    for stage in results.stages:
        if stage.target != "model" or stage.attack == "Square":
            break
        left = stage.robust_acc
    interval = results.robust.ci95
    return left if left is not None and interval is not None and left > interval[1] else None


def next_steps(results: Results) -> list[str]:
    """The steps that settle the doubts, without repetition, the strongest first.

    What ran, as the protocol or as one of its stages, is no step any more. Nothing settles what is
    settled: where no image is left.
    """
    if _cannot_be_too_high(results):
        return []
    signs = triggered(results.verdict)
    steps = dict.fromkeys(sign["settles"] for sign in signs if "settles" in sign)
    names = (results.protocol["name"], *(stage.name for stage in results.stages))
    ran = tuple(f"protocol={name}" for name in names)
    return [step for step in steps if re.split(r"[,;]? ", step)[0] not in ran]


def table() -> str:
    """All indicators as a table in Markdown, as ``docs/verdict.md`` shows it."""
    rows = [
        "| indicator | class | asks | cost | what triggers it | source |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{one.id}` | {one.weight} | {one.question} | {one.cost} | {one.about} | {one.source} |"
        for one in INDICATORS
    ]
    return "\n".join(rows)
