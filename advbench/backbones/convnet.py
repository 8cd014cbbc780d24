"""A small net that trains in seconds on a CPU."""

from __future__ import annotations

from torch import nn

from advbench.backbones.activations import activation_class
from advbench.backbones.base import Classifier
from advbench.backbones.layers import conv, pooled_classifier


def convnet(
    *,
    num_classes: int,
    input_shape: list[int],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    activation: str = "relu",
) -> Classifier:
    """Four 3x3 convolutions with batch norm, widths 32-64-64-64, strides 1-2-1-2.

    input_shape: (C, H, W), 4x4 and larger.  Features: (N, 64).
    Raises UserError for smaller images or an unknown activation.
    """
    act = activation_class(activation)
    body: dict[str, nn.Module] = {}
    channels = input_shape[0]
    for i, (width, stride) in enumerate(((32, 1), (64, 2), (64, 1), (64, 2)), start=1):
        body[f"conv{i}"] = conv(channels, width, stride=stride)
        body[f"norm{i}"] = nn.BatchNorm2d(width)
        body[f"act{i}"] = act()
        channels = width
    return pooled_classifier(
        "convnet",
        body,
        downsampling=4,
        num_features=channels,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
    )
