"""A moving average of the weights, which then is the model that is validated and saved."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """w' <- d w' + (1 - d) w after each step, for parameters; buffers are those of the model.

    d = min(decay, (1 + t) / (10 + t)) after t steps, so that the start is soon forgotten, and batch
    norm with the running statistics of the weights that are trained: as in the codes of Gowal et
    al. 2020 (arXiv 2010.03593), Rebuffi et al. 2021 (arXiv 2103.01946) and Wang et al. 2023 (arXiv
    2302.04638), which take a decay of 0.995. Wang et al. count t from the end of a warm-up, and
    average nothing before; here, as in the others, it counts from the first step. That the state of
    a defense (prototypes) is copied as running statistics are is ours.

    Args:
        decay: in (0, 1).

    Attributes:
        module: the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """step: t, from 0. Waits for no device, as PyTorch's ``AveragedModel`` does."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # Not by state_dict: there, what modules share comes once for each of them.
        averages: list[torch.Tensor] = [*self.module.parameters()]
        values: list[torch.Tensor] = [*model.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
