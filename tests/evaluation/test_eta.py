"""The time that is left, and a budget of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
from made_up_searches import evaluation, files

from advbench.evaluation.eta import Forecast
from advbench.runs.results import Results


def test_a_budget_stops_in_time_and_goes_on(whole: Path, tmp_path: Path) -> None:
    case = evaluation()
    sittings = 0
    while True:
        begin = time.perf_counter()
        results = case.execute(tmp_path, case.plan(), budget=0.15 * 1.05**sittings)
        sittings += 1
        if not results.missing:
            break
        assert time.perf_counter() - begin < 60
        assert Results.load(tmp_path / "results.json").missing == results.missing
        assert results.missing[-1] == "square" and sittings < 200
        assert results.robust.acc >= Results.load(whole / "results.json").robust.acc
    assert sittings > 2
    assert files(tmp_path) == files(whole)
    assert "missing" in (tmp_path / "results.json").read_text()


def test_the_forecast_is_right_within_a_quarter() -> None:
    """On a made-up stage: 200 samples, a third of which break at once and some later."""
    rng = np.random.default_rng(0)
    n, queries, batch_size = 200, 900, 32
    ends = np.where(rng.random(n) < 0.33, rng.integers(1, 60, n), queries)
    late = rng.random(n) < 0.1
    ends[late] = rng.integers(1, queries, late.sum())
    clock = itertools.count()
    forecast = Forecast(queries)
    waiting, under_way, history = list(range(n)), {}, []
    while waiting or under_way:
        while waiting and len(under_way) < batch_size:
            under_way[waiting.pop(0)] = 0
        tick = next(clock)
        forecast.query_seconds = 1.0
        for sample in list(under_way):
            under_way[sample] += 1
            if under_way[sample] == ends[sample]:
                forecast.ended(under_way.pop(sample), bool(ends[sample] < queries))
        ages = np.array(list(under_way.values()), dtype=np.int64)
        history.append((tick, forecast.seconds(ages, len(waiting), batch_size)))
    total = len(history)
    checked = [(tick, left) for tick, left in history if 0.1 < tick / total < 0.9]
    assert len(checked) > 1000
    for tick, left in checked:
        assert abs(left - (total - tick)) <= 0.25 * total, (tick, left, total)
