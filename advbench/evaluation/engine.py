"""The engine: runs the stages of a plan over samples, and keeps what each sample did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from advbench.attacks.base import Clean, Oracle, attackable
from advbench.attacks.expectation import Expectation
from advbench.attacks.random import hash_of
from advbench.attacks.referee import CHUNK, Referee
from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate, Traits
from advbench.devices import keep_freed_memory, out_of_memory
from advbench.errors import UserError
from advbench.evaluation.batch_sizes import Shapes
from advbench.evaluation.checks import are_shares
from advbench.evaluation.fast_model import Searcher, Speed, searcher
from advbench.evaluation.joint_search import JointSearch, no_room
from advbench.evaluation.protocol import Stage
from advbench.evaluation.samples import Samples, fixed_batches
from advbench.evaluation.search import Search
from advbench.evaluation.stage_cache import Archive
from advbench.evaluation.stage_state import Ledger
from advbench.evaluation.store import Records, Store
from advbench.progress import NullProgress, Progress

CLEAN = "clean"
NOISE_GROUP = 64  # samples of a stochastic model that are attacked as a whole
VOTES = 10  # evaluations of a stochastic model, of which the majority decides
TINY = torch.finfo(torch.float32).tiny
COMPARED = 8  # images on which the search's copy of a model is held against the model


@dataclass
class Engine:
    """What is evaluated, and how.

    model: the real one, in evaluation mode.  traits: what is known of it.
    surrogates: other targets that stages name.
    slots: samples attacked side by side, at most.  share: of this process, (rank, processes).
    archive: what other evaluations know.  hurry: whether time is up.
    """

    model: nn.Module
    samples: Samples
    threat: Threat
    seed: int = 0
    slots: int = 250
    speed: Speed = field(default_factory=Speed)
    traits: Traits = field(default_factory=Traits)
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    keep_images: bool = False
    share: tuple[int, int] = (0, 1)
    progress: Progress = field(default_factory=NullProgress)
    archive: Archive | None = None
    hurry: Callable[[], bool] = lambda: False
    moved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # Of all samples, not of this process's: the shape of a batch decides its rounding.
        most = NOISE_GROUP if self.traits.stochastic else self.slots
        coarse = self.speed.compile is not None
        self.shapes = Shapes(min(most, self.slots, len(self.samples)), coarse)
        everyone, (rank, processes) = units(self.samples, self.traits, self.slots), self.share
        self.units = None if everyone is None else everyone[rank::processes]

    def run(self, stages: Sequence[Stage], store: Store) -> bool:
        """Bring ``store`` to hold every stage of the plan, from what it holds already on.

        Returns False if time was up before.
        """
        keep_freed_memory()
        rank, processes = self.share
        mine = self.samples.ids[rank::processes]
        if self.units is not None:
            mine = torch.cat([mine[:0], *(unit.own for unit in self.units)]).sort().values
        if processes > 1 and not all(stage.attack.queries for stage in stages):
            raise UserError(
                "the attacks of other libraries draw by the batch: run them with trainer.devices=1"
            )
        others = [surrogate.model for surrogate in self.surrogates.values()]
        with attackable(self.model, *others), _float32():
            if not self._score_clean(mine, store):
                return False
            correct = held(store, CLEAN, mine)
            prepared: dict[str, nn.Module] = {}
            for stage in stages:
                pending = self._pending(store, stage.name, correct)
                if len(pending):
                    if self._late():
                        return False
                    if stage.target not in prepared:
                        prepared = {stage.target: self._searcher(stage.target)}
                    still = len(held(store, stage.name, correct))
                    search = self._search(stage, prepared[stage.target], store, still, len(mine))
                    if self.traits.batch_dependent:
                        self.progress.stage(stage.name, len(pending))
                    if not self._attack(stage, search, store, pending):
                        return False
                correct = held(store, stage.name, correct)
        return True

    def _attack(
        self, stage: Stage, search: Callable[[Unit, Tensor], bool], store: Store, pending: Tensor
    ) -> bool:
        """Attack the samples ``pending``, group by group where that is how the model is judged.

        Returns False if time was up before.
        """
        for unit in self.units or [Unit(pending, pending)]:
            wanted = unit.own[torch.isin(unit.own, pending)]
            if not len(wanted):
                continue
            if stage.only_if and not torch.isin(broken_by(store, stage.only_if), unit.own).any():
                store.append(stage.name, untouched(wanted, self.samples), 0.0)
                continue
            self._seed_noise(stage.name, unit)
            if not search(unit, wanted):
                return False
            self.moved = True
        return True

    def _search(
        self, stage: Stage, target: nn.Module, store: Store, correct: int, total: int
    ) -> Callable[[Unit, Tensor], bool]:
        """What attacks samples of a unit, and returns False if time was up before.

        correct: samples that are still correct as the stage begins, of ``total``.
        """
        threat = self.threat if stage.eps is None else Threat(self.threat.norm, stage.eps)
        oracle = self._oracle(stage, target)
        if self.traits.batch_dependent:
            joint = JointSearch(
                stage,
                self.model,
                self.samples,
                threat,
                oracle,
                store,
                seed=self.seed,
                correct=correct,
                total=total,
                keep_images=self.keep_images,
                progress=self.progress,
                hurry=self._late,
            )
            return lambda unit, wanted: joint.run(unit.rows, wanted)
        draws = VOTES if self.traits.stochastic else 1
        single = Search(
            stage,
            self.samples,
            threat,
            oracle,
            Referee(self.model, threat, min(CHUNK, self.shapes.largest), draws),
            self.shapes,
            store,
            seed=self.seed,
            correct=correct,
            total=total,
            exact=self._is_exact(stage),
            keep_images=self.keep_images,
            whole=self.traits.stochastic,
            progress=self.progress,
            hurry=self.hurry if self.units is None else self._late,
        )
        return lambda unit, wanted: single.run(wanted)

    def _is_exact(self, stage: Stage) -> bool:
        """Whether the search sees the model's own logits, up to rounding."""
        logits = self.traits.output == "logits"
        return stage.target == "model" and self.speed.precision == "32" and logits

    def _late(self) -> bool:
        """Whether time is up. Something is done in any case, so that short sittings come to an end
        too: a group that is attacked as a whole would be lost if it were cut.
        """
        return self.moved and self.hurry()

    def _seed_noise(self, stage: str, unit: Unit) -> None:
        """Noise of a model's own has no key: a group of samples is repeatable as a whole."""
        if self.traits.stochastic:
            torch.manual_seed(hash_of(f"{self.seed}/{stage}/{int(unit.rows[0])}"))

    def _oracle(self, stage: Stage, target: nn.Module) -> Oracle:
        paired = stage.target != "model" and self.surrogates[stage.target].needs_clean_input
        if stage.draws == 1:
            return Oracle(target, needs_clean_input=paired)
        return Expectation(target, stage.draws, needs_clean_input=paired)

    def _searcher(self, target: str) -> nn.Module:
        """The target's copy for searching; finds out which batch sizes suit it."""
        noisy = self.traits.stochastic
        itself = Surrogate(self.model, exact=True, loss="ce", why="", stochastic=noisy)
        surrogate = itself if target == "model" else self.surrogates[target]
        if self.units is not None and self.traits.batch_dependent:  # batches of one size
            batch = self.samples.fetch(self.units[0].rows)
            try:
                return self._copy(surrogate, batch)
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                raise no_room(len(batch.x)) from problem
        self.shapes.forget()
        while True:
            clean = self.samples.fetch(self.samples.ids[: self.shapes.largest])
            try:
                fast = self._copy(surrogate, Clean(*(part[:COMPARED] for part in clean)))
                if not surrogate.stochastic:  # noise can't be compared
                    self.shapes.probe(Logits(fast, surrogate.needs_clean_input), clean)
                break
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
            self._back_off()
        if fast is surrogate.model:
            self.progress.note(
                f"no faster copy of '{target}': the search runs on it as it is, in float32"
            )
        if isinstance(fast, Searcher) and fast.precision != self.speed.precision:
            self.progress.note(
                f"bfloat16 blurs the margins of '{target}', so the search runs in float32"
            )
        if not surrogate.stochastic and not self.shapes.placeless:
            self.progress.note(
                "an image's logits depend, in their last bits, on its place in the batch: "
                "a repeated evaluation may round differently"
            )
        return fast

    def _copy(self, surrogate: Surrogate, few: Clean) -> nn.Module:
        """The search's copy of a target; itself where it is more than a function of x."""
        if surrogate.needs_clean_input or surrogate.auxiliary_loss:
            return surrogate.model
        target = surrogate.model
        if self.traits.output == "probabilities" and not surrogate.transfer:
            with torch.no_grad():  # what shares the model's weights may end before its softmax
                shares = are_shares(target(few.x))
            target = LogProbabilities(target).eval() if shares else target
        return searcher(target, self.speed, few, surrogate.stochastic)

    def _back_off(self) -> None:
        self.shapes.shrink()
        self.progress.note(f"out of memory: going on with batches of {self.shapes.largest}")

    def _pending(self, store: Store, stage: str, attacked: Tensor) -> Tensor:
        """The samples that have no record of the stage, here or in the archive."""
        pending = attacked[~torch.isin(attacked, torch.from_numpy(store.records(stage).sample))]
        if self.archive is not None and not self.traits.stochastic and len(pending):
            for records, seconds, folder in self.archive.records(stage, pending):
                store.append(stage, records, seconds)
                self.progress.note(f"{stage}: {len(records)} samples known from {folder}")
                known = torch.from_numpy(records.sample)
                pending = pending[~torch.isin(pending, known)]
        return pending

    def _score_clean(self, mine: Tensor, store: Store) -> bool:
        pending = self._pending(store, CLEAN, mine)
        if len(pending):
            self.progress.stage(CLEAN, len(pending))
        draws = VOTES if self.traits.stochastic else 1
        while len(pending):
            if self._late():
                return False
            begin = time.perf_counter()
            some = pending[: self.shapes.largest]
            unit = Unit(some, some)
            if self.units is not None:
                unit = next(unit for unit in self.units if pending[0] in unit.own)
            self._seed_noise(CLEAN, unit)
            batch = unit.rows
            clean = self.samples.fetch(batch)
            # A chunk is always full: the last batch rounds as the others do.
            chunk = self.shapes.largest if self.units is None else len(batch)
            referee = Referee(self.model, self.threat, chunk, draws)
            try:
                judged = referee.score(clean.x, clean.y)
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                if self.units is not None:
                    raise no_room(len(batch)) from problem
                judged = None
            if judged is None:
                self._back_off()
                continue
            if not torch.isfinite(judged.margin).all():
                raise UserError("the model's outputs on clean images are not finite")
            order = batch.argsort()
            order = order[torch.isin(batch[order], unit.own[torch.isin(unit.own, pending)])]
            there = order.to(clean.x.device)
            zeros = np.zeros(len(order), np.int64)
            broken = judged.broken[there].cpu().numpy()
            records = Records(
                sample=batch[order].numpy(),
                broken=broken,
                label=judged.label[there].cpu().numpy(),
                margin=judged.margin[there].cpu().numpy(),
                distance=zeros.astype(np.float32),
                wrong=judged.wrong[there].cpu().numpy(),
                alone=broken,
                forwards=zeros + draws,
                backwards=zeros,
            )
            store.append(CLEAN, records, time.perf_counter() - begin)
            self.moved = True
            pending = pending[~torch.isin(pending, unit.own)]
            known = store.records(CLEAN)
            self.progress.update(
                len(mine) - len(pending), correct=int((~known.broken).sum()), samples=len(known)
            )
        return True


