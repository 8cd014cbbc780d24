"""CutMix (Yun et al. 2019, arXiv 1905.04899): a rectangle of another image, and of its label."""

from __future__ import annotations

import torch
from torch import Tensor


def cutmix(
    x: Tensor, y: Tensor, num_classes: int, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of which each image is mixed, with that probability, with another one of the batch.

    As in Yun et al. and, for adversarial training, Rebuffi et al.
    2021 (arXiv 2103.01946), the rectangle covers 1 - lambda of the image, lambda from Beta(1, 1),
    about a centre that is uniform over the image, and pairs are a permutation of the batch. They
    draw one rectangle for a batch; here each image has its own (ours). Nothing
    waits for the device.

    Args:
        x: images, (B, C, H, W).
        y: classes, (B,).
        num_classes: K.
        probability: that an image is mixed, in [0, 1].
        generator: on the device of ``x``.

    Returns:
        As ``mixed``.
    """
    count, _, height, width = x.shape
    draws = torch.rand((2, count), generator=generator, device=x.device)
    lam = torch.where(draws[0] < probability, draws[1], 1.0)
    centre = [
        torch.randint(0, length, (count,), generator=generator, device=x.device)
        for length in (height, width)
    ]
    partner = torch.randperm(count, generator=generator, device=x.device)
    return mixed(x, y, num_classes, partner, rectangles(lam, centre[0], centre[1], height, width))


def rectangles(lam: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Where the other image is to be seen; what sticks out of the image is cut off.

    Args:
        lam: (B,) in [0, 1]; the sides are sqrt(1 - lam) of those of the image, rounded down (eq.
            2).
        row, column: of the centre, (B,).
        height, width: of the images.

    Returns:
        (B, H, W), true inside.
    """
    inside = []
    for centre, length in ((row, height), (column, width)):
        side = (length * (1 - lam).sqrt()).long()
        first = (centre - side // 2)[:, None]
        positions = torch.arange(length, device=lam.device)
        inside.append((positions >= first) & (positions < first + side[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def mixed(
    x: Tensor, y: Tensor, num_classes: int, partner: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Images of which a part is that of their partners, and the share of each class.

    Args:
        x: images, (B, C, H, W).
        y: classes, (B,).
        num_classes: K.
        partner: rows of the batch, (B,).
        inside: (B, H, W), true where the partner is to be seen.

    Returns:
        x, y and (B, K) the share of each class by pixels; y is the class with most of them, of
        equals the image's own.
    """
    share = inside.sum((1, 2)) / inside[0].numel()
    other = y[partner]
    classes = torch.arange(num_classes, device=y.device)
    weights = (y[:, None] == classes) * (1 - share)[:, None]
    shares = weights + (other[:, None] == classes) * share[:, None]
    return (
        torch.where(inside[:, None], x[partner], x),
        torch.where(share > 0.5, other, y),
        shares,
    )
