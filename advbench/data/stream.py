"""Images that are read from disk while they are used."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from advbench.data.base import Device, Split, to_unit
from advbench.errors import UserError

Key = tuple[int, int | None]  # which file, and the seed of its crop


def random_box(
    width: int, height: int, scale: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """A random window (Szegedy et al. 2015, arXiv 1409.4842, section 6): top, left, height, width.

    Its area is uniform in ``scale``, as a share of the image; its aspect ratio is log-uniform
    between 3/4 and 4/3. Where ten draws do not fit, the largest square in the centre.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


class ImageFiles(Dataset):
    """Image files as uint8 (3, size, size), by key: which file, and the seed of its crop or None.

    root: the folder that ``paths`` are relative to.
    paths: (N,) bytes; one array, because a list of strings is copied into every worker bit by bit.
    resize: the shorter side before the square of ``size`` is cut out of the centre.
    crop_scale: for training, the share of the area that a random window covers before it is
        brought to ``size``; None crops as evaluation does.
    """

    def __init__(
        self,
        root: Path,
        paths: np.ndarray,
        size: int,
        resize: int,
        crop_scale: tuple[float, float] | None,
    ) -> None:
        self.root = root
        self.paths = paths
        self.geometry = f"shorter side {resize}, centre {size}"
        self._crop_scale = crop_scale
        self._centre = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
        self._whole = transforms.Resize((size, size))

    def __getitem__(self, key: Key) -> Tensor | str:
        """The image, or what is wrong with it: a worker that raises sends its traceback along."""
        index, seed = key
        path = self.path(index)
        try:
            with Image.open(path) as file:
                if file.mode == "F" or file.mode.startswith("I"):  # conversion would cut it off
                    return f"'{path}' has more than 8 bits per value: store 8-bit images"
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"'{path}' cannot be read as an image ({error}): remove it or replace it"
        if seed is None or self._crop_scale is None:
            return pil_to_tensor(self._centre(image))
        # By the file and not by its place in the epoch: workers and resuming change nothing.
        rng = random.Random(f"{seed} {index}")
        top, left, height, width = random_box(*image.size, self._crop_scale, rng)
        return pil_to_tensor(self._whole(image.crop((left, top, left + width, top + height))))

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])


class _Order(Sampler[list[Key]]):
    """The batches of the coming pass; the loader and its workers stay and this changes."""

    def __init__(self) -> None:
        self.chunks: Sequence[Tensor] = ()
        self.seed: int | None = None

    def __iter__(self) -> Iterator[list[Key]]:
        for chunk in self.chunks:
            yield [(index, self.seed) for index in chunk.tolist()]


def _stack(items: list[Tensor | str]) -> Tensor | str:
    images = []
    for item in items:
        if isinstance(item, str):
            return item
        images.append(item)
    return torch.stack(images)


def _sound(images: Tensor | str) -> Tensor:
    if isinstance(images, str):
        raise UserError(images)
    return images


class StreamSplit(Split):
    """A split that worker processes read from disk, batch by batch.

    files: all the images; labels: (len(ids),) int64 on the CPU.
    workers: processes that read, no more than there are processors; 0 reads in this one.
    ids: which of ``files`` the split consists of; None is all.

    ``fetch`` reads with as many threads, so that single samples do not wait for a queue. A pass
    over ``batches`` that was begun later ends an earlier one, which then raises RuntimeError.
    """

    moment_images = 1000

    def __init__(
        self, files: ImageFiles, labels: Tensor, workers: int, ids: Tensor | None = None
    ) -> None:
        self.labels = labels
        self._files = files
        self._ids = torch.arange(len(files.paths)) if ids is None else ids
        self._workers = min(workers, _processors())
        self._order = _Order()
        self._loader: DataLoader | None = None
        self._pass = 0

    def _loading(self, pin_memory: bool) -> DataLoader:
        if self._loader is None or self._loader.pin_memory != pin_memory:
            self._loader = DataLoader(
                self._files,
                batch_sampler=self._order,
                num_workers=self._workers,
                collate_fn=_stack,
                pin_memory=pin_memory,
                persistent_workers=self._workers > 0,
                # Its own, or every pass would draw from the generator that training depends on.
                generator=torch.Generator(),
            )
        return self._loader

    def batches(
        self, order: Tensor, batch_size: int, device: Device, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = torch.device(device)
        chunks = order.cpu().split(batch_size)
        self._pass += 1
        begun = self._pass
        self._order.chunks = [self._ids[chunk] for chunk in chunks]
        self._order.seed = seed
        loader = self._loading(pin_memory=device.type == "cuda")
        for chunk, images in zip(chunks, loader, strict=True):
            yield self._place(_sound(images), chunk, device)
            if begun != self._pass:
                raise RuntimeError("another pass over this split was begun before this one ended")

    def fetch(self, index: Tensor, device: Device) -> tuple[Tensor, Tensor]:
        index = index.cpu()
        keys = [(i, None) for i in self._ids[index].tolist()]
        with ThreadPoolExecutor(max(1, self._workers)) as pool:
            images = _stack(list(pool.map(self._files.__getitem__, keys)))
        return self._place(_sound(images), index, device)

    def _place(self, images: Tensor, index: Tensor, device: Device) -> tuple[Tensor, Tensor]:
        # As uint8, a quarter of the bytes.
        images = to_unit(images.to(device, non_blocking=True))
        return images, self.labels[index].to(device, non_blocking=True)

    def sha256(self) -> str:
        """Over relative paths, file sizes and labels, and how the images are brought to size."""
        files = self._files
        digest = hashlib.sha256(files.geometry.encode())
        for index, label in zip(self._ids.tolist(), self.labels.tolist(), strict=True):
            size = files.path(index).stat().st_size
            digest.update(bytes(files.paths[index]) + f"\0{size} {label}\n".encode())
        return digest.hexdigest()

    def subset(self, index: Tensor | Sequence[int]) -> StreamSplit:
        index = torch.as_tensor(index, dtype=torch.int64)
        return StreamSplit(self._files, self.labels[index], self._workers, self._ids[index])


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
