"""Faster frozen layers on a CPU: packed weights, fused ReLU and addition, stable rounding.

PyTorch packs a convolution's weights again at every call, and passes over its output again for the
addition and the ReLU that follow. oneDNN has operators that do both inside, the ones that
``torch.compile`` lowers to. They have no gradient; it is added here, for the input only.
The kernel of a linear layer, and with it the rounding of a row, depends on the number of rows. So a
small batch is padded, or the layer is computed as a convolution, which rounds rows equally.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

SUMS = (operator.add, operator.iadd, torch.add)
RELUS = (torch.relu, torch.relu_, F.relu)
FEW, MANY = 16, 256  # rows: where kernels change, and a full batch
How = tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups


class _Convolve(torch.autograd.Function):
    """A packed convolution with its gradient in the input and in what is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, conv: PackedConv) -> Tensor:
        out = conv.convolve(x, other)
        ctx.conv, ctx.shape, ctx.plain = conv, x.shape, x.is_contiguous()
        ctx.save_for_backward(*([out] if conv.relu else []))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Of two layouts at once an operator reads an entry at a time.
        gradient = gradient.contiguous(memory_format=ctx.conv.layout)
        for out in ctx.saved_tensors:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        back = ctx.conv.back(gradient, ctx.shape) if ctx.needs_input_grad[0] else None
        if back is not None and ctx.plain:  # for the steps before, which are quicker so
            back = back.contiguous()
        return back, gradient if ctx.needs_input_grad[1] else None, None


class PackedConv(nn.Module):
    """A convolution that pads with zeros, plus another tensor where given, and a ReLU if ``relu``.

    shape, shape_out: of its input and output, (N, C, H, W), for which the weights are laid out;
    others work as well.  layout: what its input is brought to.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        shape: list[int],
        shape_out: list[int],
        relu: bool,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.layout = layout
        padding, stride, dilation = (
            [int(n) for n in pair] for pair in (conv.padding, conv.stride, conv.dilation)
        )
        self.how = padding, stride, dilation, conv.groups
        self.relu = relu
        # Plain attributes: what is laid out can neither be copied nor saved.
        self.plain = conv.weight.detach()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.weight = _laid_out(self.plain, self.how, shape)
        # The gradient in the input is a convolution too, by the filters turned round, and in thin
        # layers faster as such; a stride of s makes it one for each of s * s phases of the pixels.
        self.turned: Tensor | None = None
        self.stride = stride[0] if stride[0] == stride[1] else 0
        rest = [step * (side - 1) for step, side in zip(dilation, conv.kernel_size, strict=True)]
        if self.stride == 1:
            rest = [side - pad for side, pad in zip(rest, padding, strict=True)]
            fits = min(rest) >= 0
        else:
            rest = [side // max(self.stride, 1) for side in rest]
            phases = self.stride**2 * conv.in_channels
            fits = dilation == [1, 1] and 0 < phases <= conv.out_channels
        if fits and conv.groups == 1:
            self.how_back = rest, [1, 1], dilation, 1
            self.turned = _laid_out(_turned(self.plain, self.stride), self.how_back, shape_out)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return _Convolve.apply(x, other, self)  # pyright: ignore[reportReturnType]
        return self.convolve(x, other)

    def back(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient in an input of that shape."""
        if self.turned is not None:
            back = _pointwise()(gradient, self.turned, None, *self.how_back, "none", [], "")
            return back if self.stride == 1 else self._interleaved(back, shape)
        padding, stride, dilation, groups = self.how
        x = torch.empty(shape, memory_format=torch.channels_last)  # for its form alone
        others = None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        return torch.ops.aten.convolution_backward(gradient, x, self.plain, *others)[0]

    def _interleaved(self, phases: Tensor, shape: torch.Size) -> Tensor:
        """The image (N, C, H, W) of that shape from its phases, (N, stride^2 C, ...)."""
        cells = phases.permute(0, 2, 3, 1).unflatten(3, (self.stride, self.stride, shape[1]))
        padded = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        (top, left), (height, width) = self.how[0], shape[2:]
        image = padded[:, :, top : top + height, left : left + width]
        # Pixels at the lower and right border may be out of the filters' reach.
        return F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))

    def convolve(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        filters = self.weight, self.bias, *self.how
        if other is None:
            return _pointwise()(x, *filters, "relu" if self.relu else "none", [], "")
        after = "relu" if self.relu else None
        return _pointwise().binary(x, other, *filters, "add", 1.0, after, [], "")


class FilledLinear(nn.Module):
    """A linear layer, (..., C), that pads its input to at least ``FEW`` rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows >= FEW:
            return self.layer(x)
        filled = F.pad(x.flatten(0, -2), (0, 0, 0, FEW - rows))
        return self.layer(filled)[:rows].unflatten(0, x.shape[:-1])


class PackedLinear(nn.Module):
    """A linear layer, (..., C), as a convolution over an image of all rows: 0.1 ms more."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        wide, narrow = layer.in_features, layer.out_features
        conv = nn.Conv2d(wide, narrow, 1, device="meta")
        conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None], requires_grad=False)
        conv.bias = layer.bias
        self.conv = PackedConv(conv, [1, wide, FEW, 1], [1, narrow, FEW, 1], relu=False)

    def forward(self, x: Tensor) -> Tensor:
        image = x.flatten(0, -2)[None, :, None].permute(0, 3, 1, 2)  # channels last as it lies
        return self.conv(image).permute(0, 2, 3, 1)[0, :, 0].unflatten(0, x.shape[:-1])


