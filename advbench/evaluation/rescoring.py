"""Scores given adversarial images once each; they prove an upper bound of the robust accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advbench.attacks.referee import Judgement, Referee
from advbench.evaluation.clean_images import votes
from advbench.evaluation.groups import Group, groups
from advbench.evaluation.job import Job
from advbench.evaluation.witnesses import Witnesses
from advbench.text import count, percent

UNSURE_RANGE = (0.2, 0.8)
"""Of a stochastic model: where the share of wrong evaluations says little, fresh ones decide."""
FRESH_EVALUATIONS = 100
"""How many: as many as the referee takes to confirm a success."""
RANGE_SLACK = 1e-6
"""By which a pixel may leave [0, 1]: rounding, as in data."""


@dataclass(frozen=True)
class Scores:
    """What was found for each sample that was re-scored; arrays of length N."""

    sample: np.ndarray
    """Ids, sorted."""
    given: np.ndarray
    """Whether there is an adversarial image of it; else its clean image was scored."""
    excess: np.ndarray
    """How far the image is outside the ball, in the threat's norm; 0 inside, NaN if it has NaN."""
    off_range: np.ndarray
    """Whether it leaves [0, 1]."""
    wrong: np.ndarray
    """Whether the image that counts is misclassified: its own if that is a proof, else the clean
    one."""
    label: np.ndarray
    """The class that was predicted for it."""

    @property
    def counts(self) -> np.ndarray:
        """Whether the image lies where the threat allows."""
        return self.given & (self.excess == 0) & ~self.off_range

    @property
    def stands(self) -> np.ndarray:
        """Whether the image proves that the sample is not robust."""
        return self.counts & self.wrong

    @property
    def proven(self) -> float:
        """The robust accuracy is at most that: the share of samples that nothing here breaks."""
        return 1.0 - float(self.wrong.mean())

    def to_json(self) -> dict[str, Any]:
        """What a program reads."""
        outside = self.given & (self.excess != 0)
        farthest = self.excess[outside & np.isfinite(self.excess)]
        return {
            "n": len(self.sample),
            "witnesses": int(self.given.sum()),
            "stand": int(self.stands.sum()),
            "outside_the_ball": int(outside.sum()),
            "farthest_outside": float(farthest.max(initial=0.0)),
            "outside_the_range": int((self.given & self.off_range).sum()),
            "classified_right": int((self.counts & ~self.wrong).sum()),
            "robust_at_most": self.proven,
        }

    def lines(self, threat: str) -> list[str]:
        """What a person reads."""
        summary = self.to_json()
        lines = []
        if outside := summary["outside_the_ball"]:
            farthest = summary["farthest_outside"]
            by = f" by up to {farthest:.2g}" if farthest else ", not a number"
            lines.append(f"{count(outside, 'image')} outside {threat}{by}: not counted")
        if off_range := summary["outside_the_range"]:
            lines.append(f"{count(off_range, 'image')} with pixels outside [0, 1]: not counted")
        if correct := summary["classified_right"]:
            lines.append(f"{count(correct, 'image')} classified right")
        lines.append(
            f"{summary['stand']} of {summary['witnesses']} witnesses stand; "
            f"proven: robust accuracy at most {percent(summary['robust_at_most'])}"
        )
        return lines


def rescore(job: Job, witnesses: Witnesses | None) -> Scores:
    """Score each sample once, in float32, by the rule that the model is deployed with.

    Its adversarial image is scored where there is one that lies inside the threat, else its clean
    image. No pass is larger than the batch size, or than the model's own batch.
    """
    torch.manual_seed(job.seed)
    parts = [_rescored(job, group, witnesses) for group in _batches(job)]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.argsort(columns["sample"], kind="stable")
    return Scores(**{key: column[order] for key, column in columns.items()})


def _batches(job: Job) -> Iterator[Group]:
    if job.traits.batch_dependent:
        yield from groups(job) or ()
        return
    for ids in job.samples.ids.split(job.batch_size):
        yield Group(ids, ids)


def _rescored(job: Job, group: Group, witnesses: Witnesses | None) -> dict[str, np.ndarray]:
    clean = job.samples.fetch(group.rows)
    point, given = clean.x.clone(), torch.zeros(len(group.rows), dtype=torch.bool)
    if witnesses is not None:
        given, images = witnesses.of(group.rows)
        given &= torch.isin(group.rows, group.members)
        point[given.to(point.device)] = images[given[witnesses.has(group.rows)]].to(point)
    # Row by row the tests are those of the referee: float32, up to rounding.
    inside = job.threat.contains(point, clean.x)
    distance = job.threat.distance(point, clean.x)
    excess = torch.where(inside, 0.0, distance - job.threat.radius)
    off_range = ~((point >= -RANGE_SLACK) & (point <= 1 + RANGE_SLACK)).flatten(1).all(1)
    counts = given.to(point.device) & inside & ~off_range
    point = torch.where(counts.view(-1, 1, 1, 1), point, clean.x)
    results = _judged(job, clean.x, point, clean.y, counts)
    members = torch.isin(group.rows, group.members)
    columns = {
        "sample": group.rows,
        "given": given,
        "excess": excess,
        "off_range": off_range,
        "wrong": results[0],
        "label": results[1],
    }
    return {name: column.cpu()[members].numpy() for name, column in columns.items()}


def _judged(job: Job, x: Tensor, point: Tensor, y: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row is wrong, and its label."""
    if not job.traits.batch_dependent:
        referee = Referee(job.model, job.threat, min(job.batch_size, len(y)), votes(job))
        judgement = referee.score(point, y)
        return _majority(referee, judgement, point, y) if referee.draws > 1 else _answer(judgement)
    referee = Referee(job.model, job.threat, chunk=len(y))  # the whole batch in one pass
    wrong, label = _answer(referee.score(x, y))
    for row in counts.nonzero().flatten().tolist():  # an image alone among clean ones
        batch = x.clone()
        batch[row] = point[row]
        judgement = referee.score(batch, y)
        wrong[row], label[row] = judgement.broken[row], judgement.label[row]
    return wrong, label


def _answer(judged: Judgement) -> tuple[Tensor, Tensor]:
    return judged.broken, judged.label


def _majority(
    referee: Referee, judged: Judgement, point: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The majority, of fresh evaluations where that of a few says little."""
    wrong, label = _answer(judged)
    low, high = UNSURE_RANGE
    unsure = ((judged.wrong >= low) & (judged.wrong <= high)).nonzero().squeeze(1)
    if len(unsure):
        confirmation = referee.score(point[unsure], y[unsure], FRESH_EVALUATIONS)
        wrong[unsure], label[unsure] = confirmation.broken, confirmation.label
    return wrong, label
