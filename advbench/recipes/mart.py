"""MART: misclassified examples weigh more (Wang et al. 2020, ICLR, openreview rklOg6EFwS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.defenses.base import Step
from advbench.recipes.mtard import NearPGD
from advbench.recipes.trades import Consistent, divergence


def runner_up(logits: Tensor, truth: Tensor) -> Tensor:
    """-log(1 - p_k) of each row, with k the likeliest class that is wrong: (N, K) -> (N,), >= 0.

    1 - p_k is the sum of the other probabilities, so it stays a logarithm: neither the value nor
    the gradient, at most 1, suffers where p_k is 1 in float32. The authors add 1e-4 instead.

    Args:
        truth: (N, K) the share of each class in the image, one-hot where nothing was mixed; a class
            with a share is not wrong. A row without a wrong class gives 0.
    """
    logits = logits.float()
    right = truth > 0
    k = logits.masked_fill(right, -torch.inf).argmax(1, keepdim=True)
    others = logits.scatter(1, k, -torch.inf)
    loss = logits.logsumexp(1) - others.logsumexp(1)
    return torch.where(right.all(1), 0.0, loss)


@dataclass(frozen=True)
class MART(Consistent):
    """Boosted cross-entropy on x', and KL(p(x) || p(x')) weighted by how wrong the model is at x.

    -log p_y(x') - log(1 - max_{k != y} p_k(x')) + beta KL(p(x) || p(x')) (1 - p_y(x)), the mean
    over the rows; x' is where the cross-entropy is large (as in the authors' code). Both sides of
    the divergence and its weight have gradients, as there.

    Where images were mixed, cross-entropy takes the shares of the classes, k runs over the classes
    that are not in the image, and p_y(x) is the mean over those that are (ours).
    """

    beta: float = 5.0
    """lambda of the paper, at least 0."""

    def attack(self) -> NearPGD:
        return NearPGD(steps=self.steps, step_size=self.step_size)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        assert step.clean is not None and step.adversarial is not None
        logits = step.adversarial.logits
        log_p = F.log_softmax(step.clean.logits.float(), dim=1)
        truth = F.one_hot(step.y, logits.shape[1]) if step.targets is None else step.targets
        doubt = 1 - (truth * log_p.exp()).sum(1)
        kl = divergence(log_p, logits) * doubt
        return {
            "ce": self.cross_entropy(step.adversarial, step.labels),
            "runner_up": runner_up(logits, truth).mean(),
            "kl": self.beta * kl.mean(),
        }
