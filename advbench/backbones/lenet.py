"""LeNet in the form of the JumpReLU paper."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from advbench.backbones.activations import activation_class
from advbench.backbones.base import Backbone, Classifier
from advbench.backbones.layers import check_size, named


@dataclass(frozen=True, kw_only=True)
class lenet(Backbone):
    """conv10 - pool - J - conv20 - pool - J - fc120 - J - fc90 - J - fc (arXiv 1904.03750).

    Convolutions are 5x5 without padding; the activation J comes after the 2x2 max-pooling, which
    for ReLU changes nothing and for other activations does.
    Images 16x16 and larger.  Features: (N, 90).
    """

    activation: str = "relu"
    """A name of ``advbench.backbones.activations``."""

    def build(self) -> Classifier:
        check_size("lenet", self.input_shape, smallest=16)
        act = activation_class(self.activation)
        channels, height, width = self.input_shape
        pixels = _shrink(_shrink(height)) * _shrink(_shrink(width))
        trunk = named(
            {
                "conv1": nn.Conv2d(channels, 10, 5),
                "pool1": nn.MaxPool2d(2),
                "act1": act(),
                "conv2": nn.Conv2d(10, 20, 5),
                "pool2": nn.MaxPool2d(2),
                "act2": act(),
                "flatten": nn.Flatten(),
                "fc3": nn.Linear(20 * pixels, 120),
                "act3": act(),
                "fc4": nn.Linear(120, 90),
                "act4": act(),
            }
        )
        return self.classifier(trunk, num_features=90)


def _shrink(size: int) -> int:
    """What one 5x5 convolution and one 2x2 pooling leave of ``size`` pixels."""
    return (size - 4) // 2
