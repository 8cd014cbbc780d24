"""The user's own arrays in one ``.npz`` file."""

from __future__ import annotations

from functools import cached_property

from advbench.data.archive import Archive
from advbench.data.arrays import array_split, as_labels, image_shape
from advbench.data.base import ArraySplit, Part, Source
from advbench.errors import UserError

MOST_CLASSES = 10**6
"""More than any data set of images has."""


class NpzSource(Source):
    """Arrays ``x_train, y_train, x_test, y_test``, or one of the two pairs.

    Images are (N, H, W, C) or (N, H, W), uint8 or floats in [0, 1]; labels are (N,) integers.
    Each array is read when its part is opened.

    name: how results call the data; None is "npz:" and the name of the file.
    num_classes: at least 2; None is the largest label plus one, of the training part where there is
        one.
    """

    def __init__(self, path: str, name: str | None, num_classes: int | None) -> None:
        if num_classes is not None and not 2 <= num_classes <= MOST_CLASSES:
            raise UserError(
                f"data.num_classes={num_classes}: give a number from 2 to {MOST_CLASSES}, or null"
            )
        self._num_classes = num_classes
        self._file = Archive(path, "data.path", ("x_train", "y_train", "x_test", "y_test"))
        self.name = name or f"npz:{self._file.path.stem}"

    @property
    def has_train(self) -> bool:
        return "x_train" in self._file.names or "x_test" not in self._file.names

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
            source = self._file.what(key)
            labels = as_labels(self._file.read(key), source)
            lowest, count = int(labels.min()), int(labels.max()) + 1
            if self.has_train and (lowest > 0 or count < 2):
                raise UserError(
                    f"{source} has labels from {lowest} to {count - 1}: number the classes from 0, "
                    f"or say how many there are with data.num_classes=K"
                )
            # Identifiers or the rare labels of a few samples: a guess would be wrong either way.
            if count > len(labels):
                raise UserError(
                    f"{source} has {len(labels)} labels and one of them is "
                    f"{count - 1}: say how many classes there are with data.num_classes=K"
                )
        return tuple(str(label) for label in range(count))

    def open(self, part: Part) -> ArraySplit:
        x, y, file = f"x_{part}", f"y_{part}", self._file
        shape = self._image_shape(part)
        split = array_split(
            file.member(x), file.read(y), file.what(x), file.what(y), len(self.classes)
        )
        if shape != self.shape:
            raise UserError(
                f"{file.what(x)} has images of shape {shape} and x_{self._reference} of "
                f"{self.shape} (C, H, W): store both in one size"
            )
        return split

    def _require(self, part: Part) -> None:
        self._file.require(f"x_{part}", f"y_{part}")

    def _image_shape(self, part: Part) -> tuple[int, int, int]:
        """(C, H, W), from the header of the array alone."""
        self._require(part)
        return image_shape(self._file.shape(f"x_{part}"), self._file.what(f"x_{part}"))