def indifferent(layer: nn.Linear) -> nn.Module:
    """The layer in a form that rounds each row independently of the number of rows."""
    generator = torch.Generator().manual_seed(0)
    sides = layer.in_features, layer.out_features
    dtype = layer.weight.dtype
    x, gradient = (torch.randn(MANY, side, generator=generator, dtype=dtype) for side in sides)

    def answers(form: nn.Module, rows: int) -> list[Tensor]:
        with torch.enable_grad():
            some = x[:rows].requires_grad_()
            out = form(some)
            return [out.detach(), *torch.autograd.grad(out, some, gradient[:rows])]

    filled = FilledLinear(layer)
    whole = answers(filled, MANY)
    for rows in (FEW, FEW + 2, 2 * FEW, 3 * FEW, 4 * FEW, 8 * FEW):
        if not all(map(torch.equal, answers(filled, rows), (part[:rows] for part in whole))):
            return PackedLinear(layer)
    return filled


def _pointwise() -> Any:
    """oneDNN's operator, where this build of PyTorch has it."""
    return torch.ops.mkldnn._convolution_pointwise


def _turned(weight: Tensor, stride: int) -> Tensor:
    """Filters of the gradient: (out, in, h, w) -> (stride^2 in, out, h / stride, w / stride)."""
    height, width = (-(-side // stride) for side in weight.shape[2:])
    short = height * stride - weight.shape[2], width * stride - weight.shape[3]
    cells = F.pad(weight, (0, short[1], 0, short[0]))
    cells = cells.unflatten(3, (width, stride)).unflatten(2, (height, stride))
    # out, in, height, row of the phase, width, column of the phase
    return cells.permute(3, 5, 1, 0, 2, 4).flatten(0, 2).flip(2, 3).contiguous()


def _laid_out(weight: Tensor, how: How, shape: list[int]) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *how, shape)


@torch.no_grad()
def packed(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a model whose weights are frozen, for inputs like ``x``.

    x: (N, C, H, W) float32 on the CPU, in the layout that suits the convolutions.  Of a model that
    is not traced, linear layers alone change; a traced one takes images in any layout, and is
    quickest with contiguous ones: a mean or scale by channel is slow in channels last.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, indifferent(layer))
    if not isinstance(model, fx.GraphModule):
        return model
    ShapeProp(model).propagate(x)
    modules = dict(model.named_modules())
    calls = [node for node in model.graph.nodes if node.op == "call_module"]
    for number, node in enumerate(calls):
        conv = modules[node.target]
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
            continue
        if isinstance(conv.padding, str):
            continue
        chain, other = [node], _added(node)
        if other is not None:
            chain.append(next(iter(node.users)))
        after = _only_user(chain[-1])
        if relu := after is not None and _is_relu(after, modules):
            chain.append(after)
        name = f"packed_{number}"
        shape, shape_out = (list(n.meta["tensor_meta"].shape) for n in (node.args[0], node))
        model.add_module(name, PackedConv(conv, shape, shape_out, relu, layout))
        with model.graph.inserting_after(chain[-1]):
            inputs = node.args[0], *([] if other is None else [other])
            fresh = model.graph.call_module(name, inputs)
        fresh.meta = chain[-1].meta
        chain[-1].replace_all_uses_with(fresh)
        for old in reversed(chain):
            model.graph.erase_node(old)
    model.graph.lint()
    model.delete_all_unused_submodules()
    model.recompile()
    return model


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(node: fx.Node) -> fx.Node | None:
    """What is added to the output of ``node``, and to nothing else of it, in the same shape."""
    after = _only_user(node)
    if after is None or after.target not in SUMS or after.kwargs or len(after.args) != 2:
        return None
    other = after.args[1] if after.args[0] is node else after.args[0]
    if not isinstance(other, fx.Node) or other is node:
        return None
    shapes = [part.meta["tensor_meta"].shape for part in (node, other, after)]
    return other if shapes[0] == shapes[1] == shapes[2] else None


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules.get(str(node.target))) is nn.ReLU
    return node.op == "call_function" and node.target in RELUS
