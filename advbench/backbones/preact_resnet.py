"""ResNets with pre-activation (He et al. 2016, "Identity mappings", arXiv 1603.05027)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from advbench.backbones.layers import PooledBackbone, conv


class PreactBlock(nn.Module):
    """``shortcut + conv(act(norm(conv(z))))`` with ``z = act(norm(x))`` (fig. 4 e).

    Where the shape changes, the shortcut is a 1x1 convolution of z, otherwise it is x itself.
    """

    def __init__(self, channels_in: int, width: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.act1 = act()
        self.conv1 = conv(channels_in, width, stride=stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.act2 = act()
        self.conv2 = conv(width, width)
        self.shortcut = None
        if stride != 1 or channels_in != width:
            self.shortcut = conv(channels_in, width, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(z)
        return shortcut + self.conv2(self.act2(self.norm2(self.conv1(z))))


def preact_body(
    channels_in: int, stem: int, widths: Sequence[int], depth: int, act: type[nn.Module]
) -> tuple[dict[str, nn.Module], int]:
    """Stages of ``depth`` blocks, one per width; the image halves from each to the next.

    stem: channels of the first convolution.  Returns the modules and the channels of the last.
    """
    channels = stem
    body: dict[str, nn.Module] = {"conv": conv(channels_in, channels)}
    for i, width in enumerate(widths):
        blocks = []
        for j in range(depth):
            blocks.append(PreactBlock(channels, width, 2 if i > 0 and j == 0 else 1, act))
            channels = width
        body[f"stage{i + 1}"] = nn.Sequential(*blocks)
    return body | {"norm": nn.BatchNorm2d(channels), "act": act()}, channels


class preact_resnet18(PooledBackbone):
    """PreAct ResNet-18 for CIFAR: blocks 2-2-2-2, widths 64 to 512, a last norm and activation.

    Images 8x8 and larger.  Features: (N, 512).
    """

    downsampling = 8
    stem: ClassVar[int] = 64
    """Channels of the first convolution."""
    widths: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)
    """Channels of each stage."""

    def body(self, act: type[nn.Module]) -> tuple[dict[str, nn.Module], int]:
        return preact_body(self.input_shape[0], self.stem, self.widths, 2, act)
