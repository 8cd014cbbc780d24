"""A moving average of the weights, which then is the model that is validated and kept."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """w' <- decay w' + (1 - decay) w at each update, buffers as well; at the first, w' = w.

    decay: in (0, 1).  The average is the ``module`` of what is returned.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
