"""The data sets by name: what ``configs/data`` points at.

Common to all: ``val``, ``split_seed``, ``mean``, ``std``, ``augment`` and ``extra_fraction`` of
``advbench.data.base.Splits``, and ``extra``, the file that ``advbench.data.extra.read`` reads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sklearn.datasets import load_digits

from advbench.data import torchvision_sets as known
from advbench.data.arrays import array_split
from advbench.data.augment import Augment
from advbench.data.base import Part, Source, Split, Splits, hold_out
from advbench.data.extra import opener
from advbench.data.folder import FolderSource, ImageNetSource
from advbench.data.npz import NpzSource
from advbench.data.torchvision_sets import TorchvisionSource

PLAIN = Augment()
FLIP = Augment(flip=True)
CROP = Augment(crop=4)
CROP_FLIP = Augment(crop=4, flip=True)
CROP_2_FLIP = Augment(crop=2, flip=True)
INCEPTION_CROP = [0.08, 1.0]


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
        return known.DIGIT_CLASSES

    def open(self, part: Part) -> Split:
        pixels, labels = load_digits(return_X_y=True)
        images = pixels.reshape(-1, 8, 8) / 16
        whole = array_split(images, labels, "x of digits", "y of digits", 10)
        train, test = hold_out(whole.labels, 360, seed=0)
        return whole.subset(train if part == "train" else test)


def _splits(
    source: Source,
    *,
    val: float,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    return Splits(
        source,
        val=val,
        split_seed=split_seed,
        mean=mean,
        std=std,
        augment=augment,
        extra=opener(extra),
        extra_fraction=extra_fraction,
    )


def _data_set(val: float, augment: Augment) -> Callable[[Callable[..., Source]], Any]:
    """Of a function that opens a source, one that returns ``Splits``; with the parameters of both.

    val, augment: the defaults of these two for this data set.
    """
    chosen = {"val": val, "augment": augment}
    shared = [
        parameter.replace(default=chosen.get(name, parameter.default))
        for name, parameter in list(inspect.signature(_splits).parameters.items())[1:]
    ]

    def with_splits(open_source: Callable[..., Source]) -> Any:
        own = inspect.signature(open_source)

        @functools.wraps(open_source)
        def data_set(**given: Any) -> Splits:
            mine = {key: given.pop(key) for key in own.parameters if key in given}
            return _splits(open_source(**mine), **{**chosen, **given})

        # What a config may say, and of which type, is read from these.
        data_set.__signature__ = own.replace(  # pyright: ignore[reportAttributeAccessIssue]
            parameters=[*own.parameters.values(), *shared], return_annotation=Splits
        )
        data_set.__annotations__ = {**_splits.__annotations__, **data_set.__annotations__}
        del data_set.__annotations__["source"]
        data_set.__annotations__["return"] = Splits
        return data_set

    return with_splits


@_data_set(val=0.1, augment=PLAIN)
def digits() -> Source:
    """scikit-learn's digits: 1437 + 360 images (1, 8, 8), 10 classes; nothing to download."""
    return DigitsSource()


@_data_set(val=1000, augment=PLAIN)
def mnist(*, root: str = "data", download: bool = False) -> Source:
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 images (1, 28, 28), 10 classes."""
    return TorchvisionSource(known.MNIST, root, download)


@_data_set(val=1000, augment=CROP_2_FLIP)
def fashion_mnist(*, root: str = "data", download: bool = False) -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 images (1, 28, 28), 10 classes."""
    return TorchvisionSource(known.FASHION_MNIST, root, download)


@_data_set(val=1000, augment=CROP_FLIP)
def cifar10(*, root: str = "data", download: bool = False) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32), 10 classes."""
    return TorchvisionSource(known.CIFAR10, root, download)


@_data_set(val=1000, augment=CROP_FLIP)
def cifar100(*, root: str = "data", download: bool = False) -> Source:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32), 100 fine classes."""
    return TorchvisionSource(known.CIFAR100, root, download)


@_data_set(val=1000, augment=CROP)
def svhn(*, root: str = "data", download: bool = False) -> Source:
    """SVHN, cropped (Netzer et al. 2011): 73,257 + 26,032 images (3, 32, 32), 10 classes."""
    return TorchvisionSource(known.SVHN, root, download)


@_data_set(val=10000, augment=FLIP)
def imagenet(
    *,
    root: str = "data/imagenet",
    size: int = 224,
    resize: int | None = 256,
    crop_scale: list[float] | None = INCEPTION_CROP,
    workers: int = 8,
) -> Source:
    """ImageNet, ILSVRC 2012 (Russakovsky et al. 2015): 1,281,167 + 50,000 images, 1000 classes.

    The published validation images are the test part; ``val`` is held out of the training images.
    """
    return ImageNetSource(
        root, name="imagenet", size=size, resize=resize, crop_scale=crop_scale, workers=workers
    )


@_data_set(val=0.1, augment=PLAIN)
def imagefolder(
    *,
    root: str,
    name: str | None = None,
    size: int = 224,
    resize: int | None = None,
    crop_scale: list[float] | None = None,
    workers: int = 4,
) -> Source:
    """Your own images: ROOT/train/CLASS/FILE, and ROOT/test or ROOT/val. Gray becomes RGB."""
    return FolderSource(
        root, name=name, size=size, resize=resize, crop_scale=crop_scale, workers=workers
    )


@_data_set(val=0.1, augment=PLAIN)
def npz(*, path: str, name: str | None = None, num_classes: int | None = None) -> Source:
    """Your own arrays x_train, y_train, x_test, y_test, or one pair of them, in an .npz file."""
    return NpzSource(path, name=name, num_classes=num_classes)
