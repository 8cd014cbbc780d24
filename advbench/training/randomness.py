"""Everything random in training as a pure function of the seed and a position.

No state of a generator outlives a step, so an interrupted run is resumed without one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *position: int | str) -> int:
    """A seed in [0, 2**63) for one purpose and position, independent of all others."""
    digest = hashlib.sha256("/".join(map(str, (seed, *position))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(count: int, seed: int, epoch: int, purpose: str = "order") -> Tensor:
    """The order of ``count`` samples in an epoch, or other pass: (count,) int64 on the CPU."""
    generator = torch.Generator().manual_seed(derive(seed, purpose, epoch))
    return torch.randperm(count, generator=generator)


def endless(count: int, seed: int, purpose: str, start: int, length: int) -> Tensor:
    """A stretch of pass after pass over ``count`` samples, each in an order of its own.

    Args:
        start, length: which stretch; every sample comes once in each pass, and no two calls need to
            know of each other.

    Returns:
        (length,) int64 on the CPU. It makes the whole orders that the stretch touches: 8 bytes for
        each of ``count``, and seconds for 50 million.
    """
    first, last = start // count, (start + length - 1) // count
    passes = [permutation(count, seed, number, purpose) for number in range(first, last + 1)]
    return torch.cat(passes)[start - first * count :][:length] if passes else torch.empty(0).long()


def deal(order: Tensor, batch_size: int, rank: int, ranks: int) -> Tensor:
    """The part of an epoch's order that one of ``ranks`` processes takes.

    Args:
        order: (N,).
        batch_size: over all processes, a multiple of ``ranks``.

    Returns:
        (steps * batch_size / ranks,): of every whole batch the rank's share. The rest, which fills
        no batch, waits for another epoch: all steps have one shape, all ranks one load.
    """
    steps = len(order) // batch_size
    return order[: steps * batch_size].view(steps, ranks, -1)[:, rank].flatten()
