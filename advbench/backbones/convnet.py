"""A small net that trains in seconds on a CPU."""

from __future__ import annotations

from torch import nn

from advbench.backbones.layers import PooledBackbone, conv


class convnet(PooledBackbone):
    """Four 3x3 convolutions with batch norm, widths 32-64-64-64, strides 1-2-1-2.

    Images 4x4 and larger.  Features: (N, 64).
    """

    downsampling = 4

    def body(self, act: type[nn.Module]) -> tuple[dict[str, nn.Module], int]:
        body: dict[str, nn.Module] = {}
        channels = self.input_shape[0]
        for i, (width, stride) in enumerate(((32, 1), (64, 2), (64, 1), (64, 2)), start=1):
            body[f"conv{i}"] = conv(channels, width, stride=stride)
            body[f"norm{i}"] = nn.BatchNorm2d(width)
            body[f"act{i}"] = act()
            channels = width
        return body, channels
