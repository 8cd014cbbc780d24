"""The label is a pure function of the indicators."""

from __future__ import annotations

from typing import Any

import pytest
from made_up_results import results

from advbench.verdict.label import label
from advbench.verdict.words import answers, next_steps

PROOF = ("proof", "gradient")
EVIDENCE, SAME, OTHER = ("evidence", "gradient"), ("evidence", "gradient"), ("evidence", "search")
THIN = ("thin", "records")


@pytest.mark.parametrize(
    ("triggered", "expected"),
    [
        ([], "reliable"),
        ([THIN], "inconclusive"),
        ([THIN, THIN], "inconclusive"),
        ([EVIDENCE], "inconclusive"),
        ([EVIDENCE, SAME], "inconclusive"),
        ([EVIDENCE, THIN], "inconclusive"),
        ([EVIDENCE, OTHER], "unreliable"),
        ([PROOF], "unreliable"),
        ([PROOF, THIN], "unreliable"),
    ],
)
def test_label(triggered: list[tuple[str, str]], expected: str) -> None:
    quiet = [_entry(weight, "quiet", False) for weight in ("proof", "evidence", "thin")]
    said = [_entry(weight, kind, True) for weight, kind in triggered]
    assert label([*quiet, *said]) == label([*said, *quiet]) == expected


@pytest.mark.parametrize(
    ("kind", "question", "expected", "answer"),
    [
        ("gradient", "gradient", "reliable", "no: not one image withstood the attacks"),
        ("outputs", "gradient", "reliable", "no: not one image withstood the attacks"),
        ("effort", "number", "reliable", "no: not one image withstood the attacks"),
        ("outputs", "number", "unreliable", "yes (x)"),
        ("records", "number", "unreliable", "yes (x)"),
    ],
)
def test_nothing_left_cannot_be_too_high_but_can_be_of_another_model(
    kind: str, question: Any, expected: str, answer: str
) -> None:
    sign: Any = {
        **_entry("proof", kind, True),
        "question": question,
        "settles": "protocol=adaptive",
    }
    assert label([sign]) == "unreliable" and label([sign], nothing_left=True) == expected
    doubted: Any = {"label": expected, "indicators": [sign]}
    none = results(0, verdict=doubted)
    assert answers(none)["is the number too high?"] == answer
    assert next_steps(none) == ([] if expected == "reliable" else ["protocol=adaptive"])


def _entry(weight: str, kind: str, triggered: bool) -> Any:
    entry = {"id": "x", "class": weight, "kind": kind, "triggered": triggered, "why": ""}
    return entry | {"question": "number"}


def test_a_step_that_was_taken_is_no_next_step() -> None:
    common = {"class": "evidence", "triggered": True, "why": "x", "question": "number"}
    steps = ("protocol=adaptive, with surrogates", "traits.stochastic=true")
    signs = [{"id": step, "kind": step, "settles": step, **common} for step in steps]
    doubted: Any = {"label": "unreliable", "indicators": signs}
    ran = results(verdict=doubted, protocol={"name": "adaptive", "version": "2"})
    assert next_steps(ran) == ["traits.stochastic=true"]
    signs += [{"id": "noise", "kind": "noise", "settles": "protocol=square", **common}]
    assert next_steps(ran) == ["traits.stochastic=true"]  # its last stage was square
    other = results(verdict=doubted, protocol={"name": "autoattack", "version": "1"})
    assert next_steps(other)[0].startswith("protocol=adaptive")
