"""A moving average of the weights, which then is the model that is validated and kept."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """w' <- d w' + (1 - d) w after each step, buffers as well; whole numbers are copied.

    d = min(decay, (1 + t) / (10 + t)) after t steps, so that the start is soon forgotten: as in the
    codes of Gowal et al. 2020 (arXiv 2010.03593), Rebuffi et al. 2021 (arXiv 2103.01946) and Wang
    et al. 2023 (arXiv 2302.04638), which take a decay of 0.995.

    decay: in (0, 1).  module: the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """step: t, from 0. Waits for no device, as PyTorch's ``AveragedModel`` does."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.module.state_dict(), model.state_dict()
        moving = [name for name, value in ours.items() if value.is_floating_point()]
        for name in ours.keys() - moving:
            ours[name].copy_(theirs[name])
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [ours[n] for n in moving], [theirs[n] for n in moving], 1 - decay
        )
