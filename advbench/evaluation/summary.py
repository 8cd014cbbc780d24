"""The results of an evaluation, computed from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from advbench.defenses.base import Traits
from advbench.devices import name_of
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.phases import to_attack
from advbench.evaluation.protocol import Stage
from advbench.evaluation.store import Records, Store
from advbench.runs import provenance
from advbench.runs.accuracy import Accuracy
from advbench.runs.results import Data, Results, StageResult, Unfinished


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
    """The results, computed from the records alone, of the samples that have any.

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
    n, clean_missing = len(clean), len(clean) < len(job.samples)
    correct = n - int(clean.broken.sum())
    clean_accuracy = Accuracy() if clean_missing else Accuracy.of(correct, n)
    rows, names = [], [stage.name for stage in stages]
    missing = [CLEAN] if clean_missing else []
    survivors = remaining = clean.sample[~clean.broken]
    waiting_ids = np.empty(0, np.int64)
    for stage in stages:
        records = store.records(stage.name)
        pending = np.setdiff1d(to_attack(stage, remaining), records.sample)
        waiting_ids = np.union1d(waiting_ids, pending)
        if len(pending) or clean_missing:
            missing.append(stage.name)
        num_started, forwards, backwards = (
            store.in_progress(stage.name) if len(pending) else (0, 0, 0)
        )
        remaining = np.setdiff1d(remaining, records.sample[records.alone])  # as in the engine
        broken = int(np.isin(survivors, records.sample[records.broken]).sum())
        survivors = np.setdiff1d(survivors, records.sample[records.broken])
        correct -= broken
        rows.append(
            StageResult(
                name=stage.name,
                attack=type(stage.attack).__name__,
                target=stage.victim,
                why=stage.why,
                robust_acc=None if clean_missing else correct / n,
                attacked=int((records.forwards > 0).sum()) + num_started,
                broken=broken,
                seconds=round(store.seconds(stage.name), 3),
                forwards=int(records.forwards.sum()) + forwards,
                backwards=int(records.backwards.sum()) + backwards,
            )
        )
    data = identity["data"]
    device = job.samples.device
    all_records = [clean, *map(store.records, names)]
    robust, unfinished = Accuracy(), None
    if not clean_missing and any(row.attacked or row.name not in missing for row in rows):
        robust = Accuracy(correct / n) if missing else Accuracy.of(correct, n)
    if clean_missing:
        unfinished = Unfinished(0, len(job.samples))
    elif missing:
        num_attacked = int((~clean.broken).sum())
        unfinished = Unfinished(num_attacked - len(waiting_ids), num_attacked)
    provenance_entry: Any = {
        **provenance.code(),
        "device": name_of(device),
        **provenance.drivers(device),
        "seed": job.seed,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(sum(store.seconds(name) for name in (CLEAN, *names)), 3),
        "model_sha256": identity["model_sha256"],
    }
    return Results(
        run=run,
        settings=dict(settings),
        data=Data(**{key: data[key] for key in ("name", "split", "n", "sha256")}),
        threat=identity["threat"],
        protocol=identity["protocol"] | {"seed": job.seed},
        clean=clean_accuracy,
        robust=robust,
        measures={} if missing else measures(job.traits, n, all_records, robust.acc),
        stages=tuple(rows),
        missing=tuple(missing),
        unfinished=unfinished,
        provenance=provenance_entry,
    )


def undecided(job: Job, stages: Sequence[Stage], store: Store) -> bool:
    """Whether a sample has yet to be attacked by one of these stages, or to be classified."""
    clean = store.records(CLEAN)
    remaining = clean.sample[~clean.broken]
    for stage in stages:
        records = store.records(stage.name)
        if not np.isin(to_attack(stage, remaining), records.sample).all():
            return True
        remaining = np.setdiff1d(remaining, records.sample[records.alone])
    return len(clean) < len(job.samples)


def measures(
    traits: Traits, n: int, records: list[Records], robust: float | None
) -> dict[str, float]:
    """Further measures of the same records, shares in [0, 1].

    Args:
        traits: of the model.
        n: images of the evaluation.
        records: of the clean images and of each stage.
        robust: robust accuracy; None if nothing was attacked.

    Returns:
        ``wra``: weighted robust accuracy, the mean of clean and robust. ``mean_draw`` and
        ``worst_draw``: robust accuracy if one evaluation of a stochastic model decides, on average,
        and if the worst of them does. ``single_image``: the share that no image broke alone among
        clean ones; an upper bound, since the attacks alter whole batches.
    """
    clean = records[0]
    values = {} if robust is None else {"wra": (float((~clean.broken).mean()) + robust) / 2}
    all_records = Records.joined(records)
    if traits.stochastic:
        error_rate = np.zeros(int(clean.sample.max(initial=-1)) + 1)
        np.maximum.at(error_rate, all_records.sample, all_records.wrong)
        error_rate = error_rate[clean.sample]
        values["mean_draw"] = float((1 - error_rate).sum()) / max(n, 1)
        values["worst_draw"] = float((error_rate == 0).sum()) / max(n, 1)
    if traits.batch_dependent:
        broken_alone = np.unique(all_records.sample[all_records.alone])
        values["single_image"] = (n - len(broken_alone)) / max(n, 1)
    return {name: round(value, 6) for name, value in values.items()}
