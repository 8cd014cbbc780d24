"""The engine: runs the stages of a plan over samples, and keeps what each sample did.

For each stage, in pseudo-code:

    waiting = samples that are still correct and have no record of this stage
    repeat until nobody waits and no slot is taken:
        fill free slots with waiting samples; the attack starts them
        query the model at every slot's point; what looks like a success goes to the referee
        the attack advances the others; the referee judges the points where a search ends
        a sample that broke, or has no search left, leaves its slot with a record
        a sample with a search left waits again
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.base import Answer, Clean, Oracle, Rows
from advbench.attacks.random import KeyedRandom
from advbench.attacks.referee import Referee, finite
from advbench.attacks.threat import Threat
from advbench.data.base import Split
from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation.protocol import Stage
from advbench.evaluation.store import Records, Store

CLEAN = "clean"
COMMIT_SECONDS = 2.0
PROBE = 16  # images


class Watch(Protocol):
    """Who looks on while an evaluation runs."""

    def stage(self, name: str, waiting: int) -> None:
        """A stage begins with so many samples to attack."""
        ...

    def progress(self, done: int, correct: int, n: int) -> None:
        """So many of the stage's samples are done; of all n, so many are still correct."""
        ...


class Nobody:
    """Looks on at nothing."""

    def stage(self, name: str, waiting: int) -> None:
        pass

    def progress(self, done: int, correct: int, n: int) -> None:
        pass


@dataclass(frozen=True)
class Samples:
    """The samples of an evaluation: rows ``ids`` (sorted) of a split, on a device."""

    split: Split
    ids: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, ids: Tensor) -> Clean:
        x, y = self.split.fetch(ids, self.device)
        return Clean(ids.to(self.device), x, y)


def subset(total: int, n: int | None) -> Tensor:
    """The fixed pseudo-random n of ``total`` sample ids, sorted; all of them for None.

    A smaller subset is part of a larger one. Raises UserError for n out of 1..total.
    """
    if n is None:
        return torch.arange(total)
    if n < 1:
        raise UserError(f"n={n} is not at least 1")
    if n > total:
        raise UserError(f"n={n} but the split has {total} samples; use n={total} or leave n out")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:n].sort().values


@contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
    """Parameters frozen inside: an attack needs gradients of inputs alone."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def probe(model: nn.Module, samples: Samples, traits: Traits) -> int:
    """Look at the model's answers on a few images; returns the number of classes.

    Raises UserError if the model is in training mode or has weights that are not finite, can't take
    the images, does not return (N, K) logits or writes into its input, and if its predictions are
    stochastic or batch-dependent and ``traits`` deny it.
    """
    if any(module.training for module in model.modules()):
        raise UserError("the model is in training mode: call model.eval() before evaluating it")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"the model's weights are not finite: '{name}' holds NaN or infinity")
    clean = samples.fetch(samples.ids[:PROBE])
    shape, x = tuple(clean.x.shape[1:]), clean.x.clone()
    logits = _ask(model, clean.x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"the model must return logits of shape (N, K), K >= 2, for images {shape}, not {got}"
        )
    if not torch.equal(clean.x, x):
        raise UserError("the model writes into its input: let forward work on a copy (x.clone())")
    classes, highest = logits.shape[1], int(samples.split.labels.max())
    if highest >= classes:
        raise UserError(
            f"the data has labels up to {highest} and the model has {classes} classes (0 to "
            f"{classes - 1}): choose the data that the model was trained for"
        )
    # Kernels round differently from call to call and shape to shape; noise is orders larger.
    slack = 1e-3 * (1 + logits.abs().max())
    if not traits.stochastic and (_ask(model, x) - logits).abs().max() > slack:
        raise UserError(
            "two forward passes of the same images differ, so the model is stochastic: a protocol "
            "that judges by one prediction can't be trusted; remove the noise"
        )
    alone = torch.cat([_ask(model, row) for row in x.split(1)])
    if not traits.batch_dependent and (alone - logits).abs().max() > slack:
        raise UserError(
            "the model's output for an image depends on the other images of its batch: the robust "
            "accuracy of a sample is not defined for it"
        )
    return classes


def check_gradient(model: nn.Module, samples: Samples) -> None:
    """Raise UserError if the model's output has no gradient in its input."""
    x = samples.fetch(samples.ids[:1]).x.requires_grad_()
    with torch.enable_grad():
        if not _ask(model, x).requires_grad:
            raise UserError(
                "the model's output has no gradient in its input: remove torch.no_grad() or "
                "detach() from its forward"
            )


