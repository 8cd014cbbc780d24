"""Runs one stage over its samples: each finished sample leaves its row to a waiting one.

In pseudo-code:

    repeat until no sample waits and no row is taken:
        fill free slots with waiting samples; the attack starts them
        query the model at every slot's point; what looks like a success goes to the referee
        the attack advances; the referee judges the points where a search ends
        a sample that broke, or has no search left, leaves its slot with a record
        a sample with a search left goes to the head of the line

Batches have one of a few sizes, with free slots filled up, so that a sample's outcome depends
neither on who is beside it nor on when it came.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import fields

import torch
from torch import Tensor

from advbench.attacks import losses
from advbench.attacks.base import Oracle, Rows
from advbench.attacks.random import KeyedRandom
from advbench.attacks.referee import Referee, finite
from advbench.attacks.waits import to_device, to_host
from advbench.devices import out_of_memory
from advbench.errors import UserError
from advbench.evaluation.batch_sizes import BatchSizes
from advbench.evaluation.eta import Forecast
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.stage_state import StageState, within
from advbench.evaluation.store import Records, Store, passes

NO_GRADIENT = (
    "the model's gradient is NaN or infinite for whole images, so an attack along it would find "
    "nothing and its robust accuracy would mean nothing: correct the model's backward pass"
)
SHOW_SECONDS = 0.2
COMMIT_SECONDS = 2.0
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.02  # of the time, at most, for saving the searches in progress


class Search:
    """Runs a stage on samples that enter and leave the batch one by one.

    Args:
        job: what is attacked, with the stage's own threat and deadline.
        stage: the attack and its victim.
        oracle: answers for the victim.
        store: where records go.
        referee: judges on the real model.
        batch_sizes: those that suit the victim.
        correct: samples that are still correct as the stage begins, of ``total``.
        total: samples of this process.
    """

    def __init__(
        self,
        job: Job,
        stage: Stage,
        oracle: Oracle,
        store: Store,
        referee: Referee,
        batch_sizes: BatchSizes,
        *,
        correct: int,
        total: int,
    ) -> None:
        self.job, self.stage, self.attack = job, stage, stage.attack
        self.samples, self.threat = job.samples, job.threat
        self.oracle, self.store = oracle, store
        self.referee, self.batch_sizes = referee, batch_sizes
        self.correct, self.total = correct, total
        # Whether the oracle's margins are the model's, up to rounding.
        same_function = job.traits.output == "logits" and job.fast_model.precision == "32"
        self.exact = stage.victim == "model" and same_function
        # Everything is written at the end, and nothing before: what a stochastic model did can't
        # be resumed in the middle.
        self.all_or_nothing = job.traits.stochastic
        self.stays_inside = self.attack.stays_inside(job.threat)
        self.rows: Rows | None = None
        # For each row: position in the state or -1; queries of its search; smallest margin seen.
        self.position = torch.empty(0, dtype=torch.int64)
        self.age = torch.empty(0, dtype=torch.int64)
        self.min_margin = torch.empty(0)

    def run(self, pending: Tensor) -> bool:
        """Attack the samples ``pending`` (sorted ids). Returns False if it had to stop before."""
        self.job.progress.stage(self.stage.name, len(pending))
        self.state = StageState(pending, self.samples.split.labels[pending])
        self.forecast = Forecast(self.attack.starts * self.attack.queries)
        self.unsaved: list[int] = []  # positions with a record that is not yet stored
        self.committed = self.saved = self.shown = time.perf_counter()
        self.finished, self.save_cost = 0, 0.0
        self.waiting = deque(sorted(self._resume()))
        if self.job.passes.spent(self._passes):  # of which some are in what was resumed
            return False
        while True:
            try:
                if not self._fill():
                    break
                self._query()
                memory_is_full = False
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                memory_is_full = True
            if memory_is_full:  # outside of the handler, which would hold on to the memory
                self._back_off()
            if self._save():
                return False
        self._commit()
        self._show(0.0)
        return True

    # --- slots ----------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Bring waiting samples into free slots. Returns whether any slot is taken."""
        occupied, largest = self._occupied(), self.batch_sizes.largest
        num_starts = min(largest - len(occupied), len(self.waiting))
        if len(occupied) and 8 * num_starts < largest and num_starts < len(self.waiting):
            num_starts = 0  # a start has its price: rather several at once
        if not len(occupied) and not num_starts:
            return False
        positions = torch.tensor([self.waiting.popleft() for _ in range(num_starts)])
        try:
            self._enter(occupied, positions)
        except RuntimeError:
            self.waiting.extendleft(reversed(positions.tolist()))
            raise
        return True

    def _enter(self, occupied: Tensor, positions: Tensor) -> None:
        """Start the samples at ``positions`` in free slots, beside the ``occupied`` ones."""
        device, num_starts = self.samples.device, len(positions)
        started = self._start(positions) if num_starts else None
        width = self._width(len(occupied) + num_starts)
        if self.rows is None or not len(occupied):
            assert started is not None
            rows = started.take(torch.arange(len(started), device=device))  # a copy, to write
            self.rows, self.position = rows, torch.full((len(rows),), -1)
            self.age = torch.zeros(len(rows), dtype=torch.int64)
            self.min_margin = torch.full((len(rows),), torch.inf, device=device)
            self.position[:num_starts] = positions
            return
        if width != len(self.position):
            self._resize(occupied, width)
        if started is not None:
            free = (self.position < 0).nonzero().flatten()[:num_starts]
            index = free.to(device)
            self.rows.put(index, started, torch.arange(num_starts, device=device))
            self.min_margin[index] = torch.inf
            self.position[free], self.age[free] = positions, 0

    def _occupied(self) -> Tensor:
        """The slots that hold a sample, as indices on the host."""
        return (self.position >= 0).nonzero().flatten()

    def _width(self, rows: int) -> int:
        # A library's attack gets its batch as it is: its draws depend on the batch.
        return self.batch_sizes.fit(rows) if self.attack.queries else rows

    def _start(self, positions: Tensor) -> Rows:
        """The attack's rows for samples at these positions, filled up to a shape."""
        width = self._width(len(positions))
        positions = positions[torch.arange(width) % len(positions)]
        restart = self.state.attempt[positions].to(self.samples.device)
        clean = self.samples.fetch(self.state.samples[positions])
        random = KeyedRandom(self.job.seed, self.stage.name, clean.ids, restart)
        return self.attack.start(self.oracle, clean, self.threat, random, restart)

    def _resize(self, occupied: Tensor, width: int) -> None:
        """Move the taken slots to the front of a batch of another size."""
        assert self.rows is not None
        index = occupied[torch.arange(width) % len(occupied)]
        self.rows = self.rows.take(index.to(self.samples.device))
        self.position, self.age = self.position[index], self.age[index]
        self.min_margin = self.min_margin[index.to(self.samples.device)]
        self.position[len(occupied) :] = -1

    def _back_off(self) -> None:
        """Memory ran out: restart the searches in progress with a smaller batch."""
        self.batch_sizes.shrink()
        self.referee.chunk = min(self.referee.chunk, self.batch_sizes.largest)
        running = self.position[self._occupied()].sort().values.tolist()
        self.waiting.extendleft(reversed(running))
        self.rows = None
        self.position = self.position[:0]
        if self.samples.device.type == "cuda":
            torch.cuda.empty_cache()
        self.job.progress.note(
            f"out of memory: continuing with {self.batch_sizes.largest} samples side by side "
            f"(trainer.batch_size={self.batch_sizes.largest})"
        )

    # --- one query ------------------------------------------------------------------------------

    def _query(self) -> None:
        rows, attack = self.rows, self.attack
        assert rows is not None
        if attack.queries:
            answer = attack.ask(self.oracle, rows, self.threat)
            self._check_success(rows, answer.logits, answer.usable)
            answer = answer._replace(age=self.age)
            random = KeyedRandom(self.job.seed, self.stage.name, rows.ids, rows.restart)
            age = attack.advance(rows, answer, self.threat, random)
            if attack.peeks:
                logits = self.oracle.peek(rows)
                self._check_success(rows, logits)
                attack.settle(rows, logits, self.threat)
            age_before, self.age = self.age, self.age + 1 if age is None else age
            running = self.position >= 0
            if age is None:
                self.forecast.round(1.0)
            elif running.any():
                self.forecast.round(float((self.age - age_before)[running].float().mean()))
        finished = ((self.position >= 0) & (self.age >= attack.queries)).nonzero().flatten()
        if len(finished):
            self._judge(rows, finished)
            self._release(rows, finished[self.position[finished] >= 0])

    def _check_success(self, rows: Rows, logits: Tensor, usable: Tensor | None = None) -> None:
        """Let the referee judge the rows that look like a success.

        Raises:
            UserError: for a row in search whose gradient is not ``usable``.
        """
        wrong = (logits.argmax(1) != rows.y) | ~finite(logits)
        unmeasured = wrong  # whose margin does not count
        if not self.stays_inside:
            outside = ~self.threat.contains(rows.point, rows.x)
            unmeasured, wrong = wrong | outside, wrong & ~outside
        if self.exact:
            margin = losses.margin(logits, rows.y).neg_().masked_fill_(unmeasured, torch.inf)
            self.min_margin = torch.minimum(self.min_margin, margin)
        flags = (wrong if usable is None else torch.stack((wrong, usable))).cpu()  # the only wait
        wrong, usable = (flags, None) if usable is None else flags
        candidates = (wrong & (self.position >= 0)).nonzero().flatten()
        if len(candidates):
            self._judge(rows, candidates)
        if usable is not None and not usable.all() and (~usable & (self.position >= 0)).any():
            raise UserError(NO_GRADIENT)

    def _judge(self, rows: Rows, slots: Tensor) -> None:
        """Let the referee judge these rows; the broken ones leave the batch."""
        index = to_device(slots, rows.x.device)
        x = rows.x[index]
        judgement = self.referee.judge(x, rows.y[index], rows.point[index])
        rows.forwards[index] += judgement.evaluations
        self.min_margin[index] = torch.minimum(
            self.min_margin[index], torch.where(judgement.broken, torch.inf, judgement.margin)
        )
        distance = self.threat.distance(judgement.point, x)
        broken, wrong, label, margin, distance = to_host(
            judgement.broken, judgement.wrong, judgement.label, judgement.margin, distance
        )
        self.state.mark_robust(self.position[slots[~broken]], wrong[~broken])
        if not broken.any():
            return
        positions = self.position[slots[broken]]
        if self.job.keep_images:
            broken_index = to_device(broken.nonzero().flatten(), rows.x.device)
            self.state.keep_images(positions, judgement.point[broken_index])
        self._release(rows, slots[broken], broke=True)
        columns = (label, margin, distance, wrong)
        self.state.mark_broken(positions, *(column[broken] for column in columns))

    def _release(self, rows: Rows, slots: Tensor, broke: bool = False) -> None:
        """Free the slots of searches that are over."""
        if not len(slots):
            return
        index, positions = to_device(slots, rows.x.device), self.position[slots]
        costs = to_host(self.min_margin[index], rows.forwards[index], rows.backwards[index])
        self.state.add_cost(positions, *costs)
        self.position[slots] = -1
        next_searches = []
        for position, age in zip(positions.tolist(), self.age[slots].tolist(), strict=True):
            attempt = int(self.state.attempt[position])
            if broke or attempt + 1 == self.attack.starts:
                self.unsaved.append(position)
                self.finished += 1
                self.correct -= broke
                self.forecast.ended(attempt * self.attack.queries + age, broke)
            else:
                self.state.attempt[position] = attempt + 1
                next_searches.append(position)
        self.waiting.extendleft(reversed(next_searches))

    # --- saving and progress --------------------------------------------------------------------

    def _save(self) -> bool:
        """Store finished samples and, at times, searches in progress. Returns whether to stop."""
        now = time.perf_counter()
        stop = self.job.deadline() or self.job.passes.spent(self._passes)
        if self.all_or_nothing:
            if stop:  # the work is lost, and the time was spent
                self.store.append(self.stage.name, Records.joined([]), now - self.committed)
            self._show_sometimes(now, stop)
            return stop
        if self.unsaved and (now - self.committed > COMMIT_SECONDS or stop):
            self._commit()
        interval = max(SAVE_SECONDS, self.save_cost / SAVE_SHARE)
        if now - self.saved > interval or stop:
            self._commit(always=True)
            self._save_in_progress()
            self.saved = time.perf_counter()
            self.save_cost = self.saved - now
        self._show_sometimes(now, stop)
        return stop

    def _passes(self) -> int:
        """Those of this search, of finished samples and of others, in earlier sittings too."""
        index = to_device(self._occupied(), self.samples.device)
        return passes(self.state) + (0 if self.rows is None else passes(self.rows, index))

    def _show_sometimes(self, now: float, stop: bool) -> None:
        if now - self.shown > SHOW_SECONDS or stop:
            self._show(self._seconds_left())
            self.shown = now

    def _show(self, seconds_left: float | None) -> None:
        self.job.progress.update(
            self.finished,
            "" if seconds_left is None else self._share,
            correct=self.correct,
            samples=self.total,
            seconds_left=seconds_left,
        )

    def _seconds_left(self) -> float | None:
        if not self.attack.queries:
            return None
        queries = self._queries_made().numpy()
        return self.forecast.seconds(queries, len(self.waiting), self.batch_sizes.largest)

    def _queries_made(self) -> Tensor:
        """Queries of each sample in a slot, over all of its searches."""
        occupied = self._occupied()
        attempts = self.state.attempt[self.position[occupied]]
        return attempts * self.attack.queries + self.age[occupied]

    @property
    def _share(self) -> str:
        """How much of the search is done: samples that move in step all end at once."""
        longest = max(self.attack.starts * self.attack.queries, 1)
        finished = self.finished + float(self._queries_made().sum()) / longest
        return f"{100 * finished / max(len(self.state), 1):.0f} % of the search"

    def _commit(self, always: bool = False) -> None:
        """Store what is finished. always: also the time alone."""
        if not self.unsaved and not always:
            return
        now = time.perf_counter()
        records, images = self.state.records(self.unsaved)
        self.store.append(self.stage.name, records, now - self.committed, images)
        self.unsaved, self.committed = [], now

    def _save_in_progress(self) -> None:
        """Save the searches that are in progress, so that they resume mid-search."""
        if not self.attack.queries:
            return
        content = {f"ledger.{name}": part for name, part in self.state.progress().items()}
        if self.rows is not None and len(occupied := self._occupied()):
            rows = self.rows.take(occupied.to(self.samples.device))
            content |= {f"rows.{f.name}": getattr(rows, f.name) for f in fields(rows)}
            content["rows.smallest"] = self.min_margin[occupied.to(self.samples.device)]
        self.store.save_in_progress(self.stage.name, content)

    def _resume(self) -> set[int]:
        """Resume the searches that were in progress. Returns the positions that have to wait."""
        all_positions = set(range(len(self.state)))
        saves = list(self.store.in_progress_states(self.stage.name))
        for content in saves:  # of this process and others, of this sitting and earlier ones
            self.state.resume(within(content, "ledger."))
        parts = [within(content, "rows.") for content in saves if "rows.ids" in content]
        if not parts:
            return all_positions
        saved = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        newest_row = self.state.newest_rows(saved)
        resumed = sorted(newest_row)[: self.batch_sizes.largest]
        if resumed:
            rows = self._start(torch.tensor(resumed))
            if not {f.name for f in fields(rows)} <= set(saved):
                return all_positions  # written by other code: these searches restart
            index = torch.tensor([newest_row[p] for p in resumed])
            index = index[torch.arange(len(rows)) % len(index)]
            for f in fields(rows):
                setattr(rows, f.name, saved[f.name][index].to(self.samples.device))
            self.rows, self.position = rows, torch.full((len(rows),), -1)
            self.position[: len(resumed)] = torch.tensor(resumed)
            self.age = saved["iteration"][index].clone()
            self.min_margin = saved["smallest"][index].to(self.samples.device)
        return all_positions - set(resumed)
