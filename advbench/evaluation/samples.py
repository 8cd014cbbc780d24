"""The samples of an evaluation: the subset ``n``, its ids, images and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advbench.attacks.base import Clean
from advbench.data.base import Split, filled_batches
from advbench.errors import UserError


@dataclass(frozen=True)
class Samples:
    """The samples of an evaluation: some rows of a split, on a device."""

    split: Split
    """All images and labels of the test part."""
    ids: Tensor
    """Rows of the split, (N,) int64, sorted, on the CPU."""
    device: torch.device
    """Where ``fetch`` puts the images."""

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, ids: Tensor) -> Clean:
        """Images, labels and ids on the device: ``ids`` (B,) of the split, in that order."""
        x, y = self.split.fetch(ids, self.device)
        return Clean(ids.to(self.device), x, y)


def subset(total: int, n: int | None) -> Tensor:
    """The fixed pseudo-random n of ``total`` sample ids, sorted; all of them for None.

    A smaller subset is part of a larger one. Raises UserError for n out of 1..total.
    """
    if n is None:
        return torch.arange(total)
    if n < 1:
        raise UserError(f"n={n} is not at least 1")
    if n > total:
        raise UserError(f"n={n} but the split has {total} samples; use n={total} or leave n out")
    return _order(total)[:n].sort().values


def fixed_batches(total: int, size: int) -> Tensor:
    """The batches of ``size`` in which a batch-dependent model meets a split: ids, (M, size).

    They are cut from the order that ``subset`` draws from, so a sample's batch depends neither on n
    nor on what else is evaluated. The last batch is filled up with the first samples.

    Raises:
        UserError: if the split has fewer samples than a batch.
    """
    if total < size:
        raise UserError(
            f"the model is judged in batches of {size} images and there are {total}: give it more "
            "images, or a model with smaller batches"
        )
    return filled_batches(_order(total), size)


def _order(total: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))
