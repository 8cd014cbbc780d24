"""Pieces that the convolutional backbones share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import nn

from advbench.backbones.base import Classifier
from advbench.errors import UserError


def conv(
    channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A square convolution without bias; ``stride`` divides the image size, rounding up."""
    return nn.Conv2d(
        channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False
    )


def named(modules: Mapping[str, nn.Module]) -> nn.Sequential:
    """A Sequential whose members have names."""
    return nn.Sequential(OrderedDict(modules))


def pooled_classifier(
    net: str,
    body: Mapping[str, nn.Module],
    *,
    downsampling: int,
    num_features: int,
    num_classes: int,
    input_shape: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Classifier:
    """``body`` -> global average pooling -> linear head, with the weights of He et al.

    body: from (N, C, H, W) to (N, num_features, H / downsampling, W / downsampling).
    Convolutions start normal with variance 2 / fan-out (He et al. 2015, arXiv 1502.01852, eq. 14).
    Raises UserError for images below ``downsampling`` pixels: a stage would halve a single pixel.
    """
    check_size(net, input_shape, smallest=downsampling)
    trunk = named({**body, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Classifier(
        trunk,
        num_features=num_features,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
    )


def check_size(net: str, input_shape: Sequence[int], *, smallest: int) -> None:
    """Raises UserError unless the images are at least ``smallest`` pixels high and wide."""
    height, width = input_shape[1:]
    if min(height, width) < smallest:
        raise UserError(
            f"{net} needs images of at least {smallest}x{smallest} pixels, "
            f"these are {height}x{width}; backbone=convnet works from 4x4"
        )
