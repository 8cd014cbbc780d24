"""A budget of time or of passes: what it says, and that passes are counted over all sittings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_searches import changed, evaluation, files
from test_evaluation import Cut, Impatient
from test_joint_search import BATCHES, Linear, Noisy
from test_joint_search import evaluation as joint_evaluation

from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation.deadline import Budget, PassCounter, parse
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.store import Store
from advbench.runs.results import Results


def test_a_text_is_a_time_or_a_number_of_passes() -> None:
    for text, value in (("90s", 90), ("10min", 600), ("1.5h", 5400), ("1h 30min", 5400)):
        assert parse(text) == Budget(seconds=value)
    for text, value in (("2e6passes", 2e6), ("1500 passes", 1500), ("2.5E+3passes", 2500)):
        assert parse(text) == Budget(passes=value)
    nonsense = "10", "ten min", "0s", "5 parsecs", "", "-3min", "1h,3min", "0passes", "passes"
    for text in (*nonsense, "-1passes", "2e6", "2e6 passes 10min", "1e999passes", "infpasses"):
        with pytest.raises(UserError, match="is no time and no number of passes: write 90s"):
            parse(text)


def spent(results: Results, clean: int) -> int:
    """The passes in the results, with one of each clean image."""
    return clean + sum(stage.forwards + 2 * stage.backwards for stage in results.stages)


def resumed(case: Evaluation, folder: Path, most: float) -> Results:
    return case.execute(folder, case.plan(), budget=Budget(passes=most))


def test_passes_are_counted_over_all_sittings(whole: Path, tmp_path: Path) -> None:
    case, query = evaluation(), 3 * 16 * 2  # one query of a full batch, and its confirmation
    total = spent(Results.load(whole / "results.json"), 40)
    for most in (20, total // 10, total // 3, total // 2, total - 200):
        results = resumed(case, tmp_path, most)
        assert results.missing and results.unfinished is not None
        assert most <= spent(results, 40) < most + query
        again = resumed(case, tmp_path, most)  # the same command makes no further passes
        assert [row.forwards for row in again.stages] == [row.forwards for row in results.stages]
        assert again.missing == results.missing
    assert not resumed(case, tmp_path, total + 1).missing
    assert files(tmp_path) == files(whole)


def test_a_killed_sitting_counts_too(whole: Path, tmp_path: Path, restless: None) -> None:
    total = spent(Results.load(whole / "results.json"), 40)
    case = evaluation()
    with pytest.raises(Cut):
        case.execute(tmp_path, case.plan(), Impatient(20))
    before = Store(tmp_path)
    made = before.passes(np.arange(40))
    assert 40 < made + before.in_progress("apgd")[1] < total // 3
    results = resumed(case, tmp_path, total // 3)
    assert total // 3 <= spent(results, 40) < total // 3 + 96


@pytest.mark.parametrize("traits", [Traits(stochastic=True), BATCHES])
def test_what_is_attacked_as_a_whole_is_not_lost(traits: Traits, tmp_path: Path) -> None:
    model = Noisy() if traits.stochastic else Linear()
    case = changed(joint_evaluation(model, traits, n=150, total=150), batch_size=500)
    results, most, sittings = resumed(case, tmp_path, 1), 1, 1
    while results.missing:
        before = Store(tmp_path).passes(np.arange(150))
        again = resumed(case, tmp_path, most)
        assert Store(tmp_path).passes(np.arange(150)) == before and again.missing
        most, sittings = before + 1, sittings + 1
        results = resumed(case, tmp_path, most)
        assert sittings < 40
    assert sittings > 3
    assert results.robust == case.execute(tmp_path / "whole", case.plan()).robust


def test_each_process_has_its_share(whole: Path, tmp_path: Path) -> None:
    total = spent(Results.load(whole / "results.json"), 40)
    case, made = evaluation(), []
    names = [stage.name for stage in case.plan().stages]
    for rank in (0, 1):
        job = replace(case.job, rank=rank, world_size=2, passes=PassCounter(total / 6))
        assert not Engine(job).run(case.plan().stages, Store(tmp_path, rank))
        store = Store(tmp_path)
        begun = [store.in_progress(name) for name in names]
        made.append(store.passes(np.arange(40)) + sum(f + 2 * b for _, f, b in begun))
    assert total / 6 <= made[0] < total / 6 + 96
    assert total / 3 <= made[1] < total / 3 + 2 * 96


def test_counting_is_rare_where_much_is_left() -> None:
    counter, looks, made = PassCounter(10_000.0), 0, 0

    def passes() -> int:
        nonlocal looks
        looks += 1
        return made

    counter.begin(500)
    while not counter.spent(passes):
        made += 10
    assert made == 9_500 and looks < 25
    assert not PassCounter().spent(passes) and not PassCounter().limited
