"""What an attack works on: the rows of a search, its clean images, the answer to a query."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound="Rows")


@dataclass
class Rows:
    """Row-wise state of a search; every field is a tensor with leading dimension N."""

    ids: Tensor
    """Sample ids, (N,)."""
    x: Tensor
    """Clean images in [0, 1], (N, C, H, W)."""
    y: Tensor
    """True classes, (N,)."""
    restart: Tensor
    """Which search of the sample this is, (N,), from 0."""
    point: Tensor
    """The image to query next, (N, C, H, W)."""
    iteration: Tensor
    """Queries answered so far, (N,)."""
    forwards: Tensor
    """Forward passes spent on the row so far, (N,)."""
    backwards: Tensor
    """Backward passes spent on the row so far, (N,)."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self: R, index: Tensor) -> R:
        """The rows at ``index`` (integers or a mask)."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def put(self: R, where: Tensor, other: R, index: Tensor) -> None:
        """Overwrite rows in place.

        Args:
            where: the rows to overwrite; integers (M,) or a mask (N,).
            other: rows of the same type.
            index: which rows of ``other`` take their places, as many; integers or a mask.
        """
        for f in fields(self):
            getattr(self, f.name)[where] = getattr(other, f.name)[index]


class Clean(NamedTuple):
    """The clean images and labels from which a search starts."""

    ids: Tensor
    """Sample ids, (N,)."""
    x: Tensor
    """Images in [0, 1], (N, C, H, W)."""
    y: Tensor
    """True classes, (N,)."""


class Answer(NamedTuple):
    """The oracle's answer for ``rows.point``: logits, loss, gradient."""

    logits: Tensor
    """(N, K), in float32."""
    loss: Tensor
    """What the search raises, (N,)."""
    gradient: Tensor | None
    """The gradient of each row's loss in its point, (N, C, H, W); None after a forward pass alone.
    Entries that are not finite are zero: the attack continues with the other pixels."""
    usable: Tensor | None = None
    """Which rows had a finite entry at all, (N,); None where that was not checked."""
    age: Tensor | None = None
    """``rows.iteration`` on the host, (N,), where the caller knows it; reading it would wait."""


def started(clean: Clean, point: Tensor, restart: Tensor) -> dict[str, Tensor]:
    """The fields of ``Rows`` for a new search.

    Args:
        clean: images, ids and classes, N of each.
        point: where the search starts, (N, C, H, W).
        restart: which search of each sample this is, (N,), from 0.
    """
    zero = torch.zeros_like(clean.ids)
    return {
        "ids": clean.ids,
        "x": clean.x,
        "y": clean.y,
        "restart": restart,
        "point": point,
        "iteration": zero,
        "forwards": zero.clone(),
        "backwards": zero.clone(),
    }
