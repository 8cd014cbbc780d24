"""Masks and indices that make the host wait for no device.

A CPU reads a mask at once and leaves out rows that are not in it. A GPU would first have to finish
all queued work; there the work is done for all rows, and discarded outside of the mask. The results
are equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advbench.attacks.threat import per_row, widest


def must_wait(mask: Tensor) -> bool:
    """Whether reading a tensor on the host waits for its device."""
    return mask.device.type != "cpu"


def surely_none(mask: Tensor) -> bool:
    """Whether a mask is true nowhere; False where finding out would wait for the device."""
    return not must_wait(mask) and not bool(mask.any())


def rows_of(mask: Tensor) -> Any:
    """An index of the rows in a mask (N,), or of all rows where that would wait."""
    return slice(None) if must_wait(mask) else mask.nonzero().squeeze(1)


def overwrite(destination: Tensor, mask: Tensor, source: Tensor) -> None:
    """Overwrite the rows in a mask (N,) by those of ``source``, in place: both (N, ...)."""
    if must_wait(mask):
        destination.copy_(torch.where(per_row(mask, destination), source, destination))
        return
    rows = mask.nonzero().squeeze(1)
    if len(rows):
        destination.index_copy_(0, rows, source.index_select(0, rows))


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """An index on a device, without waiting for it."""
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def to_host(*columns: Tensor) -> list[Tensor]:
    """Columns (N,) on the host, each in its own type, after one wait for all of them."""
    if columns[0].device.type == "cpu":
        return list(columns)
    stacked = torch.stack([column.to(widest(columns[0])) for column in columns]).cpu()
    return [part.to(column.dtype) for part, column in zip(stacked, columns, strict=True)]