def _ask(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer; whatever somebody else's forward raises becomes a UserError."""
    try:
        return model(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise UserError(
            f"the model can't take the data's images, {tuple(x.shape[1:])} (C, H, W): {reason:.300}"
        ) from problem


def run(
    model: nn.Module,
    samples: Samples,
    threat: Threat,
    stages: Sequence[Stage],
    store: Store,
    *,
    seed: int,
    slots: int,
    keep_images: bool = False,
    watch: Watch | None = None,
) -> None:
    """Bring ``store`` to hold every stage of the plan, starting from what it holds already.

    slots: samples attacked side by side. The model must be in evaluation mode.
    """
    watch = watch or Nobody()
    with attackable(model):
        _score_clean(model, samples, store, slots, watch)
        correct = _held(store, CLEAN, samples.ids)
        for stage in stages:
            search = _Search(model, samples, threat, stage, store, seed, slots, keep_images)
            search.run(correct, watch)
            correct = _held(store, stage.name, correct)


def _held(store: Store, stage: str, attacked: Tensor) -> Tensor:
    """The samples that the stage did not break."""
    records = store.records(stage)
    broken = torch.from_numpy(records.sample[records.broken])
    return attacked[~torch.isin(attacked, broken)]


def _pending(store: Store, stage: str, attacked: Tensor) -> Tensor:
    """The samples that have no record of the stage."""
    return attacked[~torch.isin(attacked, torch.from_numpy(store.records(stage).sample))]


@torch.no_grad()
def _score_clean(
    model: nn.Module, samples: Samples, store: Store, slots: int, watch: Watch
) -> None:
    pending = _pending(store, CLEAN, samples.ids)
    if not len(pending):
        return
    watch.stage(CLEAN, len(pending))
    done = 0
    for ids in pending.split(slots):
        begin = time.perf_counter()
        clean = samples.fetch(ids)
        logits = model(clean.x).float()
        if not torch.isfinite(logits).all():
            raise UserError("the model's outputs on clean images are not finite")
        label = logits.argmax(1)
        broken = label != clean.y
        margin = -losses.margin(logits, clean.y)
        n, zeros = len(ids), np.zeros(len(ids))
        records = Records(
            sample=ids.numpy(),
            broken=_numpy(broken),
            label=_numpy(label),
            margin=_numpy(margin),
            distance=zeros.astype(np.float32),
            forwards=np.ones(n, np.int64),
            backwards=zeros.astype(np.int64),
        )
        store.append(CLEAN, records, time.perf_counter() - begin)
        done += n
        known = store.records(CLEAN)
        watch.progress(done, int((~known.broken).sum()), len(known))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


class _Search:
    """One stage over its samples: slots, the waiting line and the ledger of what was found."""

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        threat: Threat,
        stage: Stage,
        store: Store,
        seed: int,
        slots: int,
        keep_images: bool,
    ) -> None:
        self.samples, self.threat, self.stage, self.store = samples, threat, stage, store
        self.seed, self.slots, self.keep_images = seed, slots, keep_images
        self.attack = stage.attack
        self.oracle = Oracle(model)
        self.referee = Referee(model, threat)

    def run(self, attacked: Tensor, watch: Watch) -> None:
        pending = _pending(self.store, self.stage.name, attacked)
        watch.stage(self.stage.name, len(pending))
        n = len(pending)
        # The ledger, by position in ``pending``.
        self.pending = pending
        self.label = self.samples.split.labels[pending].clone()
        self.margin = torch.full((n,), torch.inf)
        self.distance = torch.full((n,), torch.nan)
        self.broken = torch.zeros(n, dtype=torch.bool)
        self.forwards = torch.zeros(n, dtype=torch.int64)
        self.backwards = torch.zeros(n, dtype=torch.int64)
        self.images: dict[int, np.ndarray] = {}

        waiting = deque((position, 0) for position in range(n))
        rows: Rows | None = None
        places = torch.empty(0, dtype=torch.int64)  # position of the sample in each slot
        fresh: list[int] = []  # positions with a record that is not yet stored
        held_at_first = len(_held(self.store, self.stage.name, attacked))
        done, begin = 0, time.perf_counter()
        while waiting or rows is not None:
            rows, places = self._fill(rows, places, waiting)
            rows, places, left = self._round(rows, places, waiting)
            fresh += left
            done += len(left)
            if fresh and (time.perf_counter() - begin > COMMIT_SECONDS or rows is None):
                self._commit(fresh, time.perf_counter() - begin)
                fresh, begin = [], time.perf_counter()
            if left:
                held = held_at_first - int(self.broken.sum())
                watch.progress(done, held, len(self.samples))

    def _fill(
        self, rows: Rows | None, places: Tensor, waiting: deque[tuple[int, int]]
    ) -> tuple[Rows, Tensor]:
        """Start waiting samples in free slots, a quarter of the slots or more at a time."""
        taken = 0 if rows is None else len(rows)
        free = min(self.slots - taken, len(waiting))
        if rows is not None and (free == 0 or 4 * free < self.slots):
            return rows, places
        entering = [waiting.popleft() for _ in range(free)]
        positions = torch.tensor([position for position, _ in entering])
        restart = torch.tensor([r for _, r in entering], device=self.samples.device)
        clean = self.samples.fetch(self.pending[positions])
        random = KeyedRandom(self.seed, self.stage.name, clean.ids, restart)
        started = self.attack.start(self.oracle, clean, self.threat, random, restart)
        if rows is None:
            return started, positions
        return rows.joined(started), torch.cat([places, positions])

    def _round(
        self, rows: Rows, places: Tensor, waiting: deque[tuple[int, int]]
    ) -> tuple[Rows | None, Tensor, list[int]]:
        """One query, one move. Returns the rows that stay and who left for good."""
        left: list[int] = []
        if self.attack.queries > 0:
            answer = self.oracle.query(self.attack, rows)
            inside = self.threat.contains(rows.point, rows.x)
            margin = -losses.margin(answer.logits.float(), rows.y)
            margin = torch.where(inside & finite(answer.logits), margin, torch.inf)
            self.margin[places] = torch.minimum(self.margin[places], margin.cpu())
            wrong = (answer.logits.argmax(1) != rows.y) | ~finite(answer.logits)
            hit = self._judge(rows, places, inside & wrong)
            if hit.any():
                self._leave(rows, places, hit, hit, waiting, left)
                staying = ~hit
                rows, places = rows.take(staying), places[staying.cpu()]
                answer = Answer(*(part[staying] for part in answer))  # pyright: ignore
            if len(rows):
                self.attack.advance(rows, answer, self.threat)

        last = rows.iteration >= self.attack.queries
        if last.any():
            hit = self._judge(rows, places, last)
            self._leave(rows, places, last, hit, waiting, left)
            rows, places = rows.take(~last), places[~last.cpu()]
        return (rows if len(rows) else None), places, left

    def _leave(
        self,
        rows: Rows,
        places: Tensor,
        leaving: Tensor,
        hit: Tensor,
        waiting: deque[tuple[int, int]],
        left: list[int],
    ) -> None:
        """Take the rows of a mask off: to ``left``, or to wait for their next search."""
        gone = places[leaving.cpu()]
        self.forwards[gone] += rows.forwards[leaving].cpu()
        self.backwards[gone] += rows.backwards[leaving].cpu()
        restarts, hits = rows.restart[leaving].tolist(), hit[leaving].tolist()
        for position, restart, broke in zip(gone.tolist(), restarts, hits, strict=True):
            if broke or restart + 1 == self.attack.tries:
                left.append(position)
            else:
                waiting.append((position, restart + 1))

    def _judge(self, rows: Rows, places: Tensor, which: Tensor) -> Tensor:
        """Put the rows of a mask before the referee, and enter its findings.

        Returns the mask of the rows that are broken.
        """
        hit = torch.zeros_like(which)
        if not which.any():
            return hit
        x = rows.x[which]
        judged = self.referee.judge(x, rows.y[which], rows.point[which])
        rows.forwards += which
        hit[which] = judged.broken
        where, broken = places[which.cpu()], judged.broken.cpu()
        distance = self.threat.distance(judged.point, x).cpu()
        self.broken[where] = broken
        self.label[where] = judged.label.cpu()
        smallest = torch.minimum(self.margin[where], judged.margin.cpu())
        self.margin[where] = torch.where(broken, judged.margin.cpu(), smallest)
        self.distance[where] = torch.where(broken, distance, torch.nan)
        if self.keep_images:
            points = judged.point[judged.broken]
            for position, image in zip(where[broken].tolist(), points, strict=True):
                self.images[position] = _numpy(image)
        return hit

    def _commit(self, positions: list[int], seconds: float) -> None:
        at = torch.tensor(positions)
        records = Records(
            sample=_numpy(self.pending[at]),
            broken=_numpy(self.broken[at]),
            label=_numpy(self.label[at]),
            margin=_numpy(self.margin[at]),
            distance=_numpy(self.distance[at]),
            forwards=_numpy(self.forwards[at]),
            backwards=_numpy(self.backwards[at]),
        )
        images = None
        if self.keep_images:
            kept = [self.images.pop(position) for position in positions if position in self.images]
            images = np.stack(kept) if kept else None
        self.store.append(self.stage.name, records, seconds, images)
