"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

from advbench.backbones.base import Classifier
from advbench.backbones.preact_resnet import preact_resnet
from advbench.errors import UserError


def wide_resnet(
    *,
    depth: int,
    width: int,
    num_classes: int,
    input_shape: list[int],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    activation: str = "relu",
) -> Classifier:
    """WRN-depth-width without dropout (table 1): (depth - 4) / 6 blocks of each width.

    depth: 6 n + 4.  width: the factor k, for widths 16 k, 32 k, 64 k.
    input_shape: (C, H, W), 4x4 and larger.  Features: (N, 64 k).
    Raises UserError for another depth or width, smaller images or an unknown activation.
    """
    blocks, rest = divmod(depth - 4, 6)
    if blocks < 1 or rest:
        raise UserError(
            f"a wide ResNet has a depth of 6 n + 4, such as 16, 28, 34 or 70, not {depth}"
        )
    if width < 1:
        raise UserError(f"backbone.width={width} is not at least 1")
    return preact_resnet(
        f"wrn_{depth}_{width}",
        stem=16,
        widths=(16 * width, 32 * width, 64 * width),
        depth=blocks,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
        activation=activation,
    )
