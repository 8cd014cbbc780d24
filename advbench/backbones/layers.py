"""Pieces that the convolutional backbones share."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from advbench.backbones.activations import activation_class
from advbench.backbones.base import Backbone, Classifier
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


@dataclass(frozen=True, kw_only=True)
class PooledBackbone(Backbone):
    """``body`` -> global average pooling -> linear head, with the weights of He et al.

    Convolutions start normal with variance 2 / fan-out (He et al. 2015, arXiv 1502.01852, eq. 14).
    ``build`` raises UserError for images below ``downsampling`` pixels, where a stage would halve a
    single pixel, and for an unknown activation.
    """

    downsampling: ClassVar[int]
    """By how much the body divides height and width."""
    activation: str = "relu"
    """A name of ``advbench.backbones.activations``."""

    @property
    def title(self) -> str:
        """The name in messages."""
        return type(self).__name__

    @abstractmethod
    def body(self, act: type[nn.Module]) -> tuple[dict[str, nn.Module], int]:
        """The layers before the pooling.

        Args:
            act: class of the activations; each site gets a module of its own.

        Returns:
            Modules by name, from (N, C, H, W) to (N, D, H / downsampling, W / downsampling); and D.
        """

    def build(self) -> Classifier:
        act = activation_class(self.activation)
        check_size(self.title, self.input_shape, smallest=self.downsampling)
        body, num_features = self.body(act)
        trunk = named({**body, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return self.classifier(trunk, num_features=num_features)


def check_size(net: str, input_shape: Sequence[int], *, smallest: int) -> None:
    """Check the size of the images.

    Args:
        net: the network's name in the message.
        input_shape: (C, H, W).
        smallest: pixels that they need at least, in height and width.

    Raises:
        UserError: for smaller images.
    """
    height, width = input_shape[1:]
    if min(height, width) < smallest:
        raise UserError(
            f"{net} needs images of at least {smallest}x{smallest} pixels, "
            f"these are {height}x{width}; backbone=convnet works from 4x4"
        )
