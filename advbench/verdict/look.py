"""``Look``: the records and the model of an evaluation, as indicators read them; counts passes.

The images that are chosen, and all random numbers, follow from the seed and the ids of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack, Clean, Counted, Oracle, Rows, attackable
from advbench.attacks.pgd import PGD
from advbench.attacks.random import KeyedRandom
from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat
from advbench.devices import full_float32, kept
from advbench.evaluation.clean_images import votes
from advbench.evaluation.fast_model import LogProbabilities
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.phases import keyed_sample
from advbench.evaluation.protocol import Stage
from advbench.evaluation.store import Images, Records

SAMPLES = 64
"""Images that most indicators look at, at most."""
CHUNK = 64
"""Rows of a pass."""

Finding = Literal["correct", "survivors", "left_by_gradient", "searches", "images"]
"""What indicators that cost passes read of an evaluation."""

Watch = Callable[[int, Rows], None]
"""Is shown the step and the rows of a search, before each query and after the last."""


@dataclass
class Look:
    """A finished evaluation, as indicators see it."""

    job: Job
    """What was attacked."""
    stages: tuple[Stage, ...]
    """That ran."""
    records: Mapping[str, Records]
    """What they found, by the name of the stage, and ``clean``."""
    images: Images | None = None
    """Adversarial images of the broken samples, where they were kept."""
    complete: bool = True
    """Whether the protocol is a whole suite of attacks."""
    forwards: int = field(default=0, init=False)
    """Rows passed forward so far."""
    backwards: int = field(default=0, init=False)
    """Rows passed backward so far."""

    # --- records --------------------------------------------------------------------------------

    @property
    def correct(self) -> np.ndarray:
        """Ids of the samples that are classified correctly without an attack, sorted."""
        clean = self.records[CLEAN]
        return clean.sample[~clean.alone]

    def survivors(self, stages: Sequence[Stage] | None = None) -> np.ndarray:
        """Ids of the samples that are correct after these stages, sorted; None is all of them."""
        left = self.correct
        for stage in self.stages if stages is None else stages:
            left = np.setdiff1d(left, self.broken(stage))
        return left

    def attacked(self, stages: Sequence[Stage]) -> np.ndarray:
        """Ids of the samples that one of these stages attacked, sorted."""
        ids = [self.records[stage.name].sample for stage in stages]
        return np.unique(np.concatenate([np.empty(0, np.int64), *ids]))

    def broken(self, stage: Stage) -> np.ndarray:
        """Ids of the samples that a stage broke, sorted."""
        records = self.records[stage.name]
        return records.sample[records.alone]

    def is_blind(self, stage: Stage) -> bool:
        """Whether a stage follows no gradient of the model, nor of a surrogate made from it."""
        if stage.victim == "model":
            return not stage.attack.gradient
        return self.job.surrogates[stage.victim].transfer

    @property
    def white_box(self) -> list[Stage]:
        """Stages that follow the gradient of the real model."""
        return [stage for stage in self.stages if stage.follows_model]

    @property
    def left_by_gradient(self) -> np.ndarray:
        """Ids of the samples that attacks along gradients left, sorted."""
        return self.survivors([stage for stage in self.stages if not self.is_blind(stage)])

    def finding(self, name: Finding) -> list[Any]:
        """Plain values of a finding, which decide what an indicator that rests on it measures."""
        if name == "searches":
            return [stage.to_json() for stage in self.white_box]
        if name == "images":
            return [] if self.images is None else self.images.ids.tolist()
        ids = {"survivors": self.survivors, "correct": lambda: self.correct}
        return ids.get(name, lambda: self.left_by_gradient)().tolist()

    # --- the model ------------------------------------------------------------------------------

    @property
    def by_image(self) -> bool:
        """Whether the model judges image by image; only then does a look at a few say anything."""
        return not self.job.traits.batch_dependent

    @property
    def follows(self) -> bool:
        """Whether the model's gradient can be followed, image by image."""
        return self.by_image and self.job.traits.gradient != "none"

    @property
    def victim(self) -> nn.Module:
        """What a search follows: the model, by the logarithm of what it calls probabilities."""
        model = self.job.model
        return LogProbabilities(model).eval() if self._shares else model

    @property
    def _shares(self) -> bool:
        return self.job.traits.output == "probabilities"

    def sample(self, ids: np.ndarray, size: int = SAMPLES) -> Clean:
        """The first ``size`` of the ids in a keyed order, with their images and labels."""
        chosen = torch.tensor(keyed_sample(ids, size, self.job.seed), dtype=torch.int64)
        return self.job.samples.fetch(chosen)

    def random(self, name: str, ids: Tensor, restart: int = 0) -> KeyedRandom:
        """Draws for these samples, which no other indicator and no stage has."""
        return KeyedRandom(self.job.seed, f"verdict/{name}", ids, torch.full_like(ids, restart))

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """The victim, whose passes are counted; its parameters are frozen, float32 is full."""
        model = Counted(self.victim)
        with attackable(self.job.model), full_float32():
            yield model
        self.count(model)

    def count(self, model: Counted) -> None:
        self.forwards += model.forwards
        self.backwards += model.backwards

    def logits(self, x: Tensor) -> Tensor:
        """Logits of images (N, C, H, W), without a gradient: (N, K)."""
        with self.counting() as model, torch.no_grad():
            return torch.cat([_logits(model(part)) for part in x.split(CHUNK)])

    def gradient(self, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The gradient of each image's loss, (N, C, H, W), as the model gives it."""
        parts = []
        with self.counting() as model, torch.enable_grad():
            for some, classes in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                point = some.detach().clone().requires_grad_()
                total = loss(_logits(model(point)), classes).sum()
                (grad,) = torch.autograd.grad(total, point, allow_unused=True)
                parts.append(torch.zeros_like(point) if grad is None else kept(grad))
        return torch.cat(parts)

    def wrong(self, point: Tensor, clean: Clean, threat: Threat | None = None) -> Tensor:
        """Which points the referee calls adversarial, (N,)."""
        threat = threat or self.job.threat
        referee = Referee(self.job.model, threat, min(CHUNK, len(point)), votes(self.job))
        judged = referee.judge(clean.x, clean.y, point)
        self.forwards += int(judged.evaluations.sum())
        return judged.broken

    def search(
        self,
        name: str,
        attack: Attack,
        clean: Clean,
        *,
        threat: Threat | None = None,
        scale: float = 1.0,
        stage: str | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """One search for each image, every point of which the referee judges.

        Args:
            name: of the search, for its random numbers.
            attack: makes one search per image.
            clean: the images.
            threat: where the search may go; None is the evaluation's.
            scale: by which the logits are multiplied for the search.
            stage: use that stage's random numbers instead, to search as it did.
            watch: is shown every step.

        Returns:
            Which images broke, (N,).
        """
        threat, broken = threat or self.job.threat, torch.zeros_like(clean.y, dtype=torch.bool)
        oracle = Oracle(Scaled(self.victim, scale).eval())
        with attackable(self.job.model), full_float32():
            for part in torch.arange(len(clean.y), device=clean.y.device).split(CHUNK):
                rows = self._start(
                    name, stage, oracle, attack, Clean(*(c[part] for c in clean)), threat
                )
                for step in range(attack.queries + 1):
                    if watch is not None:
                        watch(step, rows)
                    found = self.wrong(rows.point, Clean(rows.ids, rows.x, rows.y), threat)
                    broken[part[found]] = True
                    rows, part = rows.take(~found), part[~found]
                    if not len(part) or step == attack.queries:
                        break
                    draws = self._draws(name, stage, rows.ids)
                    attack.advance(rows, attack.ask(oracle, rows, threat), threat, draws)
        self.count(oracle.model)
        return broken

    def _draws(self, name: str, stage: str | None, ids: Tensor) -> KeyedRandom:
        if stage is None:
            return self.random(name, ids)
        return KeyedRandom(self.job.seed, stage, ids, torch.zeros_like(ids))

    def _start(
        self,
        name: str,
        stage: str | None,
        oracle: Oracle,
        attack: Attack,
        clean: Clean,
        threat: Threat,
    ) -> Rows:
        draws = self._draws(name, stage, clean.ids)
        return attack.start(oracle, clean, threat, draws, torch.zeros_like(clean.ids))


class Scaled(nn.Module):
    """A model with its logits times a number."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return _logits(self.model(x)) * self.scale


def _logits(answer: Tensor) -> Tensor:
    return answer.float()


def short_search(threat: Threat, loss: str, steps: int, *, random_start: bool = False) -> Attack:
    """A plain search of few steps: PGD, in l1 APGD."""
    if threat.norm == "l1":
        return APGD(steps=steps, loss_name=loss, large_radius=False)
    return PGD(steps=steps, loss_name=loss, random_start=random_start)
