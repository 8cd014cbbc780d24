"""The data sets by name: what ``configs/data`` points at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np

from advbench.config.roles import Role
from advbench.data import torchvision_sets as published
from advbench.data.arrays import array_split
from advbench.data.augment import Augment
from advbench.data.base import Part, Source, Split, Splits
from advbench.data.extra import opener
from advbench.data.folder import FolderSource, ImageNetSource
from advbench.data.hold_out import hold_out
from advbench.data.npz import NpzSource
from advbench.data.torchvision_sets import TorchvisionSource


@dataclass(frozen=True, kw_only=True)
class DataSet(ABC):
    """The parameters of a data set; ``build`` makes its splits of them.

    A class has the name that configs and runs give it, such as ``cifar10``.
    """

    val: float = 0.1
    """Held out of the training part: below 1 a fraction, from 1 on a number of samples."""
    split_seed: int = 0
    """Which samples those are; independent of the seed of an experiment."""
    mean: list[float] | None = None
    """Per channel, in pixel units of [0, 1]; None takes the known values, else measures them."""
    std: list[float] | None = None
    """Per channel, in pixel units of [0, 1]; None takes the known values, else measures them."""
    augment: Augment = field(default_factory=Augment)
    """Of training batches."""
    extra: str | None = field(default=None, metadata={"role": Role.NAMES_FILE})
    """FILE.npz of further training images (``advbench.data.extra.read``)."""
    extra_fraction: float = 0.7
    """Share of every training batch that they are."""

    @abstractmethod
    def source(self) -> Source:
        """Where the images come from.

        Raises:
            UserError: for parameters out of range.
        """

    def build(self) -> Splits:
        """The training, validation and test part; each is read when it is first used.

        Raises:
            UserError: for parameters out of range.
        """
        return Splits(
            self.source(),
            val=self.val,
            split_seed=self.split_seed,
            mean=self.mean,
            std=self.std,
            augment=self.augment,
            extra=opener(self.extra),
            extra_fraction=self.extra_fraction,
        )


class DigitsSource(Source):
    """scikit-learn's 1797 handwritten digits, 8x8 gray (Alpaydin & Kaynak 1998, UCI).

    Values are v/16 for v = 0..16, exact in float32. The set has no split of its own; its 360 test
    samples are a fixed stratified draw.
    """

    name = "digits"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    @property
    def classes(self) -> tuple[str, ...]:
        return published.DIGIT_CLASSES

    def open(self, part: Part) -> Split:
        table = _digits_table()
        images, labels = table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(np.int64)
        complete = array_split(images, labels, "x of digits", "y of digits", 10)
        train, test = hold_out(complete.labels, 360, seed=0)
        return complete.subset(train if part == "train" else test)


def _digits_table() -> np.ndarray:
    """(1797, 65): a row of 64 pixel values 0..16, then the class, per image.

    It is the file that ``sklearn.datasets.load_digits`` reads. scikit-learn itself is not imported:
    its import takes longer than everything else that a short training on the digits does.
    """
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is a dependency"
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
    return np.loadtxt(file, delimiter=",")


class digits(DataSet):
    """scikit-learn's digits: 1437 + 360 images (1, 8, 8), 10 classes; nothing to download."""

    def source(self) -> Source:
        return DigitsSource()


@dataclass(frozen=True, kw_only=True)
class PublishedSet(DataSet):
    """A data set that torchvision reads and downloads."""

    known: ClassVar[published.Known]
    val: float = 1000
    """Held out of the training part: below 1 a fraction, from 1 on a number of samples."""
    root: str = field(default="data", metadata={"role": Role.PLACE | Role.EVALUATION})
    """The folder of the files."""
    download: bool = field(default=False, metadata={"role": Role.PLACE | Role.EVALUATION})
    """Fetch the files where they are missing."""

    def source(self) -> Source:
        return TorchvisionSource(self.known, self.root, self.download)


