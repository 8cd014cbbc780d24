"""Expectation over transformations (EOT; Athalye et al. 2018, arXiv 1707.07397)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from advbench.attacks.base import Answer, Attack, Oracle, Rows


class Expectation(Oracle):
    """Answers with the mean over fresh draws of a stochastic model.

    draws: at least 1.  Logits, losses and gradients are means; the counts are of all draws.
    """

    def __init__(self, model: torch.nn.Module, draws: int, check: bool = True) -> None:
        super().__init__(model, check)
        self.draws = draws

    def logits(self, x: Tensor) -> Tensor:
        return torch.stack([super(Expectation, self).logits(x) for _ in range(self.draws)]).mean(0)

    def peek(self, rows: Rows) -> Tensor:
        rows.forwards += self.draws - 1
        return super().peek(rows)

    def query(self, attack: Attack, rows: Rows, gradient: bool = True) -> Answer:
        total = super().query(attack, rows, gradient)
        for _ in range(self.draws - 1):
            answer = super().query(attack, rows, gradient)
            total = Answer(
                total.logits + answer.logits,
                total.loss + answer.loss,
                None if answer.gradient is None else total.gradient + answer.gradient,
                None if answer.usable is None else total.usable | answer.usable,
            )
        gradient_mean = None if total.gradient is None else total.gradient / self.draws
        return Answer(
            total.logits / self.draws, total.loss / self.draws, gradient_mean, total.usable
        )

    def classwise(self, rows: Rows) -> tuple[Tensor, Iterator[Tensor]]:
        raise NotImplementedError("untargeted FAB takes no mean over draws: use the targeted one")
