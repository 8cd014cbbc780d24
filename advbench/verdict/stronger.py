"""The indicator of protocols that are a single attack: a stronger search, on what it left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from advbench.evaluation.adaptive import MSAProtocol
from advbench.evaluation.deadline import PassCounter
from advbench.evaluation.engine import Engine
from advbench.evaluation.job import never
from advbench.evaluation.phases import keyed_sample, survivors
from advbench.evaluation.protocol import Subject
from advbench.evaluation.samples import Samples
from advbench.evaluation.store import Store
from advbench.progress import NullProgress
from advbench.verdict.look import Look
from advbench.verdict.reading import Reading, fall, images, of_share

LOOKED_AT = 256
"""Survivors, at most."""
DRAWS = 20
"""EOT samples of each gradient of a stochastic model."""
SOME = 0.01
"""A share of survivors that has to be exceeded for certain."""


def stronger_search(look: Look) -> Reading | None:
    """Survivors of a single attack that the search of ``protocol=express`` breaks.

    It follows the model's gradient, and those of the surrogates that the evaluation has.
    It is a proof where the robust accuracy falls below its own interval, and evidence where it
    falls for certain.
    """
    job = look.job
    left = survivors(look.records, look.stages)  # of a batch-dependent model, in its batch
    if look.complete or job.traits.gradient == "none" or not len(left):
        return None
    some = np.array(keyed_sample(left, LOOKED_AT, job.seed))
    hits = len(np.unique(_broken_by_search(look, some)))
    of, n = len(some), len(job.samples)
    why = (
        f"the search of protocol=express breaks {hits or 'none'} of {images(of)} that "
        f"{_names(look)} had left"
    )
    reading = of_share(hits, of, SOME, why)
    if not reading.triggered:
        return reading
    by, proof = fall(hits, of, len(left), n)
    why += f": the number is too high by {100 * by:.1f} points or more"
    return replace(reading, why=why, weight=None if proof else "evidence")


def _names(look: Look) -> str:
    return ", ".join(stage.name for stage in look.stages)


def _broken_by_search(look: Look, ids: np.ndarray) -> np.ndarray:
    """The samples that the search breaks of these."""
    job, chosen = look.job, torch.from_numpy(ids)
    job = replace(
        job,
        samples=Samples(job.samples.split, chosen, job.samples.device),
        keep_images=False,
        rank=0,
        world_size=1,
        progress=NullProgress(),
        deadline=never,
        passes=PassCounter(),
    )
    classes = look.logits(job.samples.fetch(chosen[:1]).x).shape[1]
    subject = Subject(job.traits, classes, job.threat, job.seed, job.surrogates)
    stages = MSAProtocol(draws=DRAWS, search="express").short_searches(subject)
    store = Store(None)
    Engine(job).run(stages, store)
    records = [store.records(stage.name) for stage in stages]
    look.forwards += len(chosen) + sum(int(part.forwards.sum()) for part in records)
    look.backwards += sum(int(part.backwards.sum()) for part in records)
    return np.concatenate([part.sample[part.broken] for part in records])
