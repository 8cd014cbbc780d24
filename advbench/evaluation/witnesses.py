"""Reads adversarial images (witnesses) from a file, with the ids of their samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from advbench.errors import UserError, describe
from advbench.evaluation.samples import Samples

FORMATS = (".pt", ".pth", ".npz", ".npy", ".safetensors")


@dataclass(frozen=True)
class Witnesses:
    """Images, and the samples that they belong to."""

    ids: np.ndarray
    """(K,) sample ids, sorted."""
    images: np.ndarray
    """(K, C, H, W), floats in [0, 1] or uint8."""
    notes: tuple[str, ...] = ()
    """How the file was read, a line each."""

    def has(self, rows: Tensor) -> Tensor:
        """Which of the samples have an image: (N,) bool."""
        return torch.from_numpy(np.isin(rows.numpy(), self.ids))

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the samples have an image, (N,) bool, and these images as float32."""
        has_image = self.has(rows)
        index = np.searchsorted(self.ids, rows[has_image].numpy())
        images = torch.from_numpy(np.ascontiguousarray(self.images[index]))
        return has_image, images.float() / 255 if images.dtype is torch.uint8 else images.float()

    @classmethod
    def read(cls, file: Path, samples: Samples) -> Witnesses:
        """Images of the whole test split in its order, or with their ids as ``sample``.

        Args:
            file: a tensor saved by ``torch.save``, ``.npy``, or ``.npz`` and ``.safetensors`` with
                one array of images, and perhaps ``sample``.
            samples: those that are evaluated.

        Raises:
            UserError: for what is no such file, and for images of other shapes or numbers.
        """
        if file.suffix not in FORMATS:
            raise UserError(f"--images {file}: give a file that ends in {', '.join(FORMATS)}")
        if not file.is_file():
            raise UserError(f"there is no file '{file}'")
        try:
            images, ids = _chosen(_arrays(file))
        except UserError as problem:
            raise UserError(f"'{file}' {problem}") from None
        except Exception as problem:
            raise UserError(f"'{file}' can't be read: {describe(problem)}") from None
        shape = tuple(samples.fetch(samples.ids[:1]).x.shape[1:])
        images, notes = _channels_first(file, images, shape)
        total = len(samples.split)
        if ids is None:
            if len(images) != total:
                raise UserError(
                    f"'{file}' has {len(images)} images and the test split {total}: give one for "
                    "each, in its order (the clean image where the attack failed); n=NUMBER then "
                    "scores a subset"
                )
            ids = np.arange(total)
        if ids.shape != (len(images),) or len(np.unique(ids)) != len(ids):
            raise UserError(f"'{file}': 'sample' does not name each image's sample once")
        if len(ids) and not 0 <= ids.min() <= ids.max() < total:
            raise UserError(f"'{file}': 'sample' names samples outside the {total} of the split")
        order = np.argsort(ids, kind="stable")
        same = np.array_equal(order, np.arange(len(order)))
        return cls(ids[order], images if same else images[order], notes)


def _arrays(file: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a file by name; nothing in it is executed."""
    if file.suffix == ".npy":
        return {"x": np.load(file, mmap_mode="r", allow_pickle=False)}
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    if file.suffix == ".safetensors":
        return load_file(file)
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    arrays = content if isinstance(content, Mapping) else {"x": content}
    tensors = {str(k): v.detach() for k, v in arrays.items() if isinstance(v, Tensor)}
    to_float32 = (torch.bfloat16,)
    return {k: (v.float() if v.dtype in to_float32 else v).numpy() for k, v in tensors.items()}


def _chosen(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """The only array of images, and the ids beside it."""
    images = {name: array for name, array in arrays.items() if array.ndim == 4}
    if len(images) != 1:
        names = ", ".join(images) or "none"
        raise UserError(f"holds no one array of images, (N, C, H, W); there is: {names}")
    (array,) = images.values()
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise UserError(f"holds images of {array.dtype}: give floats in [0, 1], or uint8")
    ids = arrays.get("sample")
    if ids is not None and ids.dtype.kind not in "iu":
        raise UserError("holds a 'sample' that are no whole numbers")
    return array, None if ids is None else ids.astype(np.int64)


def _channels_first(
    file: Path, images: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The images as (K, C, H, W). Raises UserError where they are of another shape."""
    notes = []
    if images.shape[1:] != shape:
        if images.shape[1:] != (*shape[1:], shape[0]):
            raise UserError(f"'{file}' has images of shape {images.shape[1:]}, the data {shape}")
        images = np.moveaxis(images, -1, 1)
        notes.append("images: channels last, moved to the front")
    if images.dtype == np.uint8:
        notes.append("images: uint8, divided by 255")
    elif len(images) and float(np.max(images[: min(len(images), 100)])) > 2:
        raise UserError(f"'{file}' has pixels far above 1: give floats in [0, 1], or uint8")
    return images, tuple(notes)
