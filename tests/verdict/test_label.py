"""The label is a pure function of the indicators."""

from __future__ import annotations

from typing import Any

import pytest

from advbench.verdict.label import label

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


def _entry(weight: str, kind: str, triggered: bool) -> Any:
    return {"id": "x", "class": weight, "kind": kind, "triggered": triggered, "why": ""}
