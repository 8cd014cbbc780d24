"""The referee: projects points into the threat, scores them, and decides which are adversarial."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.threat import Threat
from advbench.devices import full_float32, kept

CONFIRMATIONS = (3, 10)
CHUNKS = {"cpu": 16, "cuda": 128}
"""Images per forward pass, a fixed number: the shape of a batch decides its rounding, and a GPU
takes as long for few images as for many."""


class Judgement(NamedTuple):
    """The referee's results for N proposals."""

    point: Tensor
    """What was judged, inside the threat and [0, 1], (N, C, H, W)."""
    label: Tensor
    """The predicted class, (N,)."""
    margin: Tensor
    """The true logit minus the best wrong one, (N,); minus infinity where a logit is not finite."""
    broken: Tensor
    """Whether the label differs from y, or a logit is not finite, (N,)."""
    wrong: Tensor
    """The share of evaluations in which that was so, (N,); a deterministic model is evaluated
    once."""
    evaluations: Tensor
    """Forward passes spent, (N,)."""


def finite(logits: Tensor) -> Tensor:
    """Which rows have finite logits alone: (N, K) -> (N,). The argmax of NaN says nothing."""
    return (logits.abs() < torch.inf).all(1)


class Referee:
    """Scores proposals on the real model in float32.

    What is judged is never the proposal itself but its projection into the threat around x: a point
    outside the budget, or outside [0, 1], can't count. Pixels that are not finite are put back to
    x's.

    Args:
        model: the real one, in evaluation mode; (N, C, H, W) to logits (N, K).
        threat: what counts as a proposal.
        chunk: images per forward pass. It is always full, so that what the referee finds does not
            depend on how many proposals came at once.
        draws: evaluations of a stochastic model, at least 1. A point is wrong if more than half of
            them are; its margin is their upper median, so that its sign says the same. Of
            many proposals some are wrong by chance, so one counts only if it is wrong again in
            ``CONFIRMATIONS`` times as many fresh evaluations.
    """

    def __init__(
        self, model: nn.Module, threat: Threat, chunk: int = CHUNKS["cpu"], draws: int = 1
    ) -> None:
        self.model = model
        self.threat = threat
        self.chunk = chunk
        self.draws = draws

    def judge(self, x: Tensor, y: Tensor, proposal: Tensor) -> Judgement:
        """Judge one proposal for each image.

        Args:
            x: clean images in [0, 1], (N, C, H, W).
            y: true classes, (N,).
            proposal: (N, C, H, W), any numbers.
        """
        proposal = proposal.detach().to(torch.float32)
        proposal = torch.where(proposal.isfinite(), proposal, x)
        point = self.threat.project_closely(proposal, x)
        judgement = self.score(point, y)
        for factor in CONFIRMATIONS if self.draws > 1 else ():
            candidates = judgement.broken.nonzero().squeeze(1)
            if len(candidates):
                confirmation = self.score(point[candidates], y[candidates], factor * self.draws)
                judgement.label[candidates] = confirmation.label
                judgement.margin[candidates] = confirmation.margin
                judgement.broken[candidates] = confirmation.broken
                judgement.wrong[candidates] = confirmation.wrong
                judgement.evaluations[candidates] += confirmation.evaluations
        return judgement

    @torch.no_grad()
    def score(self, point: Tensor, y: Tensor, draws: int | None = None) -> Judgement:
        """Score points as they are, without a projection.

        Args:
            point: (N, C, H, W).
            y: true classes, (N,).
            draws: evaluations of a stochastic model; None is the referee's own number.
        """
        draws = draws or self.draws
        with full_float32():  # whatever the search runs in
            evaluations = [self._score(point, y) for _ in range(draws)]
        label, margin, errors = (torch.stack(parts) for parts in zip(*evaluations, strict=True))
        error_rate, counts = errors.float().mean(0), torch.full_like(y, draws)
        if draws == 1:
            return Judgement(point, label[0], margin[0], errors[0], error_rate, counts)
        broken = 2 * errors.sum(0) > draws
        wrong_label = torch.where(label != y, label, -1).amax(0)  # of one of the evaluations
        return Judgement(
            point,
            torch.where(broken, wrong_label, y),
            margin.sort(0).values[draws // 2],
            broken,
            error_rate,
            counts,
        )

    def _score(self, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Label, margin and broken of each row."""
        parts = []
        for part in point.split(self.chunk):
            padding = self.chunk - len(part)
            batch = (
                torch.cat([part, part[:1].expand(padding, *part.shape[1:])]) if padding else part
            )
            parts.append(kept(self.model(batch))[: len(part)].float())
        logits = torch.cat(parts)
        label, is_finite = logits.argmax(1), finite(logits)
        margin = torch.where(is_finite, -losses.margin(logits, y), -torch.inf)
        return label, margin, (label != y) | ~is_finite
