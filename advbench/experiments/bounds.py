"""Limits on the memory of a model that is built, because a config can exceed any machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from advbench.errors import UserError
from advbench.text import size

MOST_TENSORS = 20_000
"""Made while a model is built; the deepest published ones take some thousands."""


@contextmanager
def bounded() -> Iterator[None]:
    """Refuse what is built inside before it takes more memory than the machine has.

    Raises:
        UserError: the tensors take more memory than there is, or are too many.
    """
    with _Counted():
        yield


class _Counted(TorchDispatchMode):
    """Sees each new tensor before it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors, self.bytes = 0, 0
        self.most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if args and isinstance(args[0], list | tuple) and _is_shape(args[0]):
            dtype = options.get("dtype")
            self.bytes += math.prod(args[0]) * (dtype.itemsize if dtype is not None else 4)
            self.tensors += 1
            if self.bytes > self.most:
                raise UserError(
                    f"the model takes more memory than the {size(self.most)} of this machine: "
                    "choose smaller sizes"
                )
            if self.tensors > MOST_TENSORS:
                raise UserError(
                    f"the model has more than {MOST_TENSORS} tensors: choose less depth"
                )
        return func(*args, **options)


def _is_shape(value: Any) -> bool:
    """Whether the first argument of an operation is the shape of a new tensor."""
    return all(isinstance(part, int) and part >= 0 for part in value)
