"""An attack that keeps to no budget, for the tests of who has to notice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advbench.attacks.base import Attack, Clean, Oracle, Rows, started
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat


@dataclass(frozen=True)
class Cheat(Attack):
    """Proposes points far along its class's ``direction`` (K, C, H, W), whatever the budget."""

    direction: Tensor

    @property
    def starts(self) -> int:
        return 1

    @property
    def queries(self) -> int:
        return 0

    def check(self, num_classes: int, threat: Threat) -> None:
        pass

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        return Rows(**started(clean, clean.x + 100 * self.direction[clean.y], restart))
