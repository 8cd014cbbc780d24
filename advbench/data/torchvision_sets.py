"""The sets that torchvision reads and downloads, with its errors said in one line."""

from __future__ import annotations

import http.client
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from advbench.data.arrays import array_split
from advbench.data.base import ArraySplit, Part, Source
from advbench.errors import UserError, reason_of

DIGIT_CLASSES = tuple("0123456789")
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

# What fetching, unpacking and reading raise for files that are missing, cut short or something
# else. torchvision says RuntimeError for a missing file and for a wrong checksum.
FAILURES = (
    AssertionError,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    http.client.HTTPException,
    pickle.UnpicklingError,
    tarfile.TarError,
    zlib.error,
)


class _OnePart:
    """torchvision verifies both parts of CIFAR to open one; here it reads only the one it opens."""

    root: Any
    train: bool
    base_folder: str
    train_list: list[list[str]]
    test_list: list[list[str]]

    def _check_integrity(self) -> bool:
        folder = Path(self.root) / self.base_folder
        files = self.train_list if self.train else self.test_list
        return all(check_integrity(folder / name, md5) for name, md5 in files)


class _Cifar10(_OnePart, datasets.CIFAR10):
    pass


class _Cifar100(_OnePart, datasets.CIFAR100):
    pass


class _Svhn(datasets.SVHN):
    """With the arguments, the names and the (N, H, W, C) of the other sets."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        super().__init__(root, split="train" if train else "test", download=download)
        self.data = self.data.transpose(0, 2, 3, 1)
        self.targets = self.labels


@dataclass(frozen=True)
class Known:
    """A published set."""

    name: str
    """Of the data set."""
    read: Callable[..., Any]
    """(root, train, download) -> an object with ``data`` (N, H, W, C) or (N, H, W) in uint8 and
    ``targets`` (N,)."""
    folder: str
    """Its files, under the root; ``{part}`` stands for train or test."""
    page: str
    """Where a person finds the files."""
    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    classes: tuple[str, ...]
    """A name for each label."""
    mean: tuple[float, ...]
    """Per channel over the training images, in pixel units of [0, 1]."""
    std: tuple[float, ...]
    """Per channel over the training images, in pixel units of [0, 1]."""


MNIST = Known(
    name="mnist",
    read=datasets.MNIST,
    folder="MNIST",
    page="http://yann.lecun.com/exdb/mnist",
    shape=(1, 28, 28),
    classes=DIGIT_CLASSES,
    mean=(0.1307,),
    std=(0.3081,),
)
FASHION_MNIST = Known(
    name="fashion_mnist",
    read=datasets.FashionMNIST,
    folder="FashionMNIST",
    page="https://github.com/zalandoresearch/fashion-mnist",
    shape=(1, 28, 28),
    classes=tuple(datasets.FashionMNIST.classes),
    mean=(0.2860,),
    std=(0.3530,),
)
CIFAR10 = Known(
    name="cifar10",
    read=_Cifar10,
    folder="cifar-10-batches-py",
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    shape=(3, 32, 32),
    classes=tuple(CIFAR10_CLASSES.split()),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Known(
    name="cifar100",
    read=_Cifar100,
    folder="cifar-100-python",
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    shape=(3, 32, 32),
    classes=tuple(CIFAR100_CLASSES.split()),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
SVHN = Known(
    name="svhn",
    read=_Svhn,
    folder="{part}_32x32.mat",
    page="http://ufldl.stanford.edu/housenumbers",
    shape=(3, 32, 32),
    classes=DIGIT_CLASSES,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
)


class TorchvisionSource(Source):
    """One of the sets above under ``root``, downloaded where that is asked for and needed."""

    def __init__(self, known: Known, root: str, download: bool) -> None:
        self.name = known.name
        self.moments = (known.mean, known.std)
        self._known = known
        self._root = Path(root).expanduser()
        self._download = download

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._known.shape

    @property
    def classes(self) -> tuple[str, ...]:
        return self._known.classes

    def open(self, part: Part) -> ArraySplit:
        try:
            data = self._read(part, download=False)
        except FAILURES as error:
            data = self._fetch(part, _one_line(error))
        x, y = np.asarray(data.data), np.asarray(data.targets)
        label = f"the {part} part of {self.name}"
        return array_split(x, y, f"x of {label}", f"y of {label}", len(self.classes))

    def _read(self, part: Part, download: bool) -> Any:
        return self._known.read(str(self._root), train=part == "train", download=download)

    def _fetch(self, part: Part, reason: str) -> Any:
        """Download what could not be read for that reason, or say what to do about it."""
        path = self._root / self._known.folder.format(part=part)
        damaged = UserError(
            f"{self.name} under '{self._root}' is incomplete or damaged ({reason}): "
            f"delete '{path}' and add data.download=true"
        )
        if not self._download:
            if path.exists():
                raise damaged
            raise UserError(
                f"{self.name} is not under '{self._root}': add data.download=true, "
                f"or say where it is with data.root=DIR"
            )
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            # The jobs of a sweep and the processes of one run may all find it missing.
            with FileLock(self._root / f".{self.name}.lock"):
                return self._read(part, download=True)
        except FAILURES as error:
            second = _one_line(error)
            if second == reason:  # torchvision takes the files for sound and did not fetch them
                raise damaged from None
            raise UserError(
                f"downloading {self.name} failed ({second}): try again later, "
                f"or put the files under '{self._root}' by hand, from {self._known.page}"
            ) from None


def _one_line(error: Exception) -> str:
    text = reason_of(error)
    if "File not found or corrupted" in text:
        return "what the server sent is not the file; often it is a web page that asks to log in"
    return text if len(text) <= 160 else f"{text[:157]}..."
