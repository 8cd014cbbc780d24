"""LeNet in the form of the JumpReLU paper."""

from __future__ import annotations

from torch import nn

from advbench.backbones.activations import activation_class
from advbench.backbones.base import Classifier
from advbench.backbones.layers import check_size, named


def lenet(
    *,
    num_classes: int,
    input_shape: list[int],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    activation: str = "relu",
) -> Classifier:
    """conv10 - pool - J - conv20 - pool - J - fc120 - J - fc90 - J - fc (arXiv 1904.03750).

    Convolutions are 5x5 without padding; the activation J comes after the 2x2 max-pooling, which
    for ReLU changes nothing and for other activations does.
    input_shape: (C, H, W), 16x16 and larger.  Features: (N, 90).
    Raises UserError for smaller images or an unknown activation.
    """
    check_size("lenet", input_shape, smallest=16)
    act = activation_class(activation)
    channels, height, width = input_shape
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
    return Classifier(
        trunk,
        num_features=90,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
    )


def _shrink(size: int) -> int:
    """What one 5x5 convolution and one 2x2 pooling leave of ``size`` pixels."""
    return (size - 4) // 2
