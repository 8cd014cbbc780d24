"""The score of the images as they are, on the real model."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from advbench.attacks.referee import Referee
from advbench.devices import out_of_memory
from advbench.errors import UserError
from advbench.evaluation.groups import Group, no_room, seed_noise
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.store import Records

VOTES = 10
"""Evaluations of a stochastic model, of which the majority decides."""


def votes(job: Job) -> int:
    """Evaluations that decide one image."""
    return VOTES if job.traits.stochastic else 1


def score_clean(job: Job, group: Group, wanted: Tensor, chunk: int) -> tuple[Records, float] | None:
    """Score the clean images of a group on the real model.

    Args:
        job: what is evaluated.
        group: the batch.
        wanted: ids of those that get a record.
        chunk: rows of each pass. It is always full: the last batch rounds as the others do.

    Returns:
        The records and the seconds they took; None if the device has no memory for the chunk.

    Raises:
        UserError: if outputs are not finite, or a batch that can't be cut does not fit.
    """
    begin, batch = time.perf_counter(), group.rows
    seed_noise(job, CLEAN, group)
    clean = job.samples.fetch(batch)
    try:
        judged = Referee(job.model, job.threat, chunk, votes(job)).score(clean.x, clean.y)
    except RuntimeError as problem:
        if not out_of_memory(problem):
            raise
        if job.traits.batch_dependent or job.traits.stochastic:
            raise no_room(len(batch)) from problem
        return None
    if not torch.isfinite(judged.margin).all():
        raise UserError("the model's outputs on clean images are not finite")
    order = batch.argsort()
    order = order[torch.isin(batch[order], wanted)]
    rows = order.to(clean.x.device)
    zeros = np.zeros(len(order), np.int64)
    broken = judged.broken[rows].cpu().numpy()
    records = Records(
        sample=batch[order].numpy(),
        broken=broken,
        label=judged.label[rows].cpu().numpy(),
        margin=judged.margin[rows].cpu().numpy(),
        distance=zeros.astype(np.float32),
        wrong=judged.wrong[rows].cpu().numpy(),
        alone=broken,
        forwards=zeros + votes(job),
        backwards=zeros,
    )
    return records, time.perf_counter() - begin
