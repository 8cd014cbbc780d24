"""From NumPy arrays to a split; whatever is wrong with them is said in one line."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from advbench.data.archive import Member
from advbench.data.base import ArraySplit
from advbench.errors import UserError

# Float images may stick out of [0, 1] by rounding; the referee tolerates as much.
TOLERANCE = 1e-6
# By no more than this they do so after a resampling, say: not for being counted from 0 to 255.
SLIGHT = 0.01
# No 8-bit images are as dark as this: they were counted from 0 to 1, or to 16.
DARKEST = 16
BLOCK = 1000  # images that are converted together


def image_shape(shape: tuple[int, ...], what: str) -> tuple[int, int, int]:
    """(C, H, W) of images.

    Args:
        shape: (N, H, W, C) or (N, H, W).
        what: the images' name in messages.

    Raises:
        UserError: for another shape, and for no images.
    """
    if len(shape) not in (3, 4):
        raise UserError(f"{what} has shape {shape}: images are (N, H, W, C), or (N, H, W) in gray")
    if 0 in shape:
        raise UserError(f"{what} is empty (shape {shape}): give at least one image")
    _, height, width, channels = (*shape, 1)[:4]
    if height <= 4 < min(width, channels):  # maps of 4x4 may have any number of channels
        raise UserError(
            f"{what} has shape {shape}, which looks like (N, C, H, W): "
            f"store x.transpose(0, 2, 3, 1)"
        )
    return channels, height, width


def as_pixels(x: np.ndarray, what: str) -> np.ndarray:
    """Images as (N, H, W, C), uint8 as they are, without a copy, and floats as float32.

    Args:
        x: (N, H, W, C) or (N, H, W); uint8 in [0, 255] or floats in [0, 1].
        what: the images' name in messages.

    Raises:
        UserError: for every other shape, type or range, for NaN and for no images.
    """
    channels, height, width = image_shape(x.shape, what)
    _check_type(x.dtype, what)
    x = x.reshape(-1, height, width, channels)
    if x.dtype.kind == "f":
        _check_range(*_range(x, what), x.dtype, what)
        x = np.clip(x.astype(np.float32), 0.0, 1.0)
    return x


def as_images(x: np.ndarray | Member, what: str) -> Tensor:
    """Images as (N, C, H, W), else as ``as_pixels`` takes and returns them.

    They are converted block by block, so that nothing is in memory twice.

    Args:
        x: as for ``as_pixels``; an array of an archive, too.
        what: the images' name in messages.

    Raises:
        UserError: as ``as_pixels``, and for uint8 images that use a fraction of the range.
    """
    channels, height, width = image_shape(x.shape, what)
    _check_type(x.dtype, what)
    floats = x.dtype.kind == "f"
    kind = torch.float32 if floats else torch.uint8
    images = torch.empty((x.shape[0], channels, height, width), dtype=kind)
    low, high, start = np.inf, -np.inf, 0
    for block in x.blocks(BLOCK) if isinstance(x, Member) else _blocks(x):
        least, most = _range(block, what)
        low, high = min(low, least), max(high, most)
        rows = block.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        if floats:
            rows = np.clip(rows.astype(np.float32), 0.0, 1.0)
        images[start : start + len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
        start += len(rows)
    if floats:
        _check_range(low, high, x.dtype, what)
    elif high <= DARKEST:
        raise UserError(
            f"{what} is uint8 with {high:.0f} as its largest value, and 255 means white: "
            f"store x.astype('float32') / {max(int(high), 1)}"
        )
    return images


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), BLOCK):
        yield x[start : start + BLOCK]


def _check_type(dtype: np.dtype, what: str) -> None:
    if dtype.kind != "f" and dtype != np.uint8:
        raise UserError(f"{what} is {dtype}: store uint8 from 0 to 255, or float32 from 0 to 1")


def _range(x: np.ndarray, what: str) -> tuple[float, float]:
    """The least and the largest value. Raises UserError for NaN and infinity."""
    low, high = float(x.min()), float(x.max())
    if not np.isfinite([low, high]).all():
        raise UserError(f"{what} holds NaN or infinity: store numbers from 0 to 1, or uint8")
    return low, high


def _check_range(low: float, high: float, dtype: np.dtype, what: str) -> None:
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    if low >= -SLIGHT and high <= 1 + SLIGHT:
        cure = "clip it to [0, 1]"
    elif low >= 0 and high <= 255:
        cure = "divide by 255 or store uint8"
    else:
        cure = "undo the normalisation (it is part of the model here) and store numbers from 0 to 1"
    raise UserError(f"{what} is {dtype} from {low:.6g} to {high:.6g}, outside [0, 1]: {cure}")


def as_labels(y: np.ndarray, what: str, num_classes: int | None = None) -> Tensor:
    """Labels as (N,) int64.

    Args:
        y: (N,) integers in [0, K).
        what: the labels' name in messages.
        num_classes: K where it is known.

    Raises:
        UserError: for every other shape, type or range.
    """
    if y.ndim != 1:
        cure = "y.argmax(1)" if y.ndim == 2 and y.shape[1] > 1 else "y.reshape(-1)"
        raise UserError(f"{what} has shape {y.shape}: labels are (N,), store {cure}")
    if y.dtype.kind not in "iu":
        raise UserError(f"{what} is {y.dtype}: labels are integers, store y.astype('int64')")
    if y.size == 0:
        raise UserError(f"{what} is empty: give at least one label")
    low, high = int(y.min()), int(y.max())
    if low < 0:
        raise UserError(f"{what} has the label {low}: number the classes from 0")
    if num_classes is not None and high >= num_classes:
        raise UserError(
            f"{what} has the label {high}, and there are {num_classes} classes (0 to "
            f"{num_classes - 1}): number the classes from 0, in training and test data alike"
        )
    return torch.from_numpy(y.astype(np.int64))


def array_split(
    x: np.ndarray | Member, y: np.ndarray, x_what: str, y_what: str, num_classes: int | None = None
) -> ArraySplit:
    """A split of images and labels in memory.

    Args:
        x: images, as for ``as_images``.
        y: labels, as for ``as_labels``.
        x_what: the images' name in messages.
        y_what: the labels' name in messages.
        num_classes: K where it is known.

    Raises:
        UserError: for images or labels that do not fit.
    """
    images, labels = as_images(x, x_what), as_labels(y, y_what, num_classes)
    one_label_each(images, labels, x_what, y_what)
    return ArraySplit(images, labels)


def one_label_each(images: Tensor, labels: Tensor, x_what: str, y_what: str) -> None:
    """Check that there are as many labels as images.

    Raises:
        UserError: if not.
    """
    if len(images) != len(labels):
        raise UserError(
            f"{x_what} has {len(images)} images and {y_what} {len(labels)} labels: "
            f"store one label per image"
        )
