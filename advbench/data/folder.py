"""Folders of images, one folder per class: the user's own, and ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from advbench.config.words import word
from advbench.data.base import Part, Source
from advbench.data.stream import ImageFiles, StreamSplit
from advbench.errors import UserError, did_you_mean


class FolderSource(Source):
    """``root/train/CLASS/...`` and ``root/test/CLASS/...`` or ``root/val/CLASS/...``.

    Labels number the sorted class folders of the training part, in the test part too; without a
    training part, those of the test part. Names that are numbers are sorted as numbers: 1, 2, 10.
    Names that begin with a dot are left alone.

    Args:
        root: the folder.
        name: in results; None is the name of the folder.
        size: the side of the square that images are brought to, in pixels.
        resize: the shorter side before the square is cut out of the centre, in pixels; None is
            ``size``.
        crop_scale: for training, smallest and largest share of the area of a random crop, in
            (0, 1]; None crops nothing.
        workers: processes that read images.

    Raises:
        UserError: for a folder without a part, or a number out of range.
    """

    test_folders: tuple[str, ...] = ("test", "val")

    def __init__(
        self,
        root: str,
        *,
        name: str | None,
        size: int,
        resize: int | None,
        crop_scale: Sequence[float] | None,
        workers: int,
    ) -> None:
        self.root = Path(root).expanduser()
        self.name = name or f"imagefolder:{self.root.name}"
        resize = size if resize is None else resize
        if not 1 <= size <= resize:
            raise UserError(
                f"data.size={size} and data.resize={resize}: images are resized and then cropped "
                f"to size, give 1 <= size <= resize"
            )
        if crop_scale is not None and not (
            len(crop_scale) == 2 and 0 < crop_scale[0] <= crop_scale[1] <= 1
        ):
            raise UserError(
                f"data.crop_scale={list(crop_scale)} is a range of shares of the area: "
                f"give one like [0.08,1.0], or null"
            )
        if workers < 0:
            raise UserError(f"data.workers={workers}: give 0 or more processes")
        self._size = size
        self._resize = resize
        self._crop_scale = None if crop_scale is None else (crop_scale[0], crop_scale[1])
        self._workers = workers
        self._folders: dict[Part, Path] = {}
        if (self.root / "train").is_dir():
            self._folders["train"] = self.root / "train"
        for folder in self.test_folders:
            if (self.root / folder).is_dir():
                self._folders["test"] = self.root / folder
                break
        if not self._folders:
            raise self._missing("train")

    def _missing(self, part: Part) -> UserError:
        folders = ("train",) if part == "train" else self.test_folders
        return UserError(
            f"there is no folder {' or '.join(repr(str(self.root / name)) for name in folders)}: "
            f"images are read from {folders[0]}/CLASS/FILE in the folder of data.root=DIR"
        )

    @property
    def has_train(self) -> bool:
        return "train" in self._folders

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self._size, self._size

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return self._classes_of(self._folders["train" if self.has_train else "test"])

    def _classes_of(self, folder: Path) -> tuple[str, ...]:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
        if not names:
            raise UserError(f"'{folder}' has no folders: sort the images into one folder per class")
        return tuple(sorted(names, key=_number if _are_numbers(names) else None))

    @property
    def notes(self) -> tuple[str, ...]:
        if list(self.classes) == sorted(self.classes):
            return ()
        first = ", ".join(self.classes[:3])
        return (f"the class folders are numbered as numbers ({first}, ...), not as text is sorted",)

    def open(self, part: Part) -> StreamSplit:
        if part not in self._folders:
            raise self._missing(part)
        folder = self._folders[part]
        numbers = {name: number for number, name in enumerate(self.classes)}
        images = {}
        for name in self._classes_of(folder):
            if name not in numbers:
                raise UserError(
                    f"'{folder / name}' is a class that the training part does not have"
                    f"{did_you_mean(name, numbers)}"
                )
            images[name] = numbers[name]
        try:
            samples = make_dataset(str(folder), images, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"'{folder}': {reason}; add images or remove the folder") from None
        start = len(os.path.join(folder, ""))
        paths = np.array([os.fsencode(path[start:]) for path, _ in samples])
        files = ImageFiles(folder, paths, self._size, self._resize, self._crop_scale)
        return StreamSplit(files, torch.tensor([label for _, label in samples]), self._workers)


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _number(name: str) -> tuple[int, str]:
    return int(name), name


class ImageNetSource(FolderSource):
    """ILSVRC 2012 as torchvision unpacks it: ``root/train/WNID/...`` and ``root/val/WNID/...``.

    Labels number the sorted WordNet identifiers.

    Raises:
        UserError: where there are not 1000 of them: with one missing, the labels would not be those
            of published models.
    """

    test_folders = ("val",)
    moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def _missing(self, part: Part) -> UserError:
        folder = "train" if part == "train" else "val"
        return UserError(
            f"imagenet is not under '{self.root}' (no folder '{folder}'): say where it is with "
            f"data.root=DIR, or put the archives of https://image-net.org/download-images there "
            f'and unpack them with python -c "from torchvision.datasets import ImageNet; '
            f"ImageNet('{self.root}', '{folder}')\""
        )

    def _classes_of(self, folder: Path) -> tuple[str, ...]:
        names = super()._classes_of(folder)
        if len(names) != 1000:
            raise UserError(
                f"'{folder}' has {len(names)} class folders, not the 1000 of imagenet: "
                "complete it, or read it as it is with data=imagefolder "
                f"{word('data.root', str(self.root))}"
            )
        return names
