"""The data sets by name: what ``configs/data`` points at.

Common to all: ``val``, ``split_seed``, ``mean``, ``std``, ``augment`` and ``extra_fraction`` of
``advbench.data.base.Splits``, and ``extra``, the file that ``advbench.data.extra.read`` reads.
"""

from __future__ import annotations

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


def digits(
    *,
    val: float = 0.1,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = PLAIN,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """scikit-learn's digits: 1437 + 360 images (1, 8, 8), 10 classes; nothing to download."""
    return Splits(
        DigitsSource(),
        val=val,
        split_seed=split_seed,
        mean=mean,
        std=std,
        augment=augment,
        extra=opener(extra),
        extra_fraction=extra_fraction,
    )


def mnist(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 1000,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = PLAIN,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 images (1, 28, 28), 10 classes."""
    source = TorchvisionSource(known.MNIST, root, download)
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


def fashion_mnist(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 1000,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = CROP_2_FLIP,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 images (1, 28, 28), 10 classes."""
    source = TorchvisionSource(known.FASHION_MNIST, root, download)
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


def cifar10(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 1000,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = CROP_FLIP,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32), 10 classes."""
    source = TorchvisionSource(known.CIFAR10, root, download)
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


def cifar100(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 1000,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = CROP_FLIP,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32), 100 fine classes."""
    source = TorchvisionSource(known.CIFAR100, root, download)
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


def svhn(
    *,
    root: str = "data",
    download: bool = False,
    val: float = 1000,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = CROP,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """SVHN, cropped (Netzer et al. 2011): 73,257 + 26,032 images (3, 32, 32), 10 classes."""
    source = TorchvisionSource(known.SVHN, root, download)
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


def imagenet(
    *,
    root: str = "data/imagenet",
    size: int = 224,
    resize: int | None = 256,
    crop_scale: list[float] | None = INCEPTION_CROP,
    workers: int = 8,
    val: float = 10000,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = FLIP,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """ImageNet, ILSVRC 2012 (Russakovsky et al. 2015): 1,281,167 + 50,000 images, 1000 classes.

    The published validation images are the test part; ``val`` is held out of the training images.
    """
    source = ImageNetSource(
        root, name="imagenet", size=size, resize=resize, crop_scale=crop_scale, workers=workers
    )
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


def imagefolder(
    *,
    root: str,
    name: str | None = None,
    size: int = 224,
    resize: int | None = None,
    crop_scale: list[float] | None = None,
    workers: int = 4,
    val: float = 0.1,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = PLAIN,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """Your own images: ROOT/train/CLASS/FILE, and ROOT/test or ROOT/val. Gray becomes RGB."""
    source = FolderSource(
        root, name=name, size=size, resize=resize, crop_scale=crop_scale, workers=workers
    )
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


def npz(
    *,
    path: str,
    name: str | None = None,
    num_classes: int | None = None,
    val: float = 0.1,
    split_seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    augment: Augment = PLAIN,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """Your own arrays x_train, y_train, x_test, y_test, or one pair of them, in an .npz file."""
    source = NpzSource(path, name=name, num_classes=num_classes)
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
