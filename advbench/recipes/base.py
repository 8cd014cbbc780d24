"""What a recipe is: how one training step makes its inputs and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from advbench.defenses.base import Step

PartName = Literal["clean", "adversarial"]


@dataclass(frozen=True)
class Recipe(ABC):
    """Hyper-parameters of a recipe.

    label_smoothing: in [0, 1), of the recipe's cross-entropy.
    """

    label_smoothing: float = 0.0

    @property
    @abstractmethod
    def parts(self) -> tuple[PartName, ...]:
        """Which parts of the batch the training step forwards."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The adversarial part of a batch: x (N, C, H, W) in [0, 1] -> x' of the same shape."""
        raise NotImplementedError

    @abstractmethod
    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        """Named scalar terms whose sum is the loss; they are logged one by one."""
