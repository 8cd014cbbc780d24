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
from advbench.attacks.waits import fetched, sent
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
SAVE_SHARE = 0.02  # of the time may go into writing down what is under way


class Search:
    """A stage at work on samples that come and go one by one.

    Args:
        job: what is attacked, with the stage's own threat and deadline.
        stage: the attack, and whom it attacks.
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
        logits = job.traits.output == "logits" and job.fast_model.precision == "32"
        self.exact = stage.victim == "model" and logits
        # Everything is written at the end, and nothing before: what a stochastic model did can't
        # be resumed in the middle.
        self.whole = job.traits.stochastic
        self.inside = self.attack.stays_inside(job.threat)
        self.rows: Rows | None = None
        # For each row: position in the state or -1; queries of its search; smallest margin seen.
        self.place = torch.empty(0, dtype=torch.int64)
        self.age = torch.empty(0, dtype=torch.int64)
        self.smallest = torch.empty(0)

    def run(self, pending: Tensor) -> bool:
        """Attack the samples ``pending`` (sorted ids). Returns False if it had to stop before."""
        self.job.progress.stage(self.stage.name, len(pending))
        self.state = StageState(pending, self.samples.split.labels[pending])
        self.forecast = Forecast(self.attack.starts * self.attack.queries)
        self.fresh: list[int] = []  # positions with a record that is not yet stored
        self.done = 0
        self.committed = self.saved = self.shown = time.perf_counter()
        self.save_cost = 0.0
        waiting = self._resume()
        if self.job.passes.spent(self._passes):  # of which some are in what was resumed
            return False
        self.waiting = deque(position for position in range(len(pending)) if position in waiting)
        while True:
            try:
                if not self._fill():
                    break
                self._round()
                full = False
            except RuntimeError as problem:
                if not out_of_memory(problem):
                    raise
                full = True
            if full:  # outside of the handler, which would hold on to the memory
                self._back_off()
            if self._write_down():
                return False
        self._commit()
        self._show(0.0)
        return True

    # --- slots ----------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Bring waiting samples into free slots. Returns whether any slot is taken."""
        taken = (self.place >= 0).nonzero().flatten()
        entering = min(self.batch_sizes.largest - len(taken), len(self.waiting))
        if len(taken) and 8 * entering < self.batch_sizes.largest and entering < len(self.waiting):
            entering = 0  # a start has its price: rather several at once
        if not len(taken) and not entering:
            return False
        positions = torch.tensor([self.waiting.popleft() for _ in range(entering)])
        try:
            self._enter(taken, positions)
        except RuntimeError:
            self.waiting.extendleft(reversed(positions.tolist()))
            raise
        return True

    def _enter(self, taken: Tensor, positions: Tensor) -> None:
        """Start the samples at ``positions`` in free slots, beside the ``taken`` ones."""
        device, entering = self.samples.device, len(positions)
        started = self._start(positions) if entering else None
        width = self._width(len(taken) + entering)
        if self.rows is None or not len(taken):
            assert started is not None
            everyone = torch.arange(len(started))
            rows = started.take(everyone.to(device))  # fields of their own, to write
            self.rows, self.place = rows, torch.full((len(rows),), -1)
            self.age = torch.zeros(len(rows), dtype=torch.int64)
            self.smallest = torch.full((len(rows),), torch.inf, device=device)
            self.place[:entering] = positions
            return
        if width != len(self.place):
            self._resize(taken, width)
        if started is not None:
            where = (self.place < 0).nonzero().flatten()[:entering]
            there = where.to(device)
            self.rows.put(there, started, torch.arange(entering, device=device))
            self.smallest[there] = torch.inf
            self.place[where], self.age[where] = positions, 0

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

    def _resize(self, taken: Tensor, width: int) -> None:
        """Move the taken slots to the front of a batch of another size."""
        assert self.rows is not None
        index = taken[torch.arange(width) % len(taken)]
        self.rows = self.rows.take(index.to(self.samples.device))
        self.place, self.age = self.place[index], self.age[index]
        self.smallest = self.smallest[index.to(self.samples.device)]
        self.place[len(taken) :] = -1

    def _back_off(self) -> None:
        """Memory ran out: begin the searches under way again, fewer side by side."""
        self.batch_sizes.shrink()
        self.referee.chunk = min(self.referee.chunk, self.batch_sizes.largest)
        back = self.place[self.place >= 0].sort().values.tolist()
        self.waiting.extendleft(reversed(back))
        self.rows = None
        self.place = self.place[:0]
        if self.samples.device.type == "cuda":
            torch.cuda.empty_cache()
        self.job.progress.note(
            f"out of memory: continuing with {self.batch_sizes.largest} samples side by side "
            f"(trainer.batch_size={self.batch_sizes.largest})"
        )

    # --- one query ------------------------------------------------------------------------------

    def _round(self) -> None:
        rows, attack = self.rows, self.attack
        assert rows is not None
        if attack.queries:
            answer = attack.ask(self.oracle, rows, self.threat)
            self._look(rows, answer.logits, answer.usable)
            answer = answer._replace(age=self.age)
            random = KeyedRandom(self.job.seed, self.stage.name, rows.ids, rows.restart)
            age = attack.advance(rows, answer, self.threat, random)
            if attack.peeks:
                logits = self.oracle.peek(rows)
                self._look(rows, logits)
                attack.settle(rows, logits, self.threat)
            before, self.age = self.age, self.age + 1 if age is None else age
            going = self.place >= 0
            if going.any():
                self.forecast.round(float((self.age - before)[going].float().mean()))
        over = ((self.place >= 0) & (self.age >= attack.queries)).nonzero().flatten()
        if len(over):
            self._judge(rows, over)
            self._leave(rows, over[self.place[over] >= 0])

    def _look(self, rows: Rows, logits: Tensor, usable: Tensor | None = None) -> None:
        """Put before the referee what looks like a success.

        Raises:
            UserError: for a row in search whose gradient is not ``usable``.
        """
        hit = (logits.argmax(1) != rows.y) | ~finite(logits)
        margin = torch.where(hit, torch.inf, -losses.margin(logits, rows.y)) if self.exact else None
        if not self.inside:
            within = self.threat.contains(rows.point, rows.x)
            hit = hit & within
            margin = None if margin is None else torch.where(within, margin, torch.inf)
        if margin is not None:
            self.smallest = torch.minimum(self.smallest, margin)
        flags = (hit if usable is None else torch.stack((hit, usable))).cpu()  # the only wait
        hits, useless = (flags, None) if usable is None else (flags[0], ~flags[1])
        hits = (hits & (self.place >= 0)).nonzero().flatten()
        if len(hits):
            self._judge(rows, hits)
        if useless is not None and (useless & (self.place >= 0)).any():
            raise UserError(NO_GRADIENT)

    def _judge(self, rows: Rows, slots: Tensor) -> None:
        """Put rows before the referee; the broken ones leave."""
        at = sent(slots, rows.x.device)
        x = rows.x[at]
        judged = self.referee.judge(x, rows.y[at], rows.point[at])
        rows.forwards[at] += judged.evaluations
        self.smallest[at] = torch.minimum(
            self.smallest[at], torch.where(judged.broken, torch.inf, judged.margin)
        )
        distance = self.threat.distance(judged.point, x)
        broken, wrong, label, margin, distance = fetched(
            judged.broken, judged.wrong, judged.label, judged.margin, distance
        )
        self.state.robust(self.place[slots[~broken]], wrong[~broken])
        if not broken.any():
            return
        positions = self.place[slots[broken]]
        if self.job.keep_images:
            mine = sent(broken.nonzero().flatten(), rows.x.device)
            self.state.keep_images(positions, judged.point[mine])
        self._leave(rows, slots[broken], broke=True)
        self.state.breaks(positions, label[broken], margin[broken], distance[broken], wrong[broken])

    def _leave(self, rows: Rows, slots: Tensor, broke: bool = False) -> None:
        """Free the slots of searches that are over."""
        if not len(slots):
            return
        at, positions = sent(slots, rows.x.device), self.place[slots]
        spent = fetched(self.smallest[at], rows.forwards[at], rows.backwards[at])
        self.state.spend(positions, *spent)
        self.place[slots] = -1
        again = []
        for position, age in zip(positions.tolist(), self.age[slots].tolist(), strict=True):
            attempt = int(self.state.attempt[position])
            if broke or attempt + 1 == self.attack.starts:
                self.fresh.append(position)
                self.done += 1
                self.correct -= broke
                self.forecast.ended(attempt * self.attack.queries + age, broke)
            else:
                self.state.attempt[position] = attempt + 1
                again.append(position)
        self.waiting.extendleft(reversed(again))

    # --- what is written down -------------------------------------------------------------------

    def _write_down(self) -> bool:
        """Store what is finished and, now and then, what is under way. Returns whether to stop."""
        now = time.perf_counter()
        late = self.job.deadline() or self.job.passes.spent(self._passes)
        if self.whole:
            if late:  # the work is lost, and the time was spent
                self.store.append(self.stage.name, Records.joined([]), now - self.committed)
            self._show_now_and_then(now, late)
            return late
        if self.fresh and (now - self.committed > COMMIT_SECONDS or late):
            self._commit()
        pause = max(SAVE_SECONDS, self.save_cost / SAVE_SHARE)
        if now - self.saved > pause or late:
            self._commit(always=True)
            self._save_in_progress()
            self.saved = time.perf_counter()
            self.save_cost = self.saved - now
        self._show_now_and_then(now, late)
        return late

    def _passes(self) -> int:
        """Those of this search, of finished samples and of others, in earlier sittings too."""
        taken = sent((self.place >= 0).nonzero().flatten(), self.samples.device)
        return passes(self.state) + (0 if self.rows is None else passes(self.rows, taken))

    def _show_now_and_then(self, now: float, late: bool) -> None:
        if now - self.shown > SHOW_SECONDS or late:
            self._show(self._seconds_left())
            self.shown = now

    def _show(self, seconds_left: float | None) -> None:
        self.job.progress.update(
            self.done,
            "" if seconds_left is None else self._share,
            correct=self.correct,
            samples=self.total,
            seconds_left=seconds_left,
        )

    def _seconds_left(self) -> float | None:
        if not self.attack.queries:
            return None
        taken = self.place >= 0
        attempts = self.state.attempt[self.place[taken]]
        queries = attempts * self.attack.queries + self.age[taken]
        return self.forecast.seconds(queries.numpy(), len(self.waiting), self.batch_sizes.largest)

    @property
    def _share(self) -> str:
        """How much of the search is done: samples that move in step all end at once."""
        longest = max(self.attack.starts * self.attack.queries, 1)
        at = self.place >= 0
        begun = self.state.attempt[self.place[at]] * self.attack.queries + self.age[at]
        done = self.done + float(begun.sum()) / longest
        return f"{100 * done / max(len(self.state), 1):.0f} % of the search"

    def _commit(self, always: bool = False) -> None:
        """Store what is finished. always: also the time alone."""
        if not self.fresh and not always:
            return
        now = time.perf_counter()
        records, images = self.state.records(self.fresh)
        self.store.append(self.stage.name, records, now - self.committed, images)
        self.fresh, self.committed = [], now

    def _save_in_progress(self) -> None:
        """Save the searches that are in progress, so that they resume mid-search."""
        if not self.attack.queries:
            return
        content = {f"ledger.{name}": part for name, part in self.state.progress().items()}
        taken = (self.place >= 0).nonzero().flatten()
        if self.rows is not None and len(taken):
            at = taken.to(self.samples.device)
            content |= {f"rows.{f.name}": getattr(self.rows, f.name)[at] for f in fields(self.rows)}
            content["rows.smallest"] = self.smallest[at]
        self.store.save_in_progress(self.stage.name, content)

    def _resume(self) -> set[int]:
        """Resume the searches that were in progress. Returns the positions that have to wait."""
        everyone = set(range(len(self.state)))
        saves = list(self.store.in_progress_states(self.stage.name))
        for content in saves:  # of this process and others, of this sitting and earlier ones
            self.state.resume(within(content, "ledger."))
        parts = [within(content, "rows.") for content in saves if "rows.ids" in content]
        if not parts:
            return everyone
        saved = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        furthest: dict[int, int] = {}
        for row in saved["iteration"].argsort(stable=True).tolist():
            position = int(torch.searchsorted(self.state.samples, saved["ids"][row]))
            mine = position < len(self.state) and self.state.samples[position] == saved["ids"][row]
            if mine and saved["restart"][row] == self.state.attempt[position]:
                furthest[position] = row
        boarding = sorted(furthest)[: self.batch_sizes.largest]
        if boarding:
            rows = self._start(torch.tensor(boarding))
            if not {f.name for f in fields(rows)} <= set(saved):
                return everyone  # written by other code: these searches restart
            index = torch.tensor([furthest[p] for p in boarding])
            index = index[torch.arange(len(rows)) % len(index)]
            for f in fields(rows):
                setattr(rows, f.name, saved[f.name][index].to(self.samples.device))
            self.rows, self.place = rows, torch.full((len(rows),), -1)
            self.place[: len(boarding)] = torch.tensor(boarding)
            self.age = saved["iteration"][index].clone()
            self.smallest = saved["smallest"][index].to(self.samples.device)
        return everyone - set(boarding)
