"""Further training images beside those of the data set: generated, or labelled by a model.

Nothing here tells a pseudo-label from a label, or checks that no image is one of the test part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from advbench.data.archive import Archive
from advbench.data.arrays import as_labels, as_pixels, image_shape, one_label_each
from advbench.data.base import Device, Info, Split, fingerprint, place, to_unit
from advbench.errors import UserError

# The second pair is that of the generated sets of Rebuffi et al. 2021 and of Wang et al. 2023.
KEYS = (("x_train", "y_train"), ("image", "label"))
ROOM = 0.25  # of the free memory of an accelerator: what images may take there; ours


class StoredSplit(Split):
    """A split whose images stay as they are stored, in memory or in a mapped file.

    They move to an accelerator once where they take a quarter of its free memory or less; if not,
    each batch is gathered by the CPU, which for a mapped file reads the disk.

    Args:
        images: (N, H, W, C), uint8 in [0, 255] or float32 in [0, 1], on the CPU.
        labels: (N,) int64, on the CPU.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self._homes: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _home(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels on the device, or on the CPU where it has no room for them."""
        if device not in self._homes:
            room = 0.0
            if device.type == "cuda":
                room = ROOM * torch.cuda.mem_get_info(device)[0]
            storage = device if self.images.nbytes <= room else torch.device("cpu")
            self._homes[device] = self.images.to(storage), self.labels.to(storage)
        return self._homes[device]

    def batches(
        self, order: Tensor, batch_size: int, device: Device, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        storage = place(device)
        # All at once: a copy to a device for each batch would wait for what the device does.
        for chunk in order.to(self._home(storage)[0].device).split(batch_size):
            yield self.fetch(chunk, storage)

    def fetch(self, index: Tensor, device: Device) -> tuple[Tensor, Tensor]:
        device = place(device)
        images, labels = self._home(device)
        index = index.to(images.device)
        rows, classes = images.index_select(0, index), labels.index_select(0, index)
        if device.type == "cuda" and not images.is_cuda:
            rows, classes = rows.pin_memory(), classes.pin_memory()
        # As uint8, a quarter of the bytes.
        unit = to_unit(rows.to(device, non_blocking=True))
        return unit.permute(0, 3, 1, 2), classes.to(device, non_blocking=True)

    def sha256(self) -> str:
        return fingerprint(self.images, self.labels)

    def subset(self, index: Tensor | Sequence[int]) -> StoredSplit:
        index = torch.as_tensor(index, dtype=torch.int64)
        return StoredSplit(self.images[index], self.labels[index])


def read(path: str, info: Info) -> StoredSplit:
    """The images and labels of ``data.extra=FILE.npz``, which must fit the data set ``info``.

    ``x_train, y_train`` or ``image, label``: (N, H, W, C) or (N, H, W), uint8 or floats in [0, 1],
    and (N,) integers. uint8 that ``np.savez`` wrote stays in the file until it is used; floats, and
    what ``np.savez_compressed`` wrote, is held in memory.

    Args:
        path: of the file.
        info: of the data set.

    Raises:
        UserError: for a file that cannot be read, and for images or labels that do not fit.
    """
    file = Archive(path, "data.extra", KEYS[0])
    x, y = next((keys for keys in KEYS if keys[0] in file.names), KEYS[0])
    file.require(x, y)
    shape = image_shape(file.shape(x), file.what(x))
    if shape != info.input_shape:
        raise UserError(
            f"{file.what(x)} has images of shape {shape} and {info.name} of {info.input_shape} "
            f"(C, H, W): bring the extra images to that size"
        )
    labels = as_labels(file.read(y), file.what(y), info.num_classes)
    images = torch.from_numpy(as_pixels(file.mapped(x), file.what(x)))
    one_label_each(images, labels, file.what(x), file.what(y))
    return StoredSplit(images, labels)


def opener(path: str | None) -> Callable[[Info], StoredSplit] | None:
    """What ``Splits`` opens ``data.extra=FILE.npz`` with; None for null."""
    return None if path is None else partial(read, path)
