"""Phases: an evaluation runs its plan, then follow-up stages that depend on its findings.

In pseudo-code:

    stages = plan.stages
    repeat:
        run the stages over the samples that have no record of them; all processes meet
        follow_up = protocol.follow_up(plan, findings)
        if follow_up is None: stop
        stages = extended(stages, follow_up.stages)

A follow-up is a pure function of the plan and of what the store holds, so every process computes
the same one, and so does an evaluation that is resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from advbench.attacks.random import KeyedRandom
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.measured import Measured
from advbench.evaluation.plan import Stage
from advbench.evaluation.store import Records, Store
from advbench.runs.judgement import Indicator, Verdict


@dataclass(frozen=True)
class FollowUp:
    """The stages that run next, and why."""

    stages: tuple[Stage, ...]
    """Stages of ``Plan.follow_ups``. One that ran already on some samples (``Stage.only``) may
    come again with more of them, or with all: it then attacks the rest."""
    reason: str
    """Why, in one line."""


@dataclass(frozen=True)
class Findings:
    """The results of an evaluation so far, from which a follow-up is decided."""

    stages: tuple[Stage, ...]
    """Stages that ran, each on all samples that it was to attack."""
    records: Mapping[str, Records]
    """By the name of the stage, and ``clean``."""
    seed: int = 0
    """Of the evaluation."""
    indicators: tuple[Indicator, ...] = ()
    """Of the verdict; empty without a judge."""
    passes: tuple[int, int] = (0, 0)
    """Rows passed forward and backward for the indicators, of all phases."""

    def survivors(self, stages: Sequence[Stage]) -> np.ndarray:
        """Ids of the samples that are correct after these stages, sorted."""
        return survivors(self.records, stages)


def survivors(records: Mapping[str, Records], stages: Iterable[Stage]) -> np.ndarray:
    """Ids of the samples that count as correct after these stages, sorted.

    Args:
        records: of ``clean`` and of the stages, by name.
        stages: that ran.
    """
    clean = records[CLEAN]
    ids = clean.sample[~clean.broken]
    for stage in stages:
        part = records[stage.name]
        ids = np.setdiff1d(ids, part.sample[part.broken])
    return ids


class Judge(Protocol):
    """Computes the indicators, and the verdict from them; ``advbench.verdict`` implements it."""

    @property
    def only(self) -> bool:
        """Whether nothing is to be attacked: the verdict alone is wanted."""
        ...

    def indicators(
        self, job: Job, stages: Sequence[Stage], store: Store, measured: Measured
    ) -> list[Indicator] | None:
        """The indicators, triggered or not; None where ``job.deadline`` passed before the last.

        They depend on the arguments alone: an evaluation that is resumed gets the same ones. One is
        computed in any case, so that short sittings come to an end too.

        Args:
            job: what was attacked.
            stages: that ran, each on all samples that it was to attack.
            store: what they found, of all processes; see ``stage_records``.
            measured: what was computed before; what is computed now is kept there.
        """
        ...

    def adds_to(self, verdict: Verdict) -> bool:
        """Whether its verdict would have indicators that the known ``verdict`` lacks."""
        ...

    def verdict(
        self, indicators: Sequence[Indicator], passes: tuple[int, int], nothing_left: bool
    ) -> Verdict:
        """The verdict on a finished evaluation in which something was attacked.

        Args:
            indicators: triggered or not.
            passes: rows passed forward and backward for the indicators, of all phases.
            nothing_left: whether the robust accuracy is 0.
        """
        ...


def stage_records(stages: Sequence[Stage], store: Store) -> dict[str, Records]:
    """The records of these stages and of the clean images; of a stage that is for some samples
    only, theirs, though an interrupted evaluation may have gone on to others.
    """
    records = {name: store.records(name) for name in (CLEAN, *(s.name for s in stages))}
    for stage in stages:
        if stage.only is not None:
            part = records[stage.name]
            records[stage.name] = part.where(np.isin(part.sample, stage.only))
    return records


def keyed_sample(ids: np.ndarray, size: int, seed: int) -> tuple[int, ...]:
    """The first ``size`` of the ids, in an order that seed and id alone decide; sorted.

    A smaller sample is part of a larger one. Every subset of that size is as likely as another.

    Args:
        ids: to choose from, (N,).
        size: at most N; more takes all.
        seed: of the evaluation.
    """
    keys = torch.from_numpy(np.sort(ids))
    random = KeyedRandom(seed, "sample", keys, torch.zeros_like(keys))
    words = random.words(keys, 2).numpy()
    order = np.lexsort((words[:, 1], words[:, 0]))
    return tuple(np.sort(keys.numpy()[order[:size]]).tolist())


def extended(stages: Sequence[Stage], follow_ups: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages with those of a follow-up; one of the same name replaces the other."""
    by_name = {stage.name: stage for stage in (*stages, *follow_ups)}
    return tuple(by_name.values())


def to_attack(stage: Stage, correct: np.ndarray) -> np.ndarray:
    """The samples that a stage attacks.

    Args:
        stage: all of the samples, or those of ``stage.only``.
        correct: ids of the samples that are still correct before it, sorted.
    """
    return correct if stage.only is None else correct[np.isin(correct, stage.only)]
