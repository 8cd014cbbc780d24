"""The verdict as text: the answers to its two questions, and the next command."""

from __future__ import annotations

from advbench.runs.judgement import Indicator, Question, Verdict
from advbench.runs.results import Results
from advbench.text import count
from advbench.verdict.registry import INDICATORS

ASKED = {
    "number": "is the number too high?",
    "gradient": "does the model hide its gradient?",
}
"""The questions that are kept apart: one of the model's user, and one of its author."""
ANSWERS = {"proof": "yes", "evidence": "probably", "thin": "perhaps"}
"""By the strongest class of what is triggered."""


def triggered(verdict: Verdict) -> list[Indicator]:
    """The triggered indicators, the strongest first."""
    found = [sign for sign in verdict.get("indicators", ()) if sign["triggered"]]
    return sorted(found, key=lambda sign: list(ANSWERS).index(sign["class"]))


def answers(verdict: Verdict) -> dict[str, str]:
    """Each question with its answer; nothing without a label."""
    if verdict.get("label") is None or not verdict.get("indicators"):
        return {}
    return {ASKED[question]: _answer(verdict, question) for question in ("number", "gradient")}


def _answer(verdict: Verdict, question: Question) -> str:
    signs = [sign for sign in triggered(verdict) if sign["question"] == question]
    if signs:
        return f"{ANSWERS[signs[0]['class']]} ({', '.join(sign['id'] for sign in signs)})"
    if triggered(verdict) and question == "number":
        return "not known: no image shows it, but the gradient that was followed misleads"
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

    The protocol that ran is no step any more.
    """
    signs = triggered(results.verdict)
    steps = dict.fromkeys(sign["settles"] for sign in signs if "settles" in sign)
    ran = f"protocol={results.protocol['name']}"
    return [step for step in steps if not step.startswith(ran)]


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
