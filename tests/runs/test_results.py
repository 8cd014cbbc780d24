"""``results.json``: what it may say, and what contradicts itself."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import LOST, WRONG, N, curve, results
from pydantic import TypeAdapter

from advbench.errors import UserError
from advbench.runs.accuracy import Accuracy
from advbench.runs.results import BEFORE, SCHEMA, Results, Unfinished

OPEN_END = results(missing=("second",))


def put(path: Path, found: Results, *changes: tuple[str, Any]) -> Path:
    """The file of these results with changes: ("stages.0.broken", 3)."""
    values = json.loads(json.dumps(found.to_json()))
    for place, value in changes:
        *way, last = [int(word) if word.isdigit() else word for word in place.split(".")]
        node = values
        for word in way:
            node = node[word]
        node[last] = value
    path.write_text(json.dumps(values))
    return path


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    bare = results(lost=(), protocol={"name": "clean", "version": "1"})
    for found in (results(), OPEN_END, bare, curve("net", 0.9, 0.5, missing=1)):
        found.save(tmp_path / "r.json")
        assert Results.load(tmp_path / "r.json") == found
        assert json.loads((tmp_path / "r.json").read_text())["schema"] == SCHEMA
    with pytest.raises(FrozenInstanceError):
        results().run = "another"  # pyright: ignore[reportAttributeAccessIssue]


def test_every_key_is_described() -> None:
    schema = TypeAdapter(Results).json_schema()
    keys = 0
    for kind in (schema, *schema["$defs"].values()):
        assert kind["description"], kind["title"]
        for name, value in kind["properties"].items():
            # One whose words are those of its class is a reference alone.
            assert value.get("description") or "$ref" in value, (kind["title"], name)
            keys += 1
    assert keys == 66


def test_what_is_unfinished_says_so() -> None:
    assert results().bound() == "45.0 % [30.7, 60.2], an upper bound"
    assert OPEN_END.robust == Accuracy(0.45) and OPEN_END.measures == {}
    assert OPEN_END.bound() == "UNFINISHED: at most 45.0 %, 29 of 38 samples decided"
    assert results(lost=()).bound() == "- (nothing attacked)"
    late = replace(OPEN_END, clean=Accuracy(), robust=Accuracy(), stages=(), missing=("clean",))
    late = replace(late, unfinished=Unfinished(0, N))
    assert late.bound() == f"UNFINISHED: 0 of {N} samples decided" and not late.attacked


CONTRADICTIONS: dict[str, tuple[Results, list[tuple[str, Any]], str]] = {
    "outside": (results(), [("robust.acc", 0.633)], r"robust: 63\.3 % is not in \[30\.7, 60\.2\]"),
    "no share": (results(), [("robust", {"acc": 0.46, "ci95": [0.3, 0.6]})], "no share of 40"),
    "no stage share": (results(), [("stages.0.robust_acc", 0.71)], "71.000 % is no share of 40"),
    "above clean": (
        results(lost=()),
        [("robust", {"acc": 1.0, "ci95": [0.9, 1.0]})],
        "exactly if something was attacked",
    ),
    "more than before": (results(), [("stages.1.broken", 0), ("stages.1.robust_acc", 0.95)],
                         "stage second: 70.0 % before, 0 of 40 broken, 95.0 % after"),
    "not the last": (results(), [("robust", {"acc": 0.5, "ci95": [0.3, 0.6]})], "last stage left"),
    "does not add up": (results(), [("stages.1.broken", 9)], "9 of 40 broken, 45.0 % after"),
    "more broken": (results(), [("stages.0.attacked", 3)], "10 broken of 3 attacked of 40"),
    "more attacked": (results(), [("stages.0.attacked", 41)], "of 41 attacked of 40"),
    "finished and missing": (results(), [("missing", ["second"])], "'missing' and 'unfinished'"),
    "in the middle": (OPEN_END, [("missing", ["first"])], "not the last ones of the plan"),
    "unknown": (OPEN_END, [("missing", ["third"])], "not the last ones of the plan"),
    "all decided": (OPEN_END, [("unfinished.decided", 38)], "all samples are decided"),
    "of more": (OPEN_END, [("unfinished.of", 41)], "all samples are decided"),
    "an interval": (OPEN_END, [("robust.ci95", [0.3, 0.6])], "no interval and no measures"),
    "its mean": (results(), [("measures.wra", 0.9)], "wra is not the mean"),
    "no mean": (results(lost=()), [("measures", {"wra": 0.9})], "without both"),
    "NaN": (results(), [("robust.acc", float("nan"))], "NaN is no number"),
    "negative": (results(), [("stages.0.seconds", -1.0)], "stages.0.seconds: Input should be g"),
    "negative count": (results(), [("stages.0.forwards", -1)], "stages.0.forwards: Input should"),
    "truth": (results(), [("stages.0.forwards", True)], "stages.0.forwards: Input should"),
    "misspelt": (results(), [("clean", {"accuracy": 0.5})], "accuracy"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    assert len(CONTRADICTIONS) == 22
    found, changes, message = CONTRADICTIONS[case]
    path = put(tmp_path / "results.json", found, *changes)
    with pytest.raises(UserError, match=message) as refused:
        Results.load(path)
    text = str(refused.value)
    assert text.startswith(f"{path} is not a result of advbench: ") and "\n" not in text


def test_the_schema_before_is_read_as_what_it_was(tmp_path: Path) -> None:
    """It gave a bound an interval, and a robust accuracy to what nothing attacked."""
    path, wilson = tmp_path / "r.json", {"acc": 0.45, "ci95": [0.3, 0.6]}
    old = ("schema", BEFORE[1])
    found = Results.load(put(path, results(), old))
    assert found == results()
    bare = [("robust", {"acc": 0.95, "ci95": [0.8, 1.0]}), ("measures", {"wra": 0.95})]
    found = Results.load(put(path, results(lost=()), old, *bare))
    assert found.robust == Accuracy() and found.measures == {} and not found.attacked
    cut = [("robust", wilson), ("measures", {"wra": 0.7}), ("unfinished", None)]
    found = Results.load(put(path, OPEN_END, old, *cut))
    assert found == OPEN_END
    last = N - WRONG - LOST
    with pytest.raises(UserError, match="all samples are decided"):
        Results.load(put(path, OPEN_END, old, *cut, ("stages.1.attacked", last)))
    zero = {"acc": 0.0, "ci95": [0.0, 1.0]}
    unseen = [("clean", zero), ("robust", zero), ("missing", ["clean", "first", "second"])]
    found = Results.load(put(path, results(lost=(0, 0), missing=("first", "second")), old, *unseen))
    assert (found.clean, found.robust, found.begun) == (Accuracy(), Accuracy(), ())
    assert found.unfinished == Unfinished(0, N)
