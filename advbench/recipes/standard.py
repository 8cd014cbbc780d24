"""Training on clean images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from advbench.defenses.base import PartName, Step
from advbench.recipes.base import Recipe


@dataclass(frozen=True)
class Standard(Recipe):
    """Cross-entropy on the clean batch. A threat is accepted and not used."""

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("clean",)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(step.clean, step.labels)}
