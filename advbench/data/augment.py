"""Augmentation of whole batches, where the batch lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from advbench.data.cutmix import cutmix
from advbench.errors import UserError, did_you_mean


# Not frozen: OmegaConf makes the node of a frozen dataclass read-only, and refuses overrides.
@dataclass
class Augment:
    """Random crop, horizontal flip, cutout and CutMix, drawn independently for every image.

    Raises:
        UserError: for a negative crop or cutout, and for a cutmix outside [0, 1].
    """

    crop: int = 0
    """Pixels of zero padding on each side before a window of the old size is cut out; 0 is off."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: int = 0
    """Side in pixels of a square set to zero (DeVries & Taylor 2017, arXiv 1708.04552); its centre
    is uniform over the image, so that it may stick out at the border. 0 is off."""
    cutmix: float = 0.0
    """The probability that an image gets a rectangle of another one, and that share of its label
    (``advbench.data.cutmix``); 1 in Rebuffi et al. 2021, 1/2 for CIFAR in Yun et al. 2019. 0 is
    off."""

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"data.augment.{name}={getattr(self, name)} is a number of pixels: "
                    f"0 switches it off"
                )
        if not 0 <= self.cutmix <= 1:
            raise UserError(
                f"data.augment.cutmix={self.cutmix:g} is not a probability: give 0 to 1"
            )

    @classmethod
    def of(cls, value: Augment | Mapping[str, Any]) -> Augment:
        """``value`` itself, or the object of a config node with these keys.

        Raises:
            UserError: for an unknown key.
        """
        if isinstance(value, Augment):
            return value
        names = [field.name for field in fields(cls)]
        for key in value:
            if key not in names:
                raise UserError(f"there is no data.augment.{key}{did_you_mean(str(key), names)}")
        return cls(**{key: value[key] for key in names if key in value})

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop, flip and cutout. Nothing waits for the device.

        Args:
            x: floats in [0, 1], (B, C, H, W); not written into.
            generator: on the device of ``x``; one state of it gives one result.

        Returns:
            The same shape, type and range; with everything off, ``x`` itself, and nothing is drawn.
        """
        if self.crop or self.flip:
            x = self._crop_and_flip(x, generator)
        if self.cutout:
            x = self._cut_out(x, generator)
        return x

    def mix(
        self, x: Tensor, y: Tensor, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """CutMix.

        Args:
            x: images in [0, 1], (B, C, H, W).
            y: classes, (B,).
            num_classes: K.
            generator: on the device of ``x``.

        Returns:
            Images, classes, and soft labels (B, K); these are None where CutMix is off.
        """
        if not self.cutmix:
            return x, y, None
        return cutmix(x, y, num_classes, self.cutmix, generator)

    def _crop_and_flip(self, x: Tensor, generator: torch.Generator) -> Tensor:
        # One gather does both: a flip is a crop whose columns are read from right to left.
        count, _, height, width = x.shape
        device = x.device
        rows = torch.arange(height, device=device).expand(count, height)
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            mirrored = torch.randint(0, 2, (count, 1), generator=generator, device=device).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        if self.crop:
            x = F.pad(x, (self.crop,) * 4)
            corner = torch.randint(
                0, 2 * self.crop + 1, (count, 2), generator=generator, device=device
            )
            rows, columns = rows + corner[:, :1], columns + corner[:, 1:]
        image = torch.arange(count, device=device).view(-1, 1, 1)
        # The gather puts channels last in memory, which the shape then does not show.
        return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
            0, 3, 1, 2
        )

    def _cut_out(self, x: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = x.shape
        inside = []
        for length in (height, width):
            centre = torch.randint(0, length, (count, 1), generator=generator, device=x.device)
            first = centre - self.cutout // 2
            positions = torch.arange(length, device=x.device)
            inside.append((positions >= first) & (positions < first + self.cutout))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return x.masked_fill(hole, 0.0)
