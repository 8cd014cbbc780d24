"""ResNets in their CIFAR form (He et al. 2016, "Deep residual learning", arXiv 1512.03385).

A block is ``act(body(x) + shortcut(x))``. The stem is one 3x3 convolution and no pooling.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from advbench.backbones.layers import PooledBackbone, conv, named

Act = type[nn.Module]


class Residual(nn.Module):
    """``act(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class ZeroPadding(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the channels that x does not have.

    (N, C, H, W) -> (N, C + extra, H / stride, W / stride). Half of the zeros go before the
    channels of x and half behind them.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.before = extra // 2
        self.behind = extra - extra // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.behind))


def zero_padding(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """The shortcut without parameters (option A)."""
    return ZeroPadding(channels_out - channels_in, stride)


def projection(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """The shortcut with a 1x1 convolution (option B)."""
    return named(
        {
            "conv": conv(channels_in, channels_out, kernel=1, stride=stride),
            "norm": nn.BatchNorm2d(channels_out),
        }
    )


def basic_body(channels_in: int, width: int, stride: int, act: Act) -> nn.Sequential:
    """Two 3x3 convolutions, to ``width`` channels."""
    return named(
        {
            "conv1": conv(channels_in, width, stride=stride),
            "norm1": nn.BatchNorm2d(width),
            "act1": act(),
            "conv2": conv(width, width),
            "norm2": nn.BatchNorm2d(width),
        }
    )


def bottleneck_body(channels_in: int, width: int, stride: int, act: Act) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions, to ``4 * width`` channels.

    The stride is in the 3x3 convolution, as all public implementations have it; the paper has it
    in the first 1x1, which throws three of four pixels away.
    """
    return named(
        {
            "conv1": conv(channels_in, width, kernel=1),
            "norm1": nn.BatchNorm2d(width),
            "act1": act(),
            "conv2": conv(width, width, stride=stride),
            "norm2": nn.BatchNorm2d(width),
            "act2": act(),
            "conv3": conv(width, 4 * width, kernel=1),
            "norm3": nn.BatchNorm2d(4 * width),
        }
    )


class ResNet(PooledBackbone):
    """Stages of ``depths`` blocks; the width doubles and the image halves from each to the next."""

    depths: ClassVar[tuple[int, ...]]
    width: ClassVar[int] = 64
    """Channels of the first stage."""
    bottleneck: ClassVar[bool] = False
    """Blocks are ``bottleneck_body``, with four times the width behind; else ``basic_body``."""
    padding: ClassVar[bool] = False
    """Shortcuts are ``zero_padding`` (option A); else ``projection`` (option B)."""

    def body(self, act: Act) -> tuple[dict[str, nn.Module], int]:
        make_body, expansion = (bottleneck_body, 4) if self.bottleneck else (basic_body, 1)
        make_shortcut = zero_padding if self.padding else projection
        channels = self.width
        body: dict[str, nn.Module] = {
            "conv": conv(self.input_shape[0], channels),
            "norm": nn.BatchNorm2d(channels),
            "act": act(),
        }
        for i, depth in enumerate(self.depths):
            blocks = []
            width = self.width * 2**i
            channels_out = width * expansion
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                if stride == 1 and channels == channels_out:
                    shortcut = nn.Identity()
                else:
                    shortcut = make_shortcut(channels, channels_out, stride)
                blocks.append(Residual(make_body(channels, width, stride, act), shortcut, act()))
                channels = channels_out
            body[f"stage{i + 1}"] = nn.Sequential(*blocks)
        return body, channels


class resnet20(ResNet):
    """ResNet-20 (section 4.2): widths 16-32-64, three basic blocks each, option A shortcuts.

    Images 4x4 and larger.  Features: (N, 64).
    """

    depths, width, downsampling = (3, 3, 3), 16, 4
    padding = True


class resnet18(ResNet):
    """ResNet-18: basic blocks 2-2-2-2, option B shortcuts.

    Images 8x8 and larger.  Features: (N, 512).
    """

    depths, downsampling = (2, 2, 2, 2), 8


class resnet34(ResNet):
    """ResNet-34: basic blocks 3-4-6-3, option B shortcuts.

    Images 8x8 and larger.  Features: (N, 512).
    """

    depths, downsampling = (3, 4, 6, 3), 8


class resnet50(ResNet):
    """ResNet-50: bottleneck blocks 3-4-6-3, option B shortcuts.

    Images 8x8 and larger.  Features: (N, 2048).
    """

    depths, downsampling = (3, 4, 6, 3), 8
    bottleneck = True