class mnist(PublishedSet):
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 images (1, 28, 28), 10 classes."""

    known = published.MNIST


@dataclass(frozen=True, kw_only=True)
class fashion_mnist(PublishedSet):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 images (1, 28, 28), 10 classes."""

    known = published.FASHION_MNIST
    augment: Augment = field(default_factory=partial(Augment, crop=2, flip=True))
    """Of training batches."""


@dataclass(frozen=True, kw_only=True)
class cifar10(PublishedSet):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32), 10 classes."""

    known = published.CIFAR10
    augment: Augment = field(default_factory=partial(Augment, crop=4, flip=True))
    """Of training batches."""


class cifar100(cifar10):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32), 100 fine classes."""

    known = published.CIFAR100


@dataclass(frozen=True, kw_only=True)
class svhn(PublishedSet):
    """SVHN, cropped (Netzer et al. 2011): 73,257 + 26,032 images (3, 32, 32), 10 classes."""

    known = published.SVHN
    augment: Augment = field(default_factory=partial(Augment, crop=4))
    """Of training batches."""


@dataclass(frozen=True, kw_only=True)
class FolderSet(DataSet):
    """Images in folders, one per class; read while they are used."""

    root: str = field(metadata={"role": Role.OUTCOME | Role.PLACE | Role.EVALUATION})
    """The folder."""
    size: int = 224
    """Pixels, the side of the square that the model sees."""
    resize: int | None = None
    """Pixels, the shorter side before evaluation cuts out the centre; None is ``size``."""
    crop_scale: list[float] | None = None
    """Smallest and largest share of the area of a random training crop; None crops nothing."""
    workers: int = field(default=4, metadata={"role": Role.RESOURCE})
    """Processes that read images, at most one per processor."""

    def folder(self, kind: type[FolderSource], name: str | None) -> Source:
        """The source of that ``kind``, with these parameters; ``name`` as for ``FolderSource``."""
        return kind(
            self.root,
            name=name,
            size=self.size,
            resize=self.resize,
            crop_scale=self.crop_scale,
            workers=self.workers,
        )


@dataclass(frozen=True, kw_only=True)
class imagefolder(FolderSet):
    """Your own images: ROOT/train/CLASS/FILE, and ROOT/test or ROOT/val. Gray becomes RGB."""

    name: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.PLACE})
    """What results call it; None is the name of the folder."""

    def source(self) -> Source:
        return self.folder(FolderSource, self.name)


@dataclass(frozen=True, kw_only=True)
class imagenet(FolderSet):
    """ImageNet, ILSVRC 2012 (Russakovsky et al. 2015): 1,281,167 + 50,000 images, 1000 classes.

    The published validation images are the test part; ``val`` is held out of the training images.
    """

    val: float = 10000
    """Held out of the training part: below 1 a fraction, from 1 on a number of samples."""
    augment: Augment = field(default_factory=partial(Augment, flip=True))
    """Of training batches, after the random crop."""
    root: str = "data/imagenet"
    """The folder."""
    resize: int | None = 256
    """Pixels, the shorter side before evaluation cuts out the centre."""
    crop_scale: list[float] | None = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest share of the area of a random training crop."""
    workers: int = 8
    """Processes that read images, at most one per processor."""

    def source(self) -> Source:
        return self.folder(ImageNetSource, "imagenet")


@dataclass(frozen=True, kw_only=True)
class npz(DataSet):
    """Your own arrays x_train, y_train, x_test, y_test, or one pair of them, in an .npz file."""

    path: str = field(metadata={"role": Role.PLACE | Role.EVALUATION})
    """The file."""
    name: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.PLACE})
    """What results call it; None is the name of the file."""
    num_classes: int | None = None
    """Number of classes, K; None is the largest label plus one."""

    def source(self) -> Source:
        return NpzSource(self.path, name=self.name, num_classes=self.num_classes)
