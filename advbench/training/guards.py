"""What stops a training that has gone wrong."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advbench.errors import UserError
from advbench.training.processes import gather


class FiniteLoss:
    """Notes on the device the first step whose loss is not finite; nothing waits for the device.

    steps_per_epoch: to tell the epoch of a step.
    """

    def __init__(self, device: torch.device, steps_per_epoch: int) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._steps_per_epoch = steps_per_epoch

    def watch(self, loss: Tensor, step: int) -> None:
        """loss: a scalar.  step: from 0, over all epochs."""
        self._first = torch.where((self._first < 0) & ~loss.isfinite(), step, self._first)

    def check(self, fabric: Fabric) -> None:
        """Raises UserError, in every process alike, if a loss was not finite in any of them."""
        first = [step for step in gather(self._first, fabric).tolist() if step >= 0]
        if first:
            epoch, batch = divmod(min(first), self._steps_per_epoch)
            raise UserError(
                f"the loss is not a finite number at epoch {epoch + 1}, step {batch + 1} of "
                f"{self._steps_per_epoch}; try a lower optimizer.lr"
            )
