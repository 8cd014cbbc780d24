"""TRADES: accuracy traded against stable predictions (Zhang et al. 2019, arXiv 1901.08573)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from advbench.attacks.base import Clean, Oracle, Rows, started
from advbench.attacks.pgd import PGD
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat
from advbench.defenses.base import PartName, Step
from advbench.errors import UserError
from advbench.recipes.base import AdversarialRecipe

NOISE = 0.001  # standard deviation of the start, in pixel units; as in the authors' code


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """KL(clean || softmax(logits)) of each row: log-probabilities and logits (N, K) -> (N,), >= 0.

    Both sides stay logarithms: a probability that underflows to zero counts as zero, not as NaN.
    """
    log_q = F.log_softmax(logits.float(), dim=1)
    return F.kl_div(log_q, clean, reduction="none", log_target=True).sum(1)


@dataclass
class DivergenceRows(Rows):
    """State of ``DivergencePGD``."""

    clean: Tensor
    """Log-probabilities at x, (N, K), from which the search moves away."""


@dataclass(frozen=True)
class DivergencePGD(PGD):
    """PGD that raises KL(model(x) || model(x')), whatever the classes are (eq. 5).

    At x itself the gradient is zero, so the search starts at x plus a little normal noise. Of the
    parameters of PGD it uses ``steps`` and ``step_size``.
    """

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        point = threat.project(clean.x + NOISE * random.normal(clean.x), clean.x)
        log_p = F.log_softmax(oracle.logits(clean.x).float(), dim=1)
        return DivergenceRows(**started(clean, point, restart), clean=log_p)

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        assert isinstance(rows, DivergenceRows)
        return divergence(rows.clean, logits)


@dataclass(frozen=True)
class Consistent(AdversarialRecipe):
    """A recipe on x and x' with beta times a divergence between the answers there in its loss.

    Raises:
        UserError: for values out of range, and for l1 threats.
    """

    beta: float = 6.0
    """Weight of the divergence, at least 0."""
    steps: int = 10
    """Steps of the search, at least 1."""
    step_size: float | str | None = None
    """In pixel units; None as in ``advbench.attacks.pgd.PGD``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise UserError(f"recipe.beta={self.beta:g} is not a number from 0 on")

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("clean", "adversarial")


@dataclass(frozen=True)
class TRADES(Consistent):
    """Cross-entropy on x plus beta KL(model(x) || model(x')), and x' where that KL is large.

    ``beta`` is 1 / lambda of the paper.
    """

    def attack(self) -> DivergencePGD:
        return DivergencePGD(steps=self.steps, step_size=self.step_size)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        assert step.clean is not None and step.adversarial is not None
        log_p = F.log_softmax(step.clean.logits.float(), dim=1)
        kl = divergence(log_p, step.adversarial.logits).mean()
        return {"ce": self.cross_entropy(step.clean, step.labels), "kl": self.beta * kl}
