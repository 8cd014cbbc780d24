"""The validation part: a stratified draw from the training part, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from advbench.errors import UserError


def hold_out(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Parts the samples into the rest and ``count`` held out, each class with its share of these.

    Shares are rounded by the largest remainders, the seed decides between equal ones, and each
    class keeps a sample. The same labels and seed give the same parts on every machine.

    Args:
        labels: (N,) int64.
        count: samples to hold out, below N.
        seed: in [0, 2**32).

    Returns:
        Indices of the rest and of those held out, ascending.

    Raises:
        UserError: if each class's one sample leaves fewer than ``count`` to hold out.
    """
    y = labels.numpy()
    # The legacy generator is the one whose stream NumPy promises never to change.
    shuffled = np.random.RandomState(seed).permutation(len(y))
    by_class = shuffled[np.argsort(y[shuffled], kind="stable")]
    sizes = np.bincount(y)
    quota, remainder = np.divmod(sizes * count, len(y))
    most = np.maximum(sizes - 1, 0)
    if count > most.sum():
        raise UserError(
            f"there are {len(y)} samples of {np.count_nonzero(sizes)} classes, and each class "
            f"keeps one: {count} cannot be held out, but up to {most.sum()}"
        )
    classes = np.random.RandomState(seed).permutation(len(sizes))
    order = classes[np.argsort(-remainder[classes], kind="stable")]
    while missing := count - quota.sum():
        quota[order[quota[order] < most[order]][:missing]] += 1
    rank = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held_out = rank < np.repeat(quota, sizes)
    return (
        torch.from_numpy(np.sort(by_class[~held_out])),
        torch.from_numpy(np.sort(by_class[held_out])),
    )
