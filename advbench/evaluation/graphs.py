"""CUDA graphs: a search's passes at one shape, recorded once and replayed with one launch each.

A ResNet-18's pass is over a hundred launches, which cost a card more time than the work where
batches are small. A graph works on fixed memory:

    forward graph:   point -> logits             (and what its backward pass needs)
    backward graph:  slope of the loss in the logits -> gradient in the point

The loss stays outside, since each attack has its own. ``make_graphed_callables`` of PyTorch does
the same; this is only what a search needs, with a graph for passes without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from advbench.devices import out_of_memory
from advbench.errors import reason_of

DEVICES = ("cuda",)
"""Types of devices that have graphs."""
WARM_UP = 3
"""Passes before the recording, in which libraries choose kernels and take memory."""

Work = Callable[[], Tensor]


def warm_up(work: Work) -> None:
    """Run the work a few times beside the stream on which it will be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def record(work: Work, pool: Any) -> tuple[Tensor, Callable[[], None]]:
    """The memory where the work's result lies, and what computes it anew.

    pool: the memory that graphs share which never run at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return result, graph.replay


class Graphs(nn.Module):
    """A model whose passes are graphs, one set per shape of the batch.

    Results lie in the same memory at every call, see ``advbench.devices.kept``. A backward pass has
    to come before the next forward pass. Where the model can't be recorded, it runs as it is.

    Args:
        model: deterministic, row by row, with frozen parameters: (N, C, H, W) to logits (N, K).
        note: is told in a line why there are no graphs.
    """

    def __init__(self, model: nn.Module, note: Callable[[str], None]) -> None:
        super().__init__()
        self.model, self.note = model, note
        self.failed = False
        self.forwards = 0  # since the start; by it a late backward pass is noticed
        self._pool: Any = None
        self._recorded: dict[tuple[torch.Size, bool], _Passes] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits (N, K)."""
        if self.failed or x.device.type not in DEVICES:
            return self.model(x)
        gradient = torch.is_grad_enabled() and x.requires_grad
        key = x.shape, gradient
        if key not in self._recorded and not self._record(x, gradient):
            return self.model(x)
        if gradient:
            return _Query.apply(x, self, self._recorded[key])  # pyright: ignore
        return self.replay(x, self._recorded[key])

    def replay(self, x: Tensor, passes: _Passes) -> Tensor:
        """Logits (N, K) at x."""
        self.forwards += 1
        passes.point.detach().copy_(x)
        passes.forward()
        return passes.logits.detach()

    def _record(self, x: Tensor, gradient: bool) -> bool:
        """Record the passes at the shape of x. Returns whether that worked."""
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[x.shape, gradient] = _Passes(self.model, x, gradient, self._pool)
        except Exception as problem:  # whatever a model does that can't be recorded
            self._recorded.clear()
            if out_of_memory(problem):
                raise
            self.failed = True
            self.note(f"trainer.graphs: the model runs without graphs: {reason_of(problem):.200}")
        return not self.failed


class _Passes:
    """The recorded passes of a model at the shape of x.

    point, logits, slope, gradient: the fixed memory, see the module; the last two if ``gradient``.
    """

    slope: Tensor

    def __init__(self, model: nn.Module, x: Tensor, gradient: bool, pool: Any) -> None:
        self.point = x.detach().clone().requires_grad_(gradient)
        tape: list[Tensor] = []

        def forward() -> Tensor:
            with torch.set_grad_enabled(gradient):
                tape[:] = [model(self.point)]
            return tape[0].detach()

        def backward() -> Tensor:
            return torch.autograd.grad(tape[0], self.point, self.slope, retain_graph=True)[0]

        def both() -> Tensor:
            self.slope = torch.zeros_like(forward())
            return backward() if gradient else self.slope

        warm_up(both)
        self.logits, self.forward = record(forward, pool)
        if gradient:
            self.gradient, self.backward = record(backward, pool)
        tape.clear()  # its memory is the pool's again: a replay writes there before it reads


class _Query(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: Graphs, passes: _Passes) -> Tensor:
        logits = graphs.replay(x, passes)
        ctx.graphs, ctx.passes, ctx.turn = graphs, passes, graphs.forwards
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        if ctx.turn != ctx.graphs.forwards:
            raise RuntimeError("a backward pass through a graph after its next forward pass")
        ctx.passes.slope.copy_(slopes[0])
        ctx.passes.backward()
        return ctx.passes.gradient.detach(), None, None
