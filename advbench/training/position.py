"""How far a training is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from advbench.training.metrics import Row


@dataclass
class Position:
    """How far a training is.

    epoch, batch: finished epochs, and finished steps of the one that runs.
    rows: of metrics.csv.
    best: what the best epoch so far was chosen by, larger is better; best_epoch: from 1.
    seconds, epoch_seconds: of work so far, over all sessions.
    guards: what the guards found, by name, see ``Summary``.
    """

    epoch: int = 0
    batch: int = 0
    rows: list[Row] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    guards: dict[str, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        """Whether nothing after this is of use."""
        return "catastrophic_overfitting" in self.guards
