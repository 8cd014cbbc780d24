"""Follow-ups: stages that an evaluation's own findings call for, on all survivors or a sample."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from test_evaluation import Cut, Impatient, evaluation

from advbench.attacks.pgd import PGD
from advbench.errors import UserError
from advbench.evaluation import search
from advbench.evaluation.engine import Engine
from advbench.evaluation.phases import (
    Findings,
    FollowUp,
    extended,
    keyed_sample,
    stage_records,
    to_attack,
)
from advbench.evaluation.protocol import Plan, Protocol, Stage, Subject
from advbench.evaluation.store import Store, read_samples
from advbench.runs.results import Results

SOME = 7


@dataclass(frozen=True)
class Looked(Protocol):
    """One weak stage, then a strong one on some survivors, then on all if ``rest``."""

    name: ClassVar[str] = "looked"
    rest: bool = False

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("weak", PGD(steps=1, step_size=0.01, random_start=False), "one step")]

    def may_follow(self, subject: Subject) -> list[Stage]:
        return [
            Stage("strong", PGD(steps=5), "five steps"),
            Stage("margin", PGD(steps=5, loss_name="margin"), "five more"),
        ]

    def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
        names = {stage.name: stage for stage in findings.stages}
        if "strong" not in names:
            some = keyed_sample(findings.survivors(plan.stages), SOME, findings.seed)
            stages = tuple(dataclasses.replace(s, only=some) for s in plan.follow_ups)
            return FollowUp(stages, f"a look at {SOME}")
        if self.rest and names["strong"].only is not None:
            return FollowUp(plan.follow_ups, "the rest")
        return None


@dataclass(frozen=True)
class Straight(Looked):
    """The same stages without phases."""

    name: ClassVar[str] = "straight"

    def stages(self, subject: Subject) -> list[Stage]:
        return [*super().stages(subject), *super().may_follow(subject)]

    def may_follow(self, subject: Subject) -> list[Stage]:
        return []

    def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
        return None


class Notes(Impatient):
    """Keeps the notes; never cuts."""

    def __init__(self) -> None:
        super().__init__(10**9)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_follow_up_attacks_a_sample_of_the_survivors_and_no_one_else(tmp_path: Path) -> None:
    case, notes = evaluation(Looked()), Notes()
    results = case.execute(tmp_path, case.plan(), notes)
    assert [stage.name for stage in results.stages] == ["weak", "strong", "margin"]
    assert results.missing == () and results.unfinished is None
    records = read_samples(tmp_path)
    left = records["weak"].sample[~records["weak"].broken]
    some = keyed_sample(left, SOME, seed=0)
    assert tuple(records["strong"].sample) == some
    robust = records["strong"].sample[~records["strong"].broken]
    assert 0 < len(robust) < SOME and (records["margin"].sample == robust).all()
    assert f"a look at {SOME}" in notes.notes
    broken = [stage.broken for stage in results.stages]
    assert broken[0] > 0 and results.robust.acc == pytest.approx(55 / 60 - sum(broken) / 60)


def test_stages_that_come_again_with_all_end_as_if_they_had_run_at_once(tmp_path: Path) -> None:
    folders = tmp_path / "phases", tmp_path / "straight"
    for folder, protocol in zip(folders, (Looked(rest=True), Straight()), strict=True):
        case = evaluation(protocol)
        case.execute(folder, case.plan())
    phases, straight = (Results.load(folder / "results.json") for folder in folders)
    assert [(s.name, s.attacked, s.broken) for s in phases.stages] == [
        (s.name, s.attacked, s.broken) for s in straight.stages
    ]
    first, second = ((folder / "samples.parquet").read_bytes() for folder in folders)
    assert first == second
    counts = Counter(stage.name for stage in phases.stages)
    assert set(counts.values()) == {1}, counts


@pytest.fixture
def restless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMIT_SECONDS", "SHOW_SECONDS", "SAVE_SECONDS"):
        monkeypatch.setattr(search, name, 0.0)
    monkeypatch.setattr(search, "SAVE_SHARE", np.inf)


@pytest.mark.parametrize("rest", [False, True])
def test_cut_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, rest: bool, restless_search: None
) -> None:
    whole = evaluation(Looked(rest=rest), batch_size=8)
    whole.execute(tmp_path / "whole", whole.plan())
    cuts = 0
    while not (tmp_path / "cut" / "results.json").exists():
        case = evaluation(Looked(rest=rest), batch_size=8)
        try:
            case.execute(tmp_path / "cut", case.plan(), Impatient(8 + 2 * cuts))
        except Cut:
            cuts += 1
    assert cuts >= 2
    ends = [(tmp_path / name / "samples.parquet").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    both = [Results.load(tmp_path / name / "results.json").stages for name in ("whole", "cut")]
    assert _but_for_time(both[0]) == _but_for_time(both[1])


def _but_for_time(stages: Any) -> list[Any]:
    return [dataclasses.replace(stage, seconds=0.0) for stage in stages]


def test_a_budget_ends_inside_a_follow_up_and_a_later_sitting_goes_on(tmp_path: Path) -> None:
    plan = evaluation(Looked(rest=True), batch_size=60).plan()
    whole = evaluation(Looked(rest=True), batch_size=60).execute(tmp_path / "whole", plan)
    seen, results = set(), None
    for _ in range(100):
        case = evaluation(Looked(rest=True), batch_size=60)
        results = case.execute(tmp_path / "parts", case.plan(), budget=1e-9)
        seen.add(results.missing)
        if not results.missing:
            break
    assert results is not None and results.robust == whole.robust
    assert ("weak",) in seen or ("clean", "weak") in seen
    assert any("strong" in missing or "margin" in missing for missing in seen), seen


def test_the_plan_names_what_may_follow_and_checks_it(tmp_path: Path) -> None:
    case = evaluation(Looked())
    case.execute(tmp_path, case.plan())
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["name"] for stage in plan["stages"]] == ["weak"]
    assert [stage["name"] for stage in plan["follow_ups"]] == ["strong", "margin"]

    @dataclass(frozen=True)
    class Twice(Looked):
        def may_follow(self, subject: Subject) -> list[Stage]:
            return self.stages(subject)

    with pytest.raises(UserError, match="stages of the same name"):
        evaluation(Twice()).plan()


def test_what_a_follow_up_found_is_known_to_other_evaluations(tmp_path: Path) -> None:
    case = evaluation(Looked())
    case.execute(tmp_path / "first", case.plan())
    other, notes = evaluation(Straight()), Notes()
    other.execute(tmp_path / "second", other.plan(), notes, archive=tmp_path)
    assert any(note.startswith(f"strong: {SOME} samples known") for note in notes.notes)
    third, notes = evaluation(Looked(rest=True)), Notes()
    third.execute(tmp_path / "third", third.plan(), notes, archive=tmp_path)
    ends = [(tmp_path / name / "samples.parquet").read_bytes() for name in ("second", "third")]
    assert ends[0] == ends[1]


class Says:
    """A judge with a fixed answer."""

    def indicators(self, *_: Any) -> list[Any]:
        return [{"id": "made_up", "triggered": True}]

    only = False

    def adds_to(self, verdict: Any) -> bool:
        return False

    def verdict(self, indicators: Any, passes: Any, nothing_left: bool) -> Any:
        return {"label": "reliable", "indicators": []}


def test_a_follow_up_may_rest_on_the_indicators_of_a_judge() -> None:
    @dataclass(frozen=True)
    class Judged(Looked):
        def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
            if len(findings.stages) == 1 and any(i["triggered"] for i in findings.indicators):
                return FollowUp(plan.follow_ups, "made_up was triggered")
            return None

    case = evaluation(Judged())
    assert len(case.execute(None, case.plan()).stages) == 1
    judged = dataclasses.replace(case, judge=Says())
    assert len(judged.execute(None, judged.plan()).stages) == 3


def test_a_keyed_sample_depends_on_seed_and_ids_alone() -> None:
    ids = np.arange(0, 400, 3)
    small, large = keyed_sample(ids, 10, 0), keyed_sample(ids, 40, 0)
    assert set(small) < set(large) and len(small) == 10 and list(large) == sorted(large)
    assert keyed_sample(ids[::-1].copy(), 10, 0) == small != keyed_sample(ids, 10, 1)
    fewer = keyed_sample(np.setdiff1d(ids, small[:4]), 10, 0)  # others move up, in the same order
    assert set(small[4:]) < set(fewer)
    assert keyed_sample(ids, 1000, 0) == tuple(ids.tolist()) and keyed_sample(ids, 0, 0) == ()
    counts = Counter(i for seed in range(300) for i in keyed_sample(np.arange(10), 3, seed))
    assert all(60 <= counts[i] <= 120 for i in range(10)), counts  # 90 each, sd 8


def test_the_stage_that_comes_again_takes_the_place_of_the_first() -> None:
    one, two = (Stage(name, PGD(), "") for name in ("one", "two"))
    some = dataclasses.replace(one, only=(1, 2))
    assert extended((some, two), (one,)) == (one, two)
    assert extended((two,), (some,)) == (two, some)
    correct = np.array([1, 3, 5])
    assert to_attack(some, correct).tolist() == [1] and to_attack(one, correct) is correct
    nobody = to_attack(dataclasses.replace(one, only=()), correct)
    assert nobody.dtype == correct.dtype and not len(nobody)


def test_a_resumed_follow_up_sees_its_own_samples_alone() -> None:
    """An evaluation that was killed after it went on to others asks again, and finds the same."""
    case = evaluation(Looked(rest=True))
    plan, store = case.plan(), Store(None)
    Engine(case.job).run((*plan.stages, *plan.follow_ups), store)
    ids = (20, 21, 22, 30)
    some = dataclasses.replace(plan.follow_ups[0], only=ids)
    seen = stage_records((*plan.stages, some), store)["strong"]
    assert 0 < len(seen) <= 4 < len(store.records("strong")) and set(seen.sample) <= set(ids)