class Logits(nn.Module):
    """The logits alone, of a surrogate that takes clean images or returns an auxiliary loss too."""

    def __init__(self, target: nn.Module, needs_clean_input: bool) -> None:
        super().__init__()
        self.target, self.needs_clean_input = target, needs_clean_input

    def forward(self, x: Tensor) -> Tensor:
        answer = self.target(x, x.detach()) if self.needs_clean_input else self.target(x)
        return answer[0] if isinstance(answer, tuple) else answer


class LogProbabilities(nn.Module):
    """Logits of a model that returns probabilities: near 0 and 1 those have no gradient left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).float().clamp_min(TINY).log()


class Unit(NamedTuple):
    """Samples that are attacked as a whole or not at all.

    rows: their ids.  own: those that it answers for; the others only keep them company.
    """

    rows: Tensor
    own: Tensor


def units(samples: Samples, traits: Traits, slots: int) -> list[Unit] | None:
    """The fixed batches of a batch-dependent model; any groups, for a stochastic one, whose noise
    is drawn group by group; None where samples come and go one by one.
    """
    if not traits.batch_dependent:
        groups = samples.ids.split(min(slots, NOISE_GROUP))
        return [Unit(ids, ids) for ids in groups] if traits.stochastic else None
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
    found, left = [], samples.ids
    for batch in fixed_batches(len(samples.split), traits.batch_size):
        own = left[torch.isin(left, batch)]
        left = left[~torch.isin(left, batch)]
        if len(own):
            found.append(Unit(batch, own))
    return found


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


def broken_by(store: Store, stage: str) -> Tensor:
    """The samples that the stage broke."""
    records = store.records(stage)
    return torch.from_numpy(records.sample[records.broken])


def untouched(ids: Tensor, samples: Samples) -> Records:
    """Records of samples that a stage had no reason to attack."""
    ledger = Ledger(ids, samples.split.labels[ids])
    return ledger.records(range(len(ids)))[0]


def held(store: Store, stage: str, attacked: Tensor) -> Tensor:
    """The samples that the stage did not break by their own image."""
    records = store.records(stage)
    broken = torch.from_numpy(records.sample[records.alone])
    return attacked[~torch.isin(attacked, broken)]
