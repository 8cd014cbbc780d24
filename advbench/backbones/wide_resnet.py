"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from advbench.backbones.layers import PooledBackbone
from advbench.backbones.preact_resnet import preact_body
from advbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class wide_resnet(PooledBackbone):
    """WRN-depth-width without dropout (table 1): (depth - 4) / 6 blocks of each width.

    Images 4x4 and larger.  Features: (N, 64 k).
    """

    downsampling = 4
    depth: int
    """6 n + 4."""
    width: int
    """The factor k, for widths 16 k, 32 k, 64 k."""

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(
                f"a wide ResNet has a depth of 6 n + 4, such as 16, 28, 34 or 70, not {self.depth}"
            )
        if self.width < 1:
            raise UserError(f"backbone.width={self.width} is not at least 1")

    @property
    def title(self) -> str:
        return f"wrn_{self.depth}_{self.width}"

    def body(self, act: type[nn.Module]) -> tuple[dict[str, nn.Module], int]:
        widths = (16 * self.width, 32 * self.width, 64 * self.width)
        return preact_body(self.input_shape[0], 16, widths, (self.depth - 4) // 6, act)
