"""Adversarial training with PGD (Madry et al. 2018, arXiv 1706.06083, eq. 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from advbench.attacks.pgd import PGD
from advbench.defenses.base import PartName, Step
from advbench.recipes.base import AdversarialRecipe


@dataclass(frozen=True)
class PGDAT(AdversarialRecipe):
    """Cross-entropy on x' alone, and x' by PGD.

    Raises:
        UserError: for values that PGD does not take, and for l1 threats.
    """

    steps: int = 10
    """Steps of the attack, at least 1."""
    step_size: float | str | None = None
    """In pixel units; None as in ``advbench.attacks.pgd.PGD``."""
    random_start: bool = True
    """Start the attack at a random point of the threat."""
    loss_name: str = "ce"
    """What the attack raises: ``ce``, ``margin`` or ``dlr``."""

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("adversarial",)

    def attack(self) -> PGD:
        return PGD(
            steps=self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            loss_name=self.loss_name,
        )

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(step.adversarial, step.labels)}
