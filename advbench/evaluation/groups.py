"""Which samples are attacked together: fixed batches, groups that share noise, or none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advbench.attacks.random import hash_of
from advbench.errors import UserError
from advbench.evaluation.job import Job
from advbench.evaluation.samples import fixed_batches

NOISE_GROUP = 64
"""Samples of a stochastic model that are attacked as a whole."""


class Group(NamedTuple):
    """Samples that are attacked as a whole or not at all."""

    rows: Tensor
    """Ids of all samples of the batch."""
    members: Tensor
    """Ids of those that get a record; the others only complete the batch."""


def groups(job: Job) -> list[Group] | None:
    """The groups in which the samples of all processes are attacked.

    Returns:
        The fixed batches of a batch-dependent model; groups of a stochastic one, whose noise is
        drawn group by group; None where samples come and go one by one.

    Raises:
        UserError: for a batch-dependent model that is stochastic too, or has no batch size.
    """
    samples, traits = job.samples, job.traits
    if not traits.batch_dependent:
        chunks = samples.ids.split(min(job.batch_size, NOISE_GROUP))
        return [Group(ids, ids) for ids in chunks] if traits.stochastic else None
    if traits.stochastic:
        raise UserError(
            "the model is stochastic and batch-dependent, and there is no rule yet by which to "
            "judge that: take away one of the two"
        )
    if traits.batch_size is None:
        raise UserError(
            "the model is batch-dependent: say in which batches it is judged, with "
            "traits.batch_size=NUMBER"
        )
    batches, remaining = [], samples.ids
    for batch in fixed_batches(len(samples.split), traits.batch_size):
        members = remaining[torch.isin(remaining, batch)]
        remaining = remaining[~torch.isin(remaining, batch)]
        if len(members):
            batches.append(Group(batch, members))
    return batches


def seed_noise(job: Job, stage: str, group: Group) -> None:
    """Seed a stochastic model's own noise, which has no key: a group is repeatable as a whole."""
    if job.traits.stochastic:
        torch.manual_seed(hash_of(f"{job.seed}/{stage}/{int(group.rows[0])}"))


def out_of_memory_error(rows: int) -> UserError:
    """The error for a batch that does not fit into memory and can't be split."""
    return UserError(
        f"the device has no memory for a batch of {rows} images that is attacked as a whole"
    )
