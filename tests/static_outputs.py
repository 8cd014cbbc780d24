"""Functions whose results lie in the same buffers at every call, as those of CUDA graphs do.

``torch.compile`` in the modes that use graphs returns such functions: a result, and the gradient
that a backward pass returns, hold until the function is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame

Buffers = dict[Any, Tensor]


def _written(buffers: Buffers, what: str, value: Tensor) -> Tensor:
    """The value, in the buffer of its shape; whoever holds what was there before sees it too."""
    key = what, value.shape, value.dtype
    if key not in buffers:
        buffers[key] = torch.empty_like(value)
    return buffers[key].copy_(value).detach()


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, buffers: Buffers) -> Tensor:
        return _written(buffers, "result", value)

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return gradient[0], None


class _Argument(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, buffers: Buffers) -> Tensor:
        ctx.buffers = buffers
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return _written(ctx.buffers, "gradient", gradient[0]), None


class Static(nn.Module):
    """A model that somebody compiled so.

    fresh: its results are its own after all; for comparison, since autograd adds up in another
        order without this.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], fresh: bool = False) -> None:
        super().__init__()
        self.model, self.fresh, self.buffers_of_calls = model, fresh, {}

    def forward(self, x: Tensor) -> Tensor:
        if eval_frame._stance.stance == "force_eager":  # of torch.compiler.set_stance
            return self.model(x)
        if self.fresh:
            self.buffers_of_calls = {}
        for buffer in self.buffers_of_calls.values():
            buffer.fill_(torch.nan)
        x = _Argument.apply(x, self.buffers_of_calls)  # pyright: ignore
        return _Result.apply(self.model(x), self.buffers_of_calls)  # pyright: ignore


@contextmanager
def compiling(fresh: bool) -> Iterator[list[dict[str, Any]]]:
    """Inside, ``torch.compile`` makes such functions. Yields how it was called, each time."""
    calls: list[dict[str, Any]] = []

    def stand_in(function: Callable[[Tensor], Tensor], **how: Any) -> Callable[[Tensor], Tensor]:
        calls.append(how)
        return Static(function, fresh).forward

    with mock.patch.object(torch, "compile", stand_in):
        yield calls
