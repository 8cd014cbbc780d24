"""Adversarial training with PGD (Madry et al. 2018, arXiv 1706.06083, eq. 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from advbench.attacks.pgd import PGD
from advbench.defenses.base import PartName, Step
from advbench.errors import UserError
from advbench.recipes.base import Recipe


@dataclass(frozen=True)
class PGDAT(Recipe):
    """Cross-entropy on x' alone, and x' by PGD.

    steps, step_size, random_start, loss_name: of the attack, see ``advbench.attacks.pgd.PGD``; in
        pixel units.

    Raises UserError for values that PGD does not take, and for l1 threats.
    """

    steps: int = 10
    step_size: float | str | None = None
    random_start: bool = True
    loss_name: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threat is not None and self.threat.norm == "l1":
            raise UserError("PGD's step is not defined for l1: train with threat=linf_8 or l2_05")
        self.attack()  # raises for values that it does not take, before anything is trained

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("adversarial",)

    def attack(self) -> PGD:
        """The search that makes x'."""
        return PGD(
            steps=self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            loss_name=self.loss_name,
        )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.search(self.attack(), model, x, y)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(step.adversarial, step.labels)}
