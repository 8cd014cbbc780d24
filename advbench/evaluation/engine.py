"""The engine: runs the stages of a plan over samples, and keeps what each sample did."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advbench.attacks.base import Clean, Oracle, attackable
from advbench.attacks.expectation import Expectation
from advbench.attacks.random import hash_of
from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat
from advbench.errors import UserError
from advbench.evaluation.protocol import Stage
from advbench.evaluation.reuse import Archive
from advbench.evaluation.samples import Samples
from advbench.evaluation.search import Search, Watch
from advbench.evaluation.searcher import Shapes, Speed, out_of_memory, searcher
from advbench.evaluation.store import Records, Store

CLEAN = "clean"
VOTES = 10  # evaluations of a stochastic model, of which the majority decides
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
COMPARED = 8  # images on which the search's copy of a model is held against the model


class Nobody:
    """Looks on at nothing."""

    def stage(self, name: str, waiting: int) -> None:
        pass

    def progress(self, done: int, correct: int, n: int, left: float | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@dataclass
class Engine:
    """What is evaluated, and how.

    model: the real one, in evaluation mode.  surrogates: other targets that stages name.
    slots: samples attacked side by side, at most.  share: of this process, (rank, processes).
    archive: what other evaluations know.  hurry: whether time is up.
    """

    model: nn.Module
    samples: Samples
    threat: Threat
    seed: int = 0
    slots: int = 250
    speed: Speed = field(default_factory=Speed)
    stochastic: bool = False
    surrogates: Mapping[str, nn.Module] = field(default_factory=dict)
    keep_images: bool = False
    share: tuple[int, int] = (0, 1)
    watch: Watch = field(default_factory=Nobody)
    archive: Archive | None = None
    hurry: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        # Of all samples, not of this process's: the shape of a batch decides its rounding.
        self.shapes = Shapes(min(self.slots, len(self.samples)))

    def run(self, stages: Sequence[Stage], store: Store) -> bool:
        """Bring ``store`` to hold every stage of the plan, from what it holds already on.

        Returns False if time was up before.
        """
        keep_freed_memory()
        rank, processes = self.share
        mine = self.samples.ids[rank::processes]
        if processes > 1 and not all(stage.attack.queries for stage in stages):
            raise UserError(
                "the attacks of other libraries draw by the batch: run them with trainer.devices=1"
            )
        with attackable(self.model, *self.surrogates.values()), _float32():
            if not self._score_clean(mine, store):
                return False
            correct = held(store, CLEAN, mine)
            prepared: dict[str, nn.Module] = {}
            for stage in stages:
                pending = self._pending(store, stage.name, correct)
                if len(pending):
                    if self.hurry():
                        return False
                    if stage.target not in prepared:
                        prepared = {stage.target: self._searcher(stage.target)}
                    counts = len(held(store, stage.name, correct)), len(mine)
                    search = self._search(stage, prepared[stage.target], store, *counts)
                    if not search.run(pending):
                        return False
                correct = held(store, stage.name, correct)
        return True

    def _search(
        self, stage: Stage, target: nn.Module, store: Store, correct: int, total: int
    ) -> Search:
        threat = self.threat if stage.eps is None else Threat(self.threat.norm, stage.eps)
        if self.stochastic:
            # Noise of the model's own has no key: the stage is repeatable as a whole.
            torch.manual_seed(hash_of(f"{self.seed}/{stage.name}"))
        oracle = Oracle(target) if stage.draws == 1 else Expectation(target, stage.draws)
        return Search(
            stage,
            self.samples,
            threat,
            oracle,
            Referee(self.model, threat, draws=VOTES if self.stochastic else 1),
            self.shapes,
            store,
            seed=self.seed,
            correct=correct,
            total=total,
            exact=stage.target == "model" and self.speed.precision == "32",
            keep_images=self.keep_images,
            watch=self.watch,
            hurry=self.hurry,
        )

    def _searcher(self, target: str) -> nn.Module:
        """The target's copy for searching; finds out which batch sizes suit it."""
        model = self.model if target == "model" else self.surrogates[target]
        while True:
            clean = self.samples.fetch(self.samples.ids[: self.shapes.largest])
            few = Clean(*(part[:COMPARED] for part in clean))
            try:
                fast = searcher(model, self.speed, few, self.stochastic)
                if not self.stochastic:
                    self.shapes.probe(fast, clean)
                break
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
            self._back_off()
        if fast is model:
            self.watch.note(
                f"no faster copy of '{target}': the search runs on it as it is, in float32"
            )
        if not self.stochastic and not self.shapes.placeless:
            self.watch.note(
                "an image's logits depend, in their last bits, on its place in the batch: "
                "a repeated evaluation may round differently"
            )
        return fast

    def _back_off(self) -> None:
        self.shapes.shrink()
        self.watch.note(f"out of memory: going on with batches of {self.shapes.largest}")

    def _pending(self, store: Store, stage: str, attacked: Tensor) -> Tensor:
        """The samples that have no record of the stage, here or in the archive."""
        pending = attacked[~torch.isin(attacked, torch.from_numpy(store.records(stage).sample))]
        if self.archive is not None and not self.stochastic and len(pending):
            for records, seconds, folder in self.archive.records(stage, pending):
                store.append(stage, records, seconds)
                self.watch.note(f"{stage}: {len(records)} samples known from {folder}")
                known = torch.from_numpy(records.sample)
                pending = pending[~torch.isin(pending, known)]
        return pending

    def _score_clean(self, mine: Tensor, store: Store) -> bool:
        pending = self._pending(store, CLEAN, mine)
        if len(pending):
            self.watch.stage(CLEAN, len(pending))
        if self.stochastic:
            torch.manual_seed(hash_of(f"{self.seed}/{CLEAN}"))
        while len(pending):
            if self.hurry():
                return False
            begin = time.perf_counter()
            ids = pending[: self.shapes.largest]
            clean = self.samples.fetch(ids)
            draws = VOTES if self.stochastic else 1
            referee = Referee(self.model, self.threat, self.shapes.largest, draws)
            try:
                judged = referee.score(clean.x, clean.y)
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                judged = None
            if judged is None:
                self._back_off()
                continue
            if not torch.isfinite(judged.margin).all():
                raise UserError("the model's outputs on clean images are not finite")
            zeros = np.zeros(len(ids), np.int64)
            records = Records(
                sample=ids.numpy(),
                broken=judged.broken.cpu().numpy(),
                label=judged.label.cpu().numpy(),
                margin=judged.margin.cpu().numpy(),
                distance=zeros.astype(np.float32),
                forwards=zeros + draws,
                backwards=zeros,
            )
            store.append(CLEAN, records, time.perf_counter() - begin)
            pending = pending[len(ids) :]
            known = store.records(CLEAN)
            self.watch.progress(len(mine) - len(pending), int((~known.broken).sum()), len(known))
        return True


@contextmanager
def _float32() -> Iterator[None]:
    """No TF32 inside: float32 means float32, on a GPU too."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the next one.

    It returns large blocks to the system, and taking their pages anew costs a CPU up to a tenth of
    a small net's time.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for what, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(what, size)


def held(store: Store, stage: str, attacked: Tensor) -> Tensor:
    """The samples that the stage did not break."""
    records = store.records(stage)
    broken = torch.from_numpy(records.sample[records.broken])
    return attacked[~torch.isin(attacked, broken)]
