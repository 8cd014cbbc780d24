"""The batches of an epoch for one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from advbench.data.base import Device, Splits
from advbench.errors import UserError
from advbench.training.randomness import deal, derive, endless, permutation


@dataclass(frozen=True)
class Feed:
    """Which samples make which batch: a function of seed, epoch and position, and of nothing else.

    Without extra data, an epoch is one pass over the training images, in whole batches. With them
    it has as many steps, so that it costs the same and the learning rate takes the same course; a
    fixed share of each batch is extra (Gowal et al. 2021, arXiv 2110.09468). So do the codes of
    Rebuffi et al. 2021 (arXiv 2103.01946; ``steps_from_epochs`` in google-deepmind/
    deepmind-research, adversarial_robustness/jax/experiment.py) and of Wang et al. 2023 (arXiv
    2302.04638; ``num_batches`` in wzekai99/DM-Improves-AT, core/data/semisup.py), which count
    50,000 images to an epoch of CIFAR-10, whatever they are. Original and extra images each come in
    passes that continue across epochs: no image comes again before all of its kind did.

    Raises:
        UserError: if the share leaves a process without original or without extra images.
    """

    splits: Splits
    """The data."""
    seed: int
    """Of all orders."""
    batch_size: int
    """Rows of a batch over all processes."""
    rank: int = 0
    """Of this process, from 0."""
    ranks: int = 1
    """The number of processes."""

    def __post_init__(self) -> None:
        own, added = self.originals, self.batch_size - self.originals
        if self.splits.extra is not None and min(own, added) < self.ranks:
            each = "" if self.ranks == 1 else f" for {self.ranks} devices"
            raise UserError(
                f"data.extra_fraction={self.splits.extra_fraction:g} makes of "
                f"trainer.batch_size={self.batch_size} {own} original and {added} extra images"
                f"{each}: take a larger batch, or a fraction nearer to 0.5"
            )

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self.splits.train) // self.batch_size

    @property
    def originals(self) -> int:
        """How many rows of each batch, over all processes, are from the training images."""
        if self.splits.extra is None:
            return self.batch_size
        return self.batch_size - round(self.splits.extra_fraction * self.batch_size)

    def batches(self, epoch: int, first: int, device: Device) -> Iterator[tuple[Tensor, Tensor]]:
        """The rank's share of each batch of an epoch, from batch ``first`` on: x, y on ``device``.

        Original and extra rows come in random order; each share has the same number of rows, and
        the same fraction of extra ones up to one row.
        """
        if first >= self.steps:
            return
        train, extra = self.splits.train, self.splits.extra
        seed, share = derive(self.seed, "read", epoch), self.batch_size // self.ranks
        if extra is None:
            order = permutation(len(train), self.seed, epoch)
            order = deal(order, self.batch_size, self.rank, self.ranks)[first * share :]
            yield from train.batches(order, share, device, seed=seed)
            return
        own = self._rows(len(train), "order", self.originals, epoch, first)
        added = self._rows(len(extra), "extra", self.batch_size - self.originals, epoch, first)
        # Row by row in turns, as if the two were one batch.
        own = own[:, self.rank :: self.ranks]
        added = added[:, (self.rank - self.originals) % self.ranks :: self.ranks]
        for (x, y), (x_extra, y_extra), order in zip(
            train.batches(own.flatten(), own.shape[1], device, seed=seed),
            extra.batches(added.flatten(), added.shape[1], device),
            self._shuffles(epoch, share)[first:].to(device),
            strict=True,
        ):
            yield torch.cat([x, x_extra])[order], torch.cat([y, y_extra])[order]

    def _shuffles(self, epoch: int, share: int) -> Tensor:
        """The order of the rows in each batch of an epoch, for recipes that go by their place:
        (steps, share).
        """
        generator = torch.Generator().manual_seed(derive(self.seed, "mix", self.rank, epoch))
        keys = torch.rand(self.steps, share, generator=generator)
        return keys.argsort(dim=1, stable=True)

    def _rows(self, count: int, purpose: str, width: int, epoch: int, first: int) -> Tensor:
        """Which samples each coming batch of the epoch takes of one kind: (batches, width)."""
        start, steps = epoch * self.steps + first, self.steps - first
        return endless(count, self.seed, purpose, start * width, steps * width).view(steps, width)
