"""Training on a batch of which a part is adversarial (Erichson et al. 2019, arXiv 1904.03750)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.attacks.pgd import PGD
from advbench.defenses.base import PartName, Step
from advbench.errors import UserError
from advbench.recipes.base import AdversarialRecipe


@dataclass(frozen=True)
class Mixed(AdversarialRecipe):
    """Cross-entropy of a batch in which x' stands for x in some rows; by default x' is by FGSM.

    These are the first rows, as in the authors' code: the batch comes in random order. All rows are
    forwarded both ways, so that a defense which tells clean from adversarial sees each as what it
    is, and the accuracies in metrics.csv are of whole batches. (The authors forward the mixed batch
    alone: their batch norms have the statistics of the mixture.)

    Raises:
        UserError: for values out of range, and for l1 threats.
    """

    fraction: float = 0.3
    """The share of the batch that is replaced, above 0 and at most 1; at least one row."""
    steps: int = 1
    """Steps of the attack, at least 1."""
    step_size: float | str | None = None
    """In pixel units; None as in ``advbench.attacks.pgd.PGD``."""
    random_start: bool = False
    """Start the attack at a random point of the threat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise UserError(f"recipe.fraction={self.fraction:g} is not above 0 and at most 1")

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("clean", "adversarial")

    def attack(self) -> PGD:
        return PGD(steps=self.steps, step_size=self.step_size, random_start=self.random_start)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        assert step.clean is not None and step.adversarial is not None
        n = max(1, round(self.fraction * len(step.y)))
        logits = torch.cat([step.adversarial.logits[:n], step.clean.logits[n:]])
        return {"ce": F.cross_entropy(logits, step.labels, label_smoothing=self.label_smoothing)}
