"""No list of overrides ends in a traceback: it works, or it is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest

COUNT = 40


@pytest.fixture(autouse=True)
def place(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    return start_in("fuzz", fuzzing.playground)


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_any_list_of_overrides_has_a_clean_answer(verb: str) -> None:
    counts, faults = fuzzing.run(verb, COUNT, seed=1)
    assert not faults
    assert sum(counts.values()) == COUNT
    assert counts["ok"] > 5 and counts["refused"] > 10, counts


def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(_: list[str]) -> int:
        raise KeyError("a bug")

    assert fuzzing.answer(["list", "nope"])[0] == "refused"
    assert fuzzing.answer(["train"])[0] == "ok"
    monkeypatch.setattr(fuzzing, "main", fault)
    assert fuzzing.answer(["train"]) == ("raised KeyError", "'a bug'")
    assert Path("good").is_dir()
