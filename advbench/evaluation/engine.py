"""The engine: runs the stages of a plan over the samples, and stores a record for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from advbench.attacks.base import Clean, Oracle, attackable
from advbench.attacks.expectation import Expectation
from advbench.attacks.referee import CHUNKS, Referee
from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate
from advbench.devices import (
    full_float32,
    keep_freed_memory,
    kernels,
    out_of_memory,
    several_backward_passes,
    tf32,
)
from advbench.errors import UserError
from advbench.evaluation.batch_sizes import BatchSizes
from advbench.evaluation.clean_images import no_better_than_chance, score_clean, votes
from advbench.evaluation.deadline import PassCounter
from advbench.evaluation.fast_model import FastModel, Logits, copy_of_surrogate
from advbench.evaluation.graphs import Graphs
from advbench.evaluation.groups import NOISE_GROUP, Group, groups, out_of_memory_error, seed_noise
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.joint_search import JointSearch
from advbench.evaluation.phases import to_attack
from advbench.evaluation.protocol import Stage
from advbench.evaluation.samples import Samples
from advbench.evaluation.search import Search
from advbench.evaluation.stage_cache import Archive
from advbench.evaluation.stage_state import StageState
from advbench.evaluation.store import Records, Store

COMPARED = 8
"""Images on which the search's copy of a model is compared with the model."""


