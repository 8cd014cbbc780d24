"""Scores the clean images on the real model."""

from __future__ import annotations

import time

import numpy as np
import torch
from scipy.special import bdtrc
from torch import Tensor

from advbench.attacks.referee import Referee
from advbench.devices import out_of_memory
from advbench.errors import UserError
from advbench.evaluation.groups import Group, out_of_memory_error, seed_noise
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.store import Records

VOTES = 10
"""Evaluations of a stochastic model, of which the majority decides."""


FEW_IMAGES = 20
"""Images of which a test says little."""


def votes(job: Job) -> int:
    """Evaluations that decide one image."""
    return VOTES if job.traits.stochastic else 1


def no_better_than_chance(clean: Records, job: Job) -> str | None:
    """A note if the clean accuracy is no better than guessing; None otherwise.

    Guessing means one of the classes at random, or always the one that is most frequent. Better
    means by an exact binomial test at 5 %, or, on a few images, any better at all.

    Args:
        clean: the records of the clean images.
        job: what is evaluated.
    """
    n, correct = len(clean), int((~clean.broken).sum())
    labels = job.samples.split.labels
    counts = np.bincount(labels[torch.from_numpy(clean.sample)].numpy())
    classes = int(labels.max()) + 1
    chance = max(1 / classes, counts.max(initial=0) / max(n, 1))
    p_value = float(bdtrc(correct - 1, n, chance))  # as many by guessing
    if n == 0 or (correct > chance * n and (p_value < 0.05 or n < FEW_IMAGES)):
        return None
    return (
        f"the clean accuracy, {100 * correct / n:.1f} %, is no better than guessing one of "
        f"{classes} classes: are labels or classes in another order, images normalised twice, "
        "weights not loaded?"
    )


def score_clean(
    job: Job, group: Group, members: Tensor, chunk: int
) -> tuple[Records, float] | None:
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
    start, batch = time.perf_counter(), group.rows
    seed_noise(job, CLEAN, group)
    clean = job.samples.fetch(batch)
    try:
        judgement = Referee(job.model, job.threat, chunk, votes(job)).score(clean.x, clean.y)
    except RuntimeError as problem:
        if not out_of_memory(problem):
            raise
        if job.traits.batch_dependent or job.traits.stochastic:
            raise out_of_memory_error(len(batch)) from problem
        return None
    if bad_rows := int((~torch.isfinite(judgement.margin)).sum()):
        raise UserError(
            f"the model's logits are not finite for {bad_rows} of {len(batch)} clean images: "
            "correct the model's forward pass (a logarithm of 0, a division by 0, an overflow)"
        )
    order = batch.argsort()
    order = order[torch.isin(batch[order], members)]
    rows = order.to(clean.x.device)
    zeros = np.zeros(len(order), np.int64)
    broken = judgement.broken[rows].cpu().numpy()
    records = Records(
        sample=batch[order].numpy(),
        broken=broken,
        label=judgement.label[rows].cpu().numpy(),
        margin=judgement.margin[rows].cpu().numpy(),
        distance=zeros.astype(np.float32),
        wrong=judgement.wrong[rows].cpu().numpy(),
        alone=broken,
        forwards=zeros + votes(job),
        backwards=zeros,
    )
    return records, time.perf_counter() - start
