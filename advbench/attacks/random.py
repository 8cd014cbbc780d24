"""Random numbers that belong to a sample, not to a batch.

``KeyedRandom`` is counter-based (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"): a draw is a function of (seed, stage, sample, restart, iteration) and of nothing
else. Batch size, order, device and the other samples that are still alive do not enter.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Random(Protocol):
    """Where an attack gets its random numbers from."""

    def uniform(self, like: Tensor, iteration: int = 0) -> Tensor:
        """Uniform in [0, 1), with the shape, device and type of ``like`` (N, ...)."""
        ...

    def normal(self, like: Tensor, iteration: int = 0) -> Tensor:
        """Standard normal, with the shape, device and type of ``like`` (N, ...)."""
        ...


class TorchRandom:
    """PyTorch's global generator: for training, where the loop seeds every step."""

    def uniform(self, like: Tensor, iteration: int = 0) -> Tensor:
        return torch.rand_like(like)

    def normal(self, like: Tensor, iteration: int = 0) -> Tensor:
        return torch.randn_like(like)


class KeyedRandom:
    """Draws keyed by (seed, stage, sample id, restart, iteration).

    ids, restart: (N,) integers below 2**32, one per row of the tensors that draws are made for.
    """

    def __init__(self, seed: int, stage: str, ids: Tensor, restart: Tensor) -> None:
        digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
        self.key = (int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big"))
        self.ids = ids
        self.restart = restart

    def _words(self, like: Tensor, iteration: int) -> Tensor:
        """(N, numel per row) words of 32 bits, as int64."""
        per_row = math.prod(like.shape[1:])
        blocks = -(-per_row // 4)
        shape = (len(like), blocks)
        counter = (
            torch.arange(blocks, device=like.device).expand(shape),
            torch.full(shape, iteration, dtype=torch.int64, device=like.device),
            self.restart.to(like.device)[:, None].expand(shape),
            self.ids.to(like.device)[:, None].expand(shape),
        )
        return torch.stack(philox(counter, self.key), dim=-1).flatten(1)[:, :per_row]

    def uniform(self, like: Tensor, iteration: int = 0) -> Tensor:
        # 24 bits: all that float32 can hold below 1.
        words = self._words(like, iteration) >> 8
        return (words.to(like.dtype) * 2.0**-24).view_as(like)

    def normal(self, like: Tensor, iteration: int = 0) -> Tensor:
        # The centre of one of 2**24 equal cells, through the inverse distribution function.
        cells = (self._words(like, iteration) >> 8).to(torch.float64)
        return torch.special.ndtri((cells + 0.5) * 2.0**-24).to(like.dtype).view_as(like)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with ten rounds.

    counter: four int64 tensors of one shape, each holding words below 2**32.  key: two such words.
    Returns four tensors of words. int64 products wrap, so their 64 bits are the unsigned product's.
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
