"""The results of an evaluation, computed from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import torch

from advbench.defenses.base import Traits
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.store import Records, Store
from advbench.runs import provenance
from advbench.runs.results import Accuracy, Results, StageResult


def summarise(
    job: Job,
    identity: Mapping[str, Any],
    stages: Sequence[Stage],
    store: Store,
    *,
    run: str,
    settings: Mapping[str, Any],
    started: datetime,
) -> Results:
    """The results, computed from the records alone: of the samples that were looked at.

    Args:
        job: what was attacked.
        identity: of the plan; data, threat, protocol and model hash are copied from it.
        stages: of the plan, whether they have run or not.
        store: the records.
        run: what was evaluated, for people.
        settings: what sets it apart from others, by key.
        started: the time at which this sitting began.
    """
    clean = store.records(CLEAN)
    n, unseen = len(clean), len(clean) < len(job.samples)
    correct = n - int(clean.broken.sum())
    clean_accuracy = Accuracy.of(correct, n)
    rows, names = [], [stage.name for stage in stages]
    missing = [CLEAN] if unseen else []
    left = owed = clean.sample[~clean.broken]
    for stage in stages:
        records = store.records(stage.name)
        if not np.isin(owed, records.sample).all() or unseen:
            missing.append(stage.name)
        owed = np.setdiff1d(owed, records.sample[records.alone])  # as the engine goes on
        broken = int(np.isin(left, records.sample[records.broken]).sum())
        left = np.setdiff1d(left, records.sample[records.broken])
        correct -= broken
        rows.append(
            StageResult(
                name=stage.name,
                attack=type(stage.attack).__name__,
                target=stage.victim,
                why=stage.why,
                robust_acc=correct / max(n, 1),
                attacked=int((records.forwards > 0).sum()),
                broken=broken,
                seconds=round(store.seconds(stage.name), 3),
                forwards=int(records.forwards.sum()),
                backwards=int(records.backwards.sum()),
            )
        )
    data = identity["data"]
    device = job.samples.device
    return Results(
        run=run,
        settings=dict(settings),
        data={key: data[key] for key in ("name", "split", "n", "sha256")},
        threat=identity["threat"],
        protocol={**identity["protocol"], "seed": job.seed},
        clean=clean_accuracy,
        robust=Accuracy.of(correct, n),
        measures=measures(job.traits, n, [clean, *map(store.records, names)], correct),
        stages=tuple(rows),
        missing=tuple(missing),
        provenance={
            **provenance.code(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "seed": job.seed,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(
                sum(store.seconds(name) for name in (CLEAN, *(stage.name for stage in stages))), 3
            ),
            "model_sha256": identity["model_sha256"],
        },
    )


def measures(traits: Traits, n: int, records: list[Records], correct: int) -> dict[str, float]:
    """Other ways to say what the records hold, shares in [0, 1].

    records: of the clean images and of each stage.  correct: robust samples.
    wra: weighted robust accuracy, the mean of clean and robust.  mean_draw, worst_draw: robust
    accuracy if one evaluation of a stochastic model decides, on average, and if the worst of them
    does.  single_image: the share that no image broke alone among clean ones; an upper bound, since
    the attacks alter whole batches.
    """
    clean = records[0]
    found = {"wra": (float((~clean.broken).sum()) + correct) / (2 * n) if n else 0.0}
    everything = Records.joined(records)
    if traits.stochastic:
        wrong = np.zeros(int(clean.sample.max(initial=-1)) + 1)
        np.maximum.at(wrong, everything.sample, everything.wrong)
        wrong = wrong[clean.sample]
        found["mean_draw"] = float((1 - wrong).sum()) / max(n, 1)
        found["worst_draw"] = float((wrong == 0).sum()) / max(n, 1)
    if traits.batch_dependent:
        fallen = np.unique(everything.sample[everything.alone])
        found["single_image"] = (n - len(fallen)) / max(n, 1)
    return {name: round(value, 6) for name, value in found.items()}
