"""Runs one stage on a fixed batch of a batch-dependent model, whose rows are attacked together.

If an attack replaces fooled samples by others, the predictions of the rest change too. So here the
batch never changes: all its rows are attacked until the end, and a sample is broken if it is wrong

    in the batch: among the adversarial images of all rows, at any step of any search; or
    alone: as the only adversarial image among clean ones.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from advbench.attacks.base import Clean, Oracle, Rows
from advbench.attacks.random import KeyedRandom
from advbench.attacks.referee import Referee, finite
from advbench.attacks.threat import Threat
from advbench.devices import out_of_memory
from advbench.errors import UserError
from advbench.evaluation.groups import out_of_memory_error
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.search import NO_GRADIENT, SHOW_SECONDS
from advbench.evaluation.store import Records, Store


class BatchReferee:
    """Judges the images of a fixed batch on the real model, and keeps the results.

    Attributes:
        broken, alone: (N,), see above.
        label, margin, distance: as in ``Records``.
        closest: inside the threat, the image of each row with the smallest margin so far.
        images: the image that broke each row, or the clean one.
        forwards: passes of each row.

    Args:
        model: the real one, in evaluation mode.
        threat: what counts as a proposal.
        clean: the batch, N rows.
    """

    def __init__(self, model: nn.Module, threat: Threat, clean: Clean) -> None:
        self.clean, self.threat = clean, threat
        n = len(clean.y)
        # The whole batch in one pass, which it has to be.
        self.referee = Referee(model, threat, chunk=n)
        self.broken = torch.zeros_like(clean.y, dtype=torch.bool)
        self.alone = self.broken.clone()
        self.label = clean.y.clone()
        self.margin = torch.full((n,), torch.inf, device=clean.x.device)
        self.distance = torch.full_like(self.margin, torch.nan)
        self.closest = clean.x.clone()
        self.images = clean.x.clone()
        self.forwards = 0

    def judge(self, proposal: Tensor) -> None:
        """Score a batch of proposals, (N, C, H, W), on the real model."""
        judgement = self.referee.judge(self.clean.x, self.clean.y, proposal)
        self.forwards += 1
        improved = judgement.margin < self.margin
        self.closest[improved] = judgement.point[improved]
        self.margin = torch.minimum(self.margin, judgement.margin)
        self._break(judgement.broken & ~self.broken, judgement.label, judgement.point)

    def judge_alone(self, rows: Tensor) -> None:
        """Score the closest image of each of these rows alone among clean images."""
        for row in rows.tolist():
            batch = self.clean.x.clone()
            batch[row] = self.closest[row]
            judgement = self.referee.score(batch, self.clean.y)
            self.forwards += 1
            self.alone[row] = judgement.broken[row]
            if judgement.broken[row]:
                self.images[row] = batch[row]
            newly_broken = torch.zeros_like(judgement.broken)
            newly_broken[row] = judgement.broken[row] & ~self.broken[row]
            self._break(newly_broken, judgement.label, batch)

    def _break(self, new: Tensor, label: Tensor, point: Tensor) -> None:
        self.broken |= new
        self.label = torch.where(new, label, self.label)
        distance = self.threat.distance(point, self.clean.x)
        self.distance = torch.where(new, distance, self.distance)
        self.images[new] = point[new]


class JointSearch:
    """Runs a stage on fixed batches, one after the other.

    Args:
        job: what is attacked, with the stage's own threat and deadline.
        stage: the attack and its victim.
        oracle: answers for the victim.
        store: where records go.
        correct: samples that are still correct as the stage begins, of ``total``.
        total: samples of this process.
    """

    def __init__(
        self, job: Job, stage: Stage, oracle: Oracle, store: Store, *, correct: int, total: int
    ) -> None:
        self.job, self.stage, self.attack = job, stage, stage.attack
        self.oracle, self.store = oracle, store
        self.correct, self.total = correct, total
        self.finished = 0
        self.shown = time.perf_counter()

    def run(self, rows: Tensor, members: Tensor) -> bool:
        """Attack the batch with the ids ``rows``, and keep a record of its ``members``.

        Returns False if time was up before, and then nothing is kept. Raises UserError if the
        device has no memory for the batch, which can't be cut.
        """
        try:
            return self._run(rows, members)
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise
            raise out_of_memory_error(len(rows)) from problem

    def _run(self, rows: Tensor, members: Tensor) -> bool:
        start = time.perf_counter()
        batch = self.job.samples.fetch(rows)
        order = rows.argsort()
        order = order[torch.isin(rows[order], members)].to(batch.x.device)
        referee = BatchReferee(self.job.model, self.job.threat, batch)
        forwards, backwards = torch.zeros_like(batch.ids), torch.zeros_like(batch.ids)
        for attempt in range(self.attack.starts):
            state = self._search(batch, referee, attempt, len(order))
            if state is None:  # the work is lost, and the time was spent
                seconds = time.perf_counter() - start
                self.store.append(self.stage.name, Records.joined([]), seconds)
                return False
            forwards, backwards = forwards + state.forwards, backwards + state.backwards
        referee.judge_alone(order)
        broken = referee.broken | referee.alone
        columns = {
            "sample": batch.ids,
            "broken": broken,
            "label": referee.label,
            "margin": referee.margin,
            "distance": referee.distance,
            "wrong": referee.broken.float(),
            "alone": referee.alone,
            "forwards": forwards + referee.forwards,
            "backwards": backwards,
        }
        records = Records(**{name: part[order].cpu().numpy() for name, part in columns.items()})
        # What broke among others is not a proof by itself.
        images = None
        if self.job.keep_images:
            images = referee.images[order][referee.alone[order]].cpu().numpy()
        self.store.append(self.stage.name, records, time.perf_counter() - start, images)
        self.finished += len(order)
        self.correct -= int(records.alone.sum())
        return True

    def _search(
        self, batch: Clean, referee: BatchReferee, attempt: int, counted: int
    ) -> Rows | None:
        """One search of all rows at once; returns their state, or None if time was up before."""
        attack, searches = self.attack, self.attack.starts
        restart = torch.full_like(batch.ids, attempt)
        random = KeyedRandom(self.job.seed, self.stage.name, batch.ids, restart)
        rows = attack.start(self.oracle, batch, self.job.threat, random, restart)
        for query in range(attack.queries):
            answer = attack.ask(self.oracle, rows, self.job.threat)
            _check_success(referee, answer.logits, rows.point)
            if answer.usable is not None and not bool(answer.usable.all()):
                raise UserError(NO_GRADIENT)
            attack.advance(rows, answer, self.job.threat, random)
            if attack.peeks:
                logits = self.oracle.peek(rows)
                _check_success(referee, logits, rows.point)
                attack.settle(rows, logits, self.job.threat)
            if time.perf_counter() - self.shown > SHOW_SECONDS:
                self.shown = time.perf_counter()
                progress = (attempt + (query + 1) / attack.queries) / searches
                self.job.progress.update(
                    self.finished + int(progress * counted),
                    correct=self.correct,
                    samples=self.total,
                )
            if self.job.deadline():
                return None
        referee.judge(rows.point)
        referee.judge(referee.closest)  # the best of each row, together
        return rows


def _check_success(referee: BatchReferee, logits: Tensor, point: Tensor) -> None:
    """Judge the batch where the victim calls a row wrong that is still robust."""
    wrong = (logits.argmax(1) != referee.clean.y) | ~finite(logits)
    if bool((wrong & ~referee.broken).any()):
        referee.judge(point)
