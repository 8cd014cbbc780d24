"""What the processes of a training on several devices exchange, beside gradients."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn


def gather(value: Tensor, fabric: Fabric) -> Tensor:
    """The values of all processes, in each of them: (...) -> (processes, ...)."""
    if fabric.world_size == 1:
        return value[None]
    values = [torch.empty_like(value) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(values, value)
    return torch.stack(values)


def share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Gives every process the buffers of the first, so that they attack and validate one model.

    DDP does so at the start of a forward pass only: after it, each process has the running
    statistics of its own rows.
    """
    if fabric.world_size == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_type.values():
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.broadcast(flat, src=0)
        for buffer, shared in zip(
            buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True
        ):
            buffer.copy_(shared.view_as(buffer))
