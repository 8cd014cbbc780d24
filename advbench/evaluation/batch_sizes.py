"""The batch sizes that a search can use without changing a bit of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from advbench.attacks.base import Clean
from advbench.devices import kept
from advbench.errors import UserError
from advbench.evaluation.fast_model import ask


class BatchSizes:
    """The batch sizes that a search can use: the largest, and smaller ones that change no bit.

    The last bits of a row's logits can depend on the batch size, through the choice of kernels, and
    on the row's position. So every batch is filled up to one of a few sizes, at most about an
    eighth, or one row, larger. A size is used only if the model returns the same bits as at the
    largest. ``same_at_all_positions`` is True if the position changes no bit; otherwise the largest
    is the only size.

    Args:
        largest: the batch size of the search, at least 1.
        coarse: powers of two only, for a model that is compiled for each size.
    """

    def __init__(self, largest: int, coarse: bool = False) -> None:
        self.largest, self.coarse = largest, coarse
        self.forget()

    def forget(self) -> None:
        """Forget all sizes that were tried, because the model or the largest size changed."""
        self.same_at_all_positions = False
        self._usable: dict[int, bool] = {}
        self._try: Callable[[int], bool] = lambda size: False

    def fit(self, rows: int) -> int:
        """The smallest usable size for ``rows`` rows, at most ``largest``."""
        for size in self._sizes(rows):
            if size not in self._usable:
                self._usable[size] = self._try(size)
            if self._usable[size]:
                return size
        return self.largest

    def _sizes(self, rows: int) -> Iterator[int]:
        """Sizes for ``rows`` rows, below the largest, from the smallest."""
        step = max(2 ** (rows.bit_length() - 1) // 8, 2)
        size = 2 ** (rows - 1).bit_length() if self.coarse else -(-rows // step) * step
        while size < self.largest:
            yield size
            size += size if self.coarse else step

    def shrink(self) -> None:
        """Halve the largest size after running out of memory."""
        if self.largest == 1:
            raise UserError("the memory of the device does not hold a single image's attack")
        self.largest //= 2
        self.forget()

    def probe(self, model: nn.Module, clean: Clean) -> None:
        """Find the sizes at which a model returns the same bits.

        Args:
            model: (N, C, H, W) to logits (N, K).
            clean: rows to try it on, at least one; repeated up to the largest size.
        """
        largest = self.largest
        batch = _part(clean, torch.arange(largest) % len(clean.x))
        answers = _answers(model, batch)
        reversed_rows = torch.arange(largest - 1, -1, -1)
        reversed_answers = ask(model, _part(batch, reversed_rows))
        self.same_at_all_positions = _same(
            [part[reversed_rows] for part in answers[1:]], reversed_answers
        )

        def same(size: int) -> bool:
            part = torch.arange(size)
            return self.same_at_all_positions and _same(
                [answer[part] for answer in answers], _answers(model, _part(batch, part))
            )

        self._usable, self._try = {}, same


def _part(clean: Clean, rows: Tensor) -> Clean:
    return Clean(*(part[rows.to(part.device)] for part in clean))


def _answers(model: nn.Module, clean: Clean) -> list[Tensor]:
    """Logits without and with a graph, and gradients."""
    with torch.no_grad():
        alone = kept(model(clean.x))
    return [alone, *ask(model, clean)]


def _same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
