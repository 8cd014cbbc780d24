"""Results are what the records and the work in progress add up to."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from made_up_searches import evaluation

from advbench.evaluation.engine import Engine
from advbench.evaluation.store import Store
from advbench.evaluation.summary import summarise
from advbench.runs.results import Unfinished


def test_an_interrupted_stage_counts_what_was_spent(tmp_path: Path) -> None:
    """Samples without a record have cost passes and time too."""
    case, looks = evaluation(batch_size=8), itertools.count()
    plan, store = case.plan(), Store(tmp_path)
    engine = Engine(replace(case.job, deadline=lambda: next(looks) > 15))
    assert not engine.run(plan.stages, store)
    held = int((~store.records("clean").broken).sum())
    now = datetime.now(timezone.utc)
    for kept in (Store(tmp_path), store):
        found = summarise(
            case.job, plan.identity, plan.stages, kept, run="net", settings={}, started=now
        )
        first, records = found.stages[0], kept.records(plan.stages[0].name)
        assert 0 < len(records) < first.attacked < held
        assert first.forwards > records.forwards.sum() and first.backwards > 0
        assert first.seconds > 0 and found.robust.ci95 is None and not found.measures
        assert found.unfinished == Unfinished(int(records.broken.sum()), held)
        assert found.robust.acc == first.robust_acc
        assert found.provenance["seconds"] >= first.seconds