@dataclass
class Engine:
    """Runs stages."""

    job: Job
    """What is attacked, and how."""
    archive: Archive | None = None
    """Records of other evaluations."""
    progressed: bool = field(default=False, init=False)
    """Whether anything was done in this sitting."""

    def __post_init__(self) -> None:
        # Of all samples, not of this process's: the shape of a batch decides its rounding.
        job = self.job
        limit = NOISE_GROUP if job.traits.stochastic else job.batch_size
        largest = min(limit, job.batch_size, len(job.samples))
        self.batch_sizes = BatchSizes(largest, coarse=job.fast_model.fixed_shapes)
        all_groups = groups(job)
        self.groups = None if all_groups is None else all_groups[job.rank :: job.world_size]
        self.assigned = job.samples.ids[job.rank :: job.world_size]
        if self.groups is not None:
            members = [group.members for group in self.groups]
            self.assigned = torch.cat([self.assigned[:0], *members]).sort().values

    def run(self, stages: Sequence[Stage], store: Store) -> bool:
        """Run the stages on the samples that have no record of them.

        Args:
            stages: in order; each attacks what the earlier ones left.
            store: where records are, and go.

        Returns:
            False if the budget was spent before the end.
        """
        keep_freed_memory()
        job, assigned = self.job, self.assigned
        if job.world_size > 1 and not all(stage.attack.queries for stage in stages):
            raise UserError(
                "attacks of other libraries depend on the batch: run them with trainer.devices=1"
            )
        surrogate_models = [surrogate.model for surrogate in job.surrogates.values()]
        with (
            attackable(job.model, *surrogate_models),
            full_float32(),
            kernels(job.deterministic),
            several_backward_passes(bool(job.fast_model.compile)),
        ):
            if not self._score_clean(assigned, store):
                return False
            correct = still_correct(store, CLEAN, assigned)
            if job.rank == 0 and (warning := no_better_than_chance(store.records(CLEAN), job)):
                job.progress.note(f"note: {warning}")
            prepared: dict[str, nn.Module] = {}
            for stage in stages:
                to_search = torch.from_numpy(to_attack(stage, correct.numpy()))
                pending = self._pending(store, stage.name, to_search)
                if len(pending):
                    if self._time_is_up() or self._passes_are_spent(store):
                        return False
                    if stage.victim not in prepared:
                        prepared = {stage.victim: self._fast_model(stage.victim)}
                    num_correct = len(still_correct(store, stage.name, correct))
                    search = self._search(
                        stage, prepared[stage.victim], store, num_correct, len(assigned)
                    )
                    if job.traits.batch_dependent:
                        job.progress.stage(stage.name, len(pending))
                    if not self._attack(stage, search, store, pending):
                        return False
                correct = still_correct(store, stage.name, correct)
        return True

    def _attack(
        self, stage: Stage, search: Callable[[Group, Tensor], bool], store: Store, pending: Tensor
    ) -> bool:
        """Attack the samples ``pending``, group by group if the model is judged in groups.

        Returns False if the budget was spent before: of passes, at the end of a group.
        """
        for group in self.groups or [Group(pending, pending)]:
            members = group.members[torch.isin(group.members, pending)]
            if not len(members):
                continue
            if (
                stage.only_if
                and not torch.isin(broken_by(store, stage.only_if), group.members).any()
            ):
                store.append(stage.name, records_without_attack(members, self.job.samples), 0.0)
                continue
            if self._passes_are_spent(store):
                return False
            seed_noise(self.job, stage.name, group)
            with self._products():
                if not search(group, members):
                    return False
            self.progressed = True
        return True

    def _search(
        self, stage: Stage, victim: nn.Module, store: Store, correct: int, total: int
    ) -> Callable[[Group, Tensor], bool]:
        """What attacks samples of a group, and returns False if the budget was spent before.

        correct: samples that are still correct as the stage begins, of ``total``.
        """
        job = self.job
        threat = job.threat if stage.eps is None else Threat(job.threat.norm, stage.eps)
        job = replace(job, threat=threat)
        if self.groups is not None:  # a budget of passes ends between two of them: none is lost
            job = replace(job, deadline=self._time_is_up, passes=PassCounter())
        oracle = self._oracle(stage, victim)
        if job.traits.batch_dependent:
            joint = JointSearch(job, stage, oracle, store, correct=correct, total=total)
            return lambda group, members: joint.run(group.rows, members)
        chunk = CHUNKS.get(job.samples.device.type, CHUNKS["cpu"])
        referee = Referee(job.model, threat, min(chunk, self.batch_sizes.largest), votes(job))
        search = Search(
            job, stage, oracle, store, referee, self.batch_sizes, correct=correct, total=total
        )
        return lambda group, members: search.run(members)

    def _time_is_up(self) -> bool:
        """Whether time is up. Something is done in any case, so that short sittings come to an end
        too: a group that is attacked as a whole would be lost if it were cut.
        """
        return self.progressed and self.job.deadline()

    def _passes_are_spent(self, store: Store) -> bool:
        """Whether this process's share of the passes is spent, in this sitting and earlier ones."""
        passes = self.job.passes
        if passes.limited:
            passes.begin(store.passes(self.assigned.numpy()))
        return passes.spent()

    def _oracle(self, stage: Stage, victim: nn.Module) -> Oracle:
        is_model = stage.victim == "model"
        needs_clean_input = not is_model and self.job.surrogates[stage.victim].needs_clean_input
        if stage.eot_samples == 1:
            return Oracle(victim, needs_clean_input=needs_clean_input)
        return Expectation(victim, stage.eot_samples, needs_clean_input=needs_clean_input)

    def _fast_model(self, victim: str) -> nn.Module:
        """The victim's copy for searching; finds out which batch sizes suit it."""
        job, stochastic = self.job, self.job.traits.stochastic
        real_model = Surrogate(job.model, exact=True, loss="ce", why="", stochastic=stochastic)
        surrogate = real_model if victim == "model" else job.surrogates[victim]
        output, options = job.traits.output, job.fast_model
        if self.groups is not None and job.traits.batch_dependent:  # batches of one size
            batch = job.samples.fetch(self.groups[0].rows)
            try:
                return copy_of_surrogate(surrogate, output, options, batch)
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                raise out_of_memory_error(len(batch.x)) from problem
        self.batch_sizes.forget()
        while True:
            clean = job.samples.fetch(job.samples.ids[: self.batch_sizes.largest])
            probe_images = Clean(*(part[:COMPARED] for part in clean))
            try:
                fast = copy_of_surrogate(surrogate, output, options, probe_images)
                searched = fast
                if options.graphs and isinstance(fast, FastModel) and not surrogate.stochastic:
                    searched = Graphs(fast, job.progress.note).eval()
                if not surrogate.stochastic:  # noise can't be compared
                    logits = Logits(searched, surrogate.needs_clean_input)
                    with self._products():
                        self.batch_sizes.probe(logits, clean)
                break
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
            self._back_off()
        if fast is surrogate.model:
            job.progress.note(
                f"no faster copy of '{victim}': the search runs on it as it is, in float32"
            )
        if isinstance(fast, FastModel) and fast.precision != options.precision:
            job.progress.note(
                f"bfloat16 blurs the margins of '{victim}', so the search runs in float32"
            )
        if not surrogate.stochastic and not self.batch_sizes.same_at_all_positions:
            job.progress.note(
                "an image's logits depend, in their last bits, on its place in the batch: "
                "a repeated evaluation may round differently"
            )
        return searched

    def _products(self) -> AbstractContextManager[None]:
        """How a search multiplies float32 matrices."""
        return tf32() if self.job.fast_model.precision == "tf32" else nullcontext()

    def _back_off(self) -> None:
        self.batch_sizes.shrink()
        self.job.progress.note(
            f"out of memory: continuing with batches of {self.batch_sizes.largest}"
        )

    def _pending(self, store: Store, stage: str, attacked: Tensor) -> Tensor:
        """The samples that have no record of the stage, here or in the archive."""
        pending = attacked[~torch.isin(attacked, torch.from_numpy(store.records(stage).sample))]
        if self.archive is not None and not self.job.traits.stochastic and len(pending):
            for cached, folder in self.archive.cached(stage, pending):
                records = cached.records
                store.append(stage, records, cached.seconds, cached.aligned())
                self.job.progress.note(f"{stage}: {len(records)} samples known from {folder}")
                pending = pending[~torch.isin(pending, torch.from_numpy(records.sample))]
        return pending

    def _score_clean(self, assigned: Tensor, store: Store) -> bool:
        """Score the clean images. Returns False if the budget was spent before."""
        pending = self._pending(store, CLEAN, assigned)
        if len(pending):
            self.job.progress.stage(CLEAN, len(pending))
        while len(pending):
            if self._time_is_up() or self._passes_are_spent(store):
                return False
            chunk_ids = pending[: self.batch_sizes.largest]
            group = Group(chunk_ids, chunk_ids)
            if self.groups is not None:
                group = next(group for group in self.groups if pending[0] in group.members)
            members = group.members[torch.isin(group.members, pending)]
            chunk = self.batch_sizes.largest if self.groups is None else len(group.rows)
            scored = score_clean(self.job, group, members, chunk)
            if scored is None:
                self._back_off()
                continue
            store.append(CLEAN, *scored)
            self.progressed = True
            pending = pending[~torch.isin(pending, group.members)]
            records = store.records(CLEAN)
            self.job.progress.update(
                len(assigned) - len(pending),
                correct=int((~records.broken).sum()),
                samples=len(records),
            )
        return True


def broken_by(store: Store, stage: str) -> Tensor:
    """The samples that the stage broke."""
    records = store.records(stage)
    return torch.from_numpy(records.sample[records.broken])


def records_without_attack(ids: Tensor, samples: Samples) -> Records:
    """Records of samples that a stage does not attack."""
    state = StageState(ids, samples.split.labels[ids])
    return state.records(range(len(ids)))[0]


def still_correct(store: Store, stage: str, attacked: Tensor) -> Tensor:
    """The samples, of ``attacked``, that their own image of this stage did not break."""
    records = store.records(stage)
    broken = torch.from_numpy(records.sample[records.alone])
    return attacked[~torch.isin(attacked, broken)]
