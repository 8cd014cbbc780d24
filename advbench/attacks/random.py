"""Random numbers keyed by sample: equal in any batch, order and process.

``KeyedRandom`` is counter-based (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"): a draw is a function of (seed, stage, sample, restart, iteration) and of nothing
else. Batch size, order, device and the other samples that are still alive do not enter.
"""

from __future__ import annotations

import hashlib
import math
from copy import copy
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hash_of(text: str) -> int:
    """A stable number below 2**48 for a text, to seed a generator with."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


@lru_cache(maxsize=64)
def _key(seed: int, stage: str) -> tuple[int, int]:
    """The two words that key the draws of a stage."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


class Random(Protocol):
    """The source of an attack's random numbers."""

    def uniform(self, like: Tensor, iteration: int | Tensor = 0) -> Tensor:
        """Uniform in [0, 1).

        Args:
            like: gives shape (N, ...), device and type.
            iteration: of the search, from 0: one number for all rows, or (N,). Draws of other
                iterations are independent.
        """
        ...

    def normal(self, like: Tensor, iteration: int | Tensor = 0) -> Tensor:
        """Standard normal.

        Args:
            like: gives shape (N, ...), device and type.
            iteration: as for ``uniform``.
        """
        ...

    def words(self, like: Tensor, count: int, iteration: int | Tensor = 0) -> Tensor:
        """Uniform integers in [0, 2**32).

        Args:
            like: gives N, its first dimension, and the device.
            count: integers per row.
            iteration: as for ``uniform``.

        Returns:
            (N, count), int64.
        """
        ...

    def of(self, rows: Tensor | slice) -> Random:
        """The draws of some of the rows: ``rows`` is an index (M,), a mask (N,) or a slice."""
        ...


class TorchRandom(Random):
    """PyTorch's global generator: for training, where the loop seeds every step."""

    def uniform(self, like: Tensor, iteration: int | Tensor = 0) -> Tensor:
        return torch.rand_like(like)

    def normal(self, like: Tensor, iteration: int | Tensor = 0) -> Tensor:
        return torch.randn_like(like)

    def words(self, like: Tensor, count: int, iteration: int | Tensor = 0) -> Tensor:
        return torch.randint(2**32, (len(like), count), device=like.device)

    def of(self, rows: Tensor | slice) -> TorchRandom:
        return self


class KeyedRandom(Random):
    """Draws keyed by (seed, stage, sample id, restart, iteration).

    Args:
        seed: of the evaluation.
        stage: its name.
        ids, restart: (N,) integers below 2**32, one per row of the tensors that draws are made for.
    """

    def __init__(self, seed: int, stage: str, ids: Tensor, restart: Tensor) -> None:
        self.key = _key(seed, stage)
        self.ids = ids
        self.restart = restart

    def of(self, rows: Tensor | slice) -> KeyedRandom:
        part = copy(self)
        part.ids, part.restart = self.ids[rows], self.restart[rows]
        return part

    def words(self, like: Tensor, count: int, iteration: int | Tensor = 0) -> Tensor:
        blocks = -(-count // 4)
        shape = (len(like), blocks)

        def column(values: int | Tensor) -> Tensor:
            on_device = torch.as_tensor(values, dtype=torch.int64, device=like.device)
            return on_device.view(-1, 1).expand(shape)

        counter = (
            torch.arange(blocks, device=like.device).expand(shape),
            column(iteration),
            column(self.restart),
            column(self.ids),
        )
        return torch.stack(philox(counter, self.key), dim=-1).flatten(1)[:, :count]

    def _cells(self, like: Tensor, iteration: int | Tensor) -> Tensor:
        """24 random bits per entry of ``like``: all that float32 can hold below 1."""
        return (self.words(like, math.prod(like.shape[1:]), iteration) >> 8).view_as(like)

    def uniform(self, like: Tensor, iteration: int | Tensor = 0) -> Tensor:
        return self._cells(like, iteration).to(like.dtype) * 2.0**-24

    def normal(self, like: Tensor, iteration: int | Tensor = 0) -> Tensor:
        # The centre of one of 2**24 equal cells, through the inverse distribution function.
        cells = self._cells(like, iteration)
        cells = (cells.cpu() if cells.device.type == "mps" else cells).double()  # MPS has none
        return torch.special.ndtri((cells + 0.5) * 2.0**-24).to(like)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with ten rounds.

    Args:
        counter: four int64 tensors of one shape, each holding words below 2**32.
        key: two such words.

    Returns:
        Four tensors of words. int64 products wrap, so their 64 bits are the unsigned product's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
