"""The position of a training: epoch and step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from advbench.training.metrics import Row


@dataclass
class Position:
    """How far a training is."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Finished steps of the epoch that runs."""
    rows: list[Row] = field(default_factory=list)
    """The rows of metrics.csv."""
    best: list[float] = field(default_factory=list)
    """What the best epoch so far was chosen by; larger is better."""
    best_epoch: int = 0
    """The best epoch so far, from 1."""
    seconds: float = 0.0
    """Work so far, over all sessions."""
    epoch_seconds: float = 0.0
    """Work on the epoch that runs, over all sessions."""
    guards: dict[str, Any] = field(default_factory=dict)
    """What the guards detected, by name, see ``Summary``."""

    @property
    def stopped(self) -> bool:
        """Whether nothing after this is of use."""
        return "catastrophic_overfitting" in self.guards
