"""The referee: no attack marks its own work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.threat import Threat


class Judgement(NamedTuple):
    """point: what was judged, inside the threat and [0, 1].  label: predicted class (N,).
    margin: true logit minus the best wrong one (N,); minus infinity where a logit is not finite.
    broken: label differs from y, or a logit is not finite (N,).
    """

    point: Tensor
    label: Tensor
    margin: Tensor
    broken: Tensor


def finite(logits: Tensor) -> Tensor:
    """Which rows have finite logits alone: (N, K) -> (N,). The argmax of NaN says nothing."""
    return logits.isfinite().all(1)


class Referee:
    """Scores proposals on the real model in float32.

    What is judged is never the proposal itself but its projection into the threat around x: a
    point outside the budget, or outside [0, 1], can't count. NaN pixels are put back to x's.
    """

    def __init__(self, model: nn.Module, threat: Threat) -> None:
        self.model = model
        self.threat = threat

    @torch.no_grad()
    def judge(self, x: Tensor, y: Tensor, proposal: Tensor) -> Judgement:
        """x, proposal: (N, C, H, W).  y: (N,)."""
        proposal = proposal.detach().to(torch.float32)
        proposal = torch.where(proposal.isnan(), x, proposal)
        point = self.threat.project(proposal, x)
        logits = self.model(point).float()
        label = logits.argmax(1)
        sound = finite(logits)
        margin = torch.where(sound, -losses.margin(logits, y), -torch.inf)
        return Judgement(point, label, margin, (label != y) | ~sound)
