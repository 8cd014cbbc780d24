"""ResNets with pre-activation (He et al. 2016, "Identity mappings", arXiv 1603.05027)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from advbench.backbones.activations import activation_class
from advbench.backbones.base import Classifier
from advbench.backbones.layers import conv, pooled_classifier


def preact_resnet18(
    *,
    num_classes: int,
    input_shape: list[int],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    activation: str = "relu",
) -> Classifier:
    """PreAct ResNet-18 for CIFAR: blocks 2-2-2-2, widths 64 to 512, a last norm and activation.

    input_shape: (C, H, W), 8x8 and larger.  Features: (N, 512).
    Raises UserError for smaller images or an unknown activation.
    """
    return preact_resnet(
        "preact_resnet18",
        stem=64,
        widths=(64, 128, 256, 512),
        depth=2,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
        activation=activation,
    )


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


def preact_resnet(
    net: str,
    *,
    stem: int,
    widths: Sequence[int],
    depth: int,
    num_classes: int,
    input_shape: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    activation: str,
) -> Classifier:
    """Stages of ``depth`` blocks, one per width; the image halves from each to the next.

    stem: channels of the first convolution.
    """
    act = activation_class(activation)
    channels = stem
    body: dict[str, nn.Module] = {"conv": conv(input_shape[0], channels)}
    for i, width in enumerate(widths):
        blocks = []
        for j in range(depth):
            blocks.append(PreactBlock(channels, width, 2 if i > 0 and j == 0 else 1, act))
            channels = width
        body[f"stage{i + 1}"] = nn.Sequential(*blocks)
    body |= {"norm": nn.BatchNorm2d(channels), "act": act()}
    return pooled_classifier(
        net,
        body,
        downsampling=2 ** (len(widths) - 1),
        num_features=channels,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
    )
