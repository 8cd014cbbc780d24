"""Express with its audit and its escalation: interrupted, shared or in another order, it is equal.

AutoAttack is a quick stand-in, and the model rounds its input, so that the audit escalates.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_searches import files
from processes import together
from test_evaluation import Cut
from test_express_protocol import SUITE, QuickExpress, mlp

from advbench.evaluation import search
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.resources import Resources
from advbench.evaluation.store import read_samples
from advbench.progress import NullProgress
from advbench.runs.results import Results

N, AUDIT = 40, 8


def masked() -> Evaluation:
    return mlp(QuickExpress(audit=AUDIT), n=N, masked="quantised", eps=0.35)


class CutIn(NullProgress):
    """Ends an evaluation in the middle of a phase, in which everything is written down at once."""

    def __init__(self, phase: int, after: int, patch: pytest.MonkeyPatch) -> None:
        self.phase, self.after, self.begun = phase, after, 0
        patch.setattr(search, "SHOW_SECONDS", 0.0)
        patch.setattr(search, "SAVE_SHARE", math.inf)
        self.patch = patch

    def note(self, text: str) -> None:
        self.begun += text.startswith("AutoAttack follows")

    def update(self, *_: object, **__: object) -> None:
        if self.begun == self.phase:
            self.after -= 1
            for name in ("COMMIT_SECONDS", "SAVE_SECONDS"):
                self.patch.setattr(search, name, 0.0)
        if self.after < 0:
            raise Cut


def but_for_time(folder: Path) -> dict[str, Any]:
    results = Results.load(folder / "results.json")
    stages = tuple(replace(stage, seconds=0.0) for stage in results.stages)
    return {**replace(results, stages=stages).to_json(), "provenance": None}


@pytest.fixture
def undisturbed(once: Callable[[str, Callable[[], None]], Path]) -> Path:
    def make() -> None:
        case = masked()
        results = case.execute(Path("."), case.plan())
        assert "the audit broke" in results.stages[-1].why
        assert results.stages[0].attacked > 20 and results.stages[0].broken > 0
        assert results.estimate is not None and results.estimate.audited > AUDIT

    return once("express", make)


def same(folder: Path, other: Path) -> None:
    assert files(folder) == files(other)
    assert but_for_time(folder) == but_for_time(other)


@pytest.mark.parametrize("phase", [0, 1, 2], ids=["express", "audit", "escalation"])
def test_killed_and_resumed_it_ends_the_same(
    phase: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in (3, 10, 1):
        case = masked()
        with monkeypatch.context() as patch, pytest.raises(Cut):
            case.execute(tmp_path, case.plan(), CutIn(phase, after, patch))
        assert (tmp_path / "journal").is_dir() and not (tmp_path / "samples.parquet").exists()
    case = masked()
    case.execute(tmp_path, case.plan())
    same(tmp_path, undisturbed)


def work(folder: str, devices: int) -> int:
    """One of the processes that share the evaluation."""
    group = Resources("cpu", devices).launch()
    case = masked()
    case.execute(Path(folder), case.plan(), group=group)
    return 0


def test_two_processes_end_the_same(undisturbed: Path, tmp_path: Path) -> None:
    together(2, work, str(tmp_path), 2, folder=tmp_path)
    same(tmp_path, undisturbed)


def test_the_order_of_the_samples_is_irrelevant(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def shuffled(positions: Iterable[int]) -> deque[int]:
        order = list(positions)
        random.Random(len(order)).shuffle(order)
        seen.append(order)
        return deque(order)

    monkeypatch.setattr(search, "deque", shuffled)
    case = masked()
    case.execute(tmp_path, case.plan())
    assert any(order != sorted(order) for order in seen) and len(seen) == 1 + 2 * len(SUITE)
    same(tmp_path, undisturbed)
    assert set(read_samples(tmp_path)) == {"clean", "express", *SUITE}
