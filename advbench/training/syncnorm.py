"""Batch norm over the rows of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from advbench.devices import in_company
from advbench.errors import UserError


class _Sum(torch.autograd.Function):
    """The sum over all processes, in each of them; so is the gradient's."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def _mean(value: Tensor) -> Tensor:
    """The mean over all processes, which have as many rows each."""
    mean: Tensor = _Sum.apply(value)  # pyright: ignore[reportAssignmentType]
    return mean / distributed.get_world_size()


class _Synced(nn.modules.batchnorm._BatchNorm):
    """In training, mean and variance of the rows of all processes, in float32.

    PyTorch's own synchronous batch norm does not run on CPUs; this one is the same function on any
    device, from two sums of C numbers each. In evaluation it is the batch norm that it was.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and in_company()):
            return super().forward(input)
        self._check_input_dim(input)
        z = input.float()
        axes = [axis for axis in range(z.dim()) if axis != 1]
        shape = [1, -1, *[1] * (z.dim() - 2)]
        mean = _mean(z.mean(axes))
        centred = z - mean.view(shape)
        # In a second step: mean(z^2) - mean(z)^2 would cancel.
        variance = _mean(centred.square().mean(axes))
        self._remember(mean, variance, z.numel() // z.shape[1] * distributed.get_world_size())
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        if self.affine:
            out = out + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Without a momentum: the mean over all batches so far.
        rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.add_(rate * (mean - self.running_mean))
        self.running_var.add_(rate * (unbiased - self.running_var))


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over all processes."""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` over all processes."""


class SyncedBatchNorm3d(_Synced, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` over all processes."""


SYNCED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
}


def synchronise(model: nn.Module) -> None:
    """Every batch norm of the model becomes one over all processes, in place.

    The modules stay the same objects, of a subclass of their class: names, parameters, buffers,
    hooks and what other modules know of them stay. Subclasses of batch norm from other libraries
    are left alone.

    Raises:
        UserError: if there is none to change.
    """
    norms = [module for module in model.modules() if type(module) in SYNCED]
    if not norms:
        raise UserError(
            "the model has no batch norm to synchronise: leave trainer.sync_batchnorm out"
        )
    for module in norms:
        module.__class__ = SYNCED[type(module)]
