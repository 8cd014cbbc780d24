"""The user's own arrays in one ``.npz`` file."""

from __future__ import annotations

import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from advbench.data.arrays import array_split, as_labels, image_shape
from advbench.data.base import ArraySplit, Part, Source
from advbench.errors import UserError

# What zipfile, zlib and NumPy raise for a file that is not what it should be.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


class NpzSource(Source):
    """Arrays ``x_train, y_train, x_test, y_test``, or one of the two pairs.

    Images are (N, H, W, C) or (N, H, W), uint8 or floats in [0, 1]; labels are (N,) integers.
    Each array is read when its part is opened; pickled objects never are.

    name: how results call the data; None is "npz:" and the name of the file.
    num_classes: None is the largest label plus one, of the training part where there is one.
    """

    def __init__(self, path: str, name: str | None, num_classes: int | None) -> None:
        self.path = Path(path).expanduser()
        self.name = name or f"npz:{self.path.stem}"
        if num_classes is not None and num_classes < 1:
            raise UserError(f"data.num_classes={num_classes}: give a number from 1 on, or null")
        self._num_classes = num_classes
        try:
            with zipfile.ZipFile(self.path) as file:
                members = file.namelist()
        except FileNotFoundError:
            raise UserError(f"there is no file '{path}': name it with data.path=FILE.npz") from None
        except DAMAGE as error:
            raise UserError(
                f"'{path}' cannot be read as .npz ({error}): write it with "
                f"np.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...)"
            ) from None
        self._names = [name[: -len(".npy")] for name in members if name.endswith(".npy")]

    @property
    def has_train(self) -> bool:
        return "x_train" in self._names or "x_test" not in self._names

    @property
    def _reference(self) -> Part:
        return "train" if self.has_train else "test"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        return self._image_shape(self._reference)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        count = self._num_classes
        if count is None:
            self._require(self._reference)
            key = f"y_{self._reference}"
            labels = as_labels(self._read(key), self._what(key))
            count = int(labels.max()) + 1
            # Identifiers or the rare labels of a few samples: a guess would be wrong either way.
            if count > len(labels):
                raise UserError(
                    f"{self._what(key)} has {len(labels)} labels and one of them is {count - 1}: "
                    f"say how many classes there are with data.num_classes=K"
                )
        return tuple(str(label) for label in range(count))

    def open(self, part: Part) -> ArraySplit:
        self._require(part)
        x, y = f"x_{part}", f"y_{part}"
        shape = self._image_shape(part)
        split = array_split(
            self._read(x), self._read(y), self._what(x), self._what(y), len(self.classes)
        )
        if shape != self.shape:
            raise UserError(
                f"{self._what(x)} has images of shape {shape} and x_{self._reference} of "
                f"{self.shape} (C, H, W): store both in one size"
            )
        return split

    def _what(self, key: str) -> str:
        return f"{key} in '{self.path}'"

    def _require(self, part: Part) -> None:
        missing = [key for key in (f"x_{part}", f"y_{part}") if key not in self._names]
        if missing:
            there = ", ".join(sorted(self._names)) or "nothing"
            raise UserError(
                f"'{self.path}' has no {' and no '.join(missing)} (it holds: {there}): add what "
                f"is missing with np.savez, or name another file with data.path=FILE.npz"
            )

    def _image_shape(self, part: Part) -> tuple[int, int, int]:
        """(C, H, W), from the header of the array alone."""
        self._require(part)
        key = f"x_{part}"
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{key}.npy") as array:
                if np.lib.format.read_magic(array) == (1, 0):
                    shape = np.lib.format.read_array_header_1_0(array)[0]
                else:
                    shape = np.lib.format.read_array_header_2_0(array)[0]
        except DAMAGE as error:
            raise self._damaged(key, error) from None
        return image_shape(shape, self._what(key))

    def _read(self, key: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[key]
        except DAMAGE as error:
            raise self._damaged(key, error) from None

    def _damaged(self, key: str, error: Exception) -> UserError:
        if "allow_pickle" in str(error):
            return UserError(
                f"{self._what(key)} holds pickled Python objects, which can run code when they "
                f"are read: store a plain array of numbers"
            )
        reason = " ".join(str(error).split())
        return UserError(f"{self._what(key)} is damaged ({reason}): write or copy the file again")
