"""MFDV-SNN: maximise the variance of the feature distribution (Yang et al., arXiv 2201.00148)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.config.roles import Role
from advbench.defenses.base import Defense, Step, Surrogate, Traits
from advbench.errors import UserError
from advbench.surgery import twin

RHO_MIN = -10.0  # log variance; a standard deviation of 0.0067, next to none


class VarianceHead(nn.Module):
    """A linear classifier of features with a noise whose size depends on the input.

    mu = W_m h + b_m and rho = clamp(W_v h + b_v, -10, rho_max), the log variance; then z = mu +
    exp(rho / 2) * noise with noise N(0, I) for each row and draw, in training and in evaluation
    alike, from PyTorch's global generator; logits = C z + c.

    Args:
        head: the linear head in whose place this is put.
        features: D', the width of z.
        rho_max: the largest log variance.
        draws: evaluations of which evaluation mode returns the log of the mean softmax; with 1,
            the logits of one. Training takes one.

    Attributes:
        noise: whether there is any; without it the logits are C mu + c, the mean over draws.
    """

    def __init__(
        self, head: nn.Linear, features: int, *, rho_max: float = 4.0, draws: int = 1
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": head.weight.device, "dtype": head.weight.dtype}
        self.mu = nn.Linear(head.in_features, features, **like)
        self.rho = nn.Linear(head.in_features, features, **like)
        self.classifier = nn.Linear(features, head.out_features, **like)
        # rho = 0, a variance of 1 for every input: well inside the clamp, outside which rho has no
        # gradient, and on the scale that mu and C start on, so both learn with the noise there.
        nn.init.zeros_(self.rho.weight)
        nn.init.zeros_(self.rho.bias)
        self.rho_max = rho_max
        self.draws = draws
        self.noise = True

    def log_variance(self, h: Tensor) -> Tensor:
        """rho of features h: (N, D) -> (N, D'), float32 under autocast too."""
        return self.rho(h).float().clamp(RHO_MIN, self.rho_max)

    def forward(self, h: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        mu = self.mu(h)
        if not self.noise:
            return self.classifier(mu)
        n = 1 if self.training else self.draws
        sigma = (self.log_variance(h) / 2).exp()
        noise = torch.randn((n, *sigma.shape), device=sigma.device, dtype=sigma.dtype)
        logits = self.classifier((mu + sigma * noise).to(mu.dtype))
        if n == 1:
            return logits[0]
        return logits.float().log_softmax(2).logsumexp(0) - math.log(n)

    def extra_repr(self) -> str:
        return f"rho_max={self.rho_max:g}, draws={self.draws}, noise={self.noise}"


@dataclass(frozen=True)
class MFDVSNN(Defense):
    """A ``VarianceHead``, and a reward for the variance of its features.

    The paper's idea; D', the clamp, the linear maps and their start are our reading.

    Raises:
        UserError: for values out of range.
    """

    features: int = 64
    """D', the number of noisy features, at least 1."""
    variance_weight: float = 0.01
    """Weight of the term -mean(rho), the mean over batch and dimensions, at least 0."""
    rho_max: float = 4.0
    """The largest log variance, above -10. Without it the term has no lower bound."""
    classifier_decay: float = 5e-4
    """Weight of the term 0.5 |C|^2, at least 0; it adds to the optimizer's weight decay."""
    draws: int = field(default=1, metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """Evaluations whose mean softmax is the answer in evaluation mode, at least 1."""

    def __post_init__(self) -> None:
        for name in ("features", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"defense.{name}={getattr(self, name)} is not at least 1")
        for name in ("variance_weight", "classifier_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"defense.{name}={getattr(self, name):g} is not a number from 0 on")
        if not RHO_MIN < self.rho_max < math.inf:
            raise UserError(f"defense.rho_max={self.rho_max:g} is not a number above {RHO_MIN:g}")

    def traits(self, model: nn.Module) -> Traits:
        return Traits(stochastic=True)

    def apply(self, model: Classifier) -> Classifier:
        """Puts a ``VarianceHead`` in the place of ``model.head``.

        Raises:
            UserError: for a head that is not linear.
        """
        head = model.head
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"MFDV-SNN replaces a linear head and this one is {type(head).__name__}: take a "
                "backbone with a linear head, and no other defense that replaces it"
            )
        model.head = VarianceHead(head, self.features, rho_max=self.rho_max, draws=self.draws)
        model.head.train(head.training)
        return model

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        """The variance term, over the parts that the recipe trains on, and the decay of C.

        rho comes from the features again: two small matrix products, and no state to keep.
        """
        (head,) = _heads(model)
        trained = [part for name, part in step.parts.items() if name not in step.borrowed]
        rho = torch.stack([head.log_variance(part.features).mean() for part in trained]).mean()
        return {
            "variance": -self.variance_weight * rho,
            "classifier_decay": 0.5 * self.classifier_decay * head.classifier.weight.square().sum(),
        }

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        mean = twin(model)
        for head in _heads(mean):
            head.noise = False
        why = "no noise: the head is linear, so these are the expected logits of one draw"
        return {"mean": Surrogate(mean, exact=False, loss="margin", why=why)}


def _heads(model: nn.Module) -> list[VarianceHead]:
    return [module for module in model.modules() if isinstance(module, VarianceHead)]
