"""Records of earlier evaluations: used where they fit, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_searches import EPS, Notes, Parts, changed, evaluation, files

from advbench.attacks.threat import Threat
from advbench.evaluation import stage_cache
from advbench.evaluation.protocols import PGDProtocol
from advbench.evaluation.store import read_samples
from advbench.runs.results import Results


def test_records_of_another_evaluation_are_used_where_they_fit(tmp_path: Path) -> None:
    first = evaluation(PGDProtocol(steps=5, loss="margin"), n=20)
    first.execute(tmp_path / "small", first.plan())
    larger = evaluation(PGDProtocol(steps=5, loss="margin"))
    larger.execute(tmp_path / "alone", larger.plan())
    progress = Notes()
    few = first.job.samples.ids
    subset = changed(first, samples=replace(larger.job.samples, ids=few))
    subset.execute(tmp_path / "archive" / "subset", subset.plan())
    results = larger.execute(
        tmp_path / "archive" / "larger", larger.plan(), progress, archive=tmp_path / "archive"
    )
    assert [note.split(":")[0] for note in progress.notes] == ["clean", "pgd-margin"]
    assert "20 samples known from" in progress.notes[0]
    alone = Results.load(tmp_path / "alone" / "results.json")
    assert (results.robust, results.stages[0].forwards) == (
        alone.robust,
        alone.stages[0].forwards,
    )
    flags = [read_samples(tmp_path / d)["pgd-margin"] for d in ("alone", "archive/larger")]
    assert np.array_equal(flags[0].broken, flags[1].broken)
    for change in ({"seed": 1}, {"threat": Threat("linf", EPS / 2)}, {"batch_size": 8}):
        progress = Notes()
        other = changed(larger, **change)
        folder = tmp_path / "archive" / next(iter(change))
        other.execute(folder, other.plan(), progress, archive=tmp_path / "archive")
        assert not any("pgd" in note for note in progress.notes), change


def test_what_an_earlier_stage_breaks_is_not_counted_again(whole: Path, tmp_path: Path) -> None:
    """An archive may know more breaks of a later stage than this plan lets it attack."""
    alone = evaluation(Parts(("square",)))
    alone.execute(tmp_path / "square", alone.plan())
    case = evaluation()
    results = case.execute(tmp_path / "all", case.plan(), archive=tmp_path)
    assert results.robust == Results.load(whole / "results.json").robust
    assert files(tmp_path / "all") == files(whole)


def test_a_finished_evaluation_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(stage_cache, "read_samples", lambda f: (read.append(f), read_samples(f))[1])
    case = evaluation(PGDProtocol(steps=5, loss="margin"))
    case.execute(tmp_path / "first", case.plan())
    progress = Notes()
    case.execute(tmp_path / "second", case.plan(), progress, archive=tmp_path)
    assert [note.split(":")[0] for note in progress.notes] == ["clean", "pgd-margin"]
    assert read == [tmp_path / "first"]


def test_kept_images_are_not_missing_for_knowing_better(tmp_path: Path) -> None:
    case = evaluation(Parts(("apgd",)))
    case.execute(tmp_path / "plain", case.plan())
    case = changed(case, keep_images=True)
    results = case.execute(tmp_path / "images", case.plan(), archive=tmp_path)
    assert results.stages[0].broken > 0
    assert (tmp_path / "images" / "adversarial.safetensors").exists()
