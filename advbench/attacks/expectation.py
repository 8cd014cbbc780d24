"""Expectation over transformations (EOT; Athalye et al. 2018, arXiv 1707.07397)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from advbench.attacks.base import Answer, Attack, Oracle, Rows
from advbench.errors import UserError


class Expectation(Oracle):
    """Answers with the mean over fresh evaluations of a stochastic model (EOT).

    Args:
        model: as ``Oracle`` takes it; each call draws anew.
        samples: EOT samples, at least 1. Logits, losses and gradients are means; the counts are
            sums.
        check: as for ``Oracle``.
        needs_clean_input: as for ``Oracle``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        samples: int,
        check: bool = True,
        needs_clean_input: bool = False,
    ) -> None:
        super().__init__(model, check, needs_clean_input)
        self.samples = samples

    def logits(self, x: Tensor, clean: Tensor | None = None) -> Tensor:
        logits = super().logits
        return torch.stack([logits(x, clean) for _ in range(self.samples)]).mean(0)

    def peek(self, rows: Rows) -> Tensor:
        rows.forwards += self.samples - 1
        return super().peek(rows)

    def query(self, attack: Attack, rows: Rows, gradient: bool = True) -> Answer:
        logits, loss, gradients, usable, _ = super().query(attack, rows, gradient)
        for _ in range(self.samples - 1):
            sample = super().query(attack, rows, gradient)
            logits, loss = logits + sample.logits, loss + sample.loss
            if gradients is not None and sample.gradient is not None:
                gradients = gradients + sample.gradient
            if usable is not None and sample.usable is not None:
                usable = usable | sample.usable
        n = self.samples
        return Answer(logits / n, loss / n, None if gradients is None else gradients / n, usable)

    def boundaries(self, rows: Rows) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
        raise UserError("untargeted FAB takes no mean over EOT samples: use the targeted one")
