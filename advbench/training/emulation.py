"""bfloat16 on a processor that has no instructions for it, at the pace of float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class Widened(TorchDispatchMode):
    """Inside, convolutions of bfloat16 numbers, and their gradients, run on float32's kernels.

    The numbers stay rounded to bfloat16, and so do the results. In between, hardware with bfloat16
    multiplies exactly and sums in float32, and so does this; oneDNN's emulation does it too, and
    takes twice as long.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in CONVOLUTIONS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        wide = tree_map_only(Tensor, Tensor.float, (args, dict(kwargs or {})))
        return tree_map_only(Tensor, Tensor.bfloat16, func(*wide[0], **wide[1]))
