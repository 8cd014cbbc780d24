"""MobileNetV2 in its CIFAR form (Sandler et al. 2018, arXiv 1801.04381)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from advbench.backbones.layers import PooledBackbone, conv, named

# Table 2: expansion t, channels c, blocks n, stride s. For images of 32 pixels the stem and the
# stage of 24 channels keep the size, so the net halves it three times instead of five.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclass(frozen=True, kw_only=True)
class mobilenet_v2(PooledBackbone):
    """MobileNetV2, width 1, without dropout; 17 inverted residual blocks.

    Images 8x8 and larger.  Features: (N, 1280).
    """

    downsampling = 8
    stem, stages, last = 32, STAGES, 1280
    activation: str = "relu6"
    """A name of ``advbench.backbones.activations``."""

    def body(self, act: type[nn.Module]) -> tuple[dict[str, nn.Module], int]:
        channels = self.stem
        body: dict[str, nn.Module] = {"stem": _unit(self.input_shape[0], channels, act)}
        for i, (expansion, width, depth, first_stride) in enumerate(self.stages, start=1):
            blocks = []
            for j in range(depth):
                stride = first_stride if j == 0 else 1
                blocks.append(InvertedResidual(channels, width, expansion, stride, act))
                channels = width
            body[f"stage{i}"] = nn.Sequential(*blocks)
        body["last"] = _unit(channels, self.last, act, kernel=1)
        return body, self.last


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 (section 3.3); x is added where shapes allow it."""

    def __init__(
        self, channels_in: int, width: int, expansion: int, stride: int, act: type[nn.Module]
    ) -> None:
        super().__init__()
        wide = channels_in * expansion
        body: dict[str, nn.Module] = {}
        if expansion > 1:
            body["expand"] = _unit(channels_in, wide, act, kernel=1)
        body["depthwise"] = _unit(wide, wide, act, stride=stride, groups=wide)
        body["project"] = conv(wide, width, kernel=1)
        body["norm"] = nn.BatchNorm2d(width)
        self.body = named(body)
        self.residual = stride == 1 and channels_in == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _unit(
    channels_in: int,
    channels_out: int,
    act: type[nn.Module],
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution, norm, activation."""
    return named(
        {
            "conv": conv(channels_in, channels_out, kernel=kernel, stride=stride, groups=groups),
            "norm": nn.BatchNorm2d(channels_out),
            "act": act(),
        }
    )
