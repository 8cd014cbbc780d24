"""The base of data sets: a source opens parts, ``Splits`` holds out a validation part."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from advbench.data.augment import Augment
from advbench.data.hold_out import hold_out
from advbench.errors import UserError

Part = Literal["train", "test"]
Device = torch.device | str


def to_unit(images: Tensor) -> Tensor:
    """uint8 in [0, 255] or float32 in [0, 1] -> float32 in [0, 1], on the same device."""
    if images.dtype != torch.uint8:
        return images
    # By a tensor on the device: CUDA turns division by a Python number into multiplication with
    # its reciprocal, and pixels would differ from those of the CPU in the last bit.
    return images.float().div_(torch.full((), 255.0, device=images.device))


def place(device: Device) -> torch.device:
    """The device with its number: "cuda" and "cuda:0" are one place."""
    return torch.empty(0, device=device).device


def filled_batches(order: Tensor, size: int) -> Tensor:
    """An order of sample ids, (N,), cut into batches: (M, size). The last is filled up from the
    order's beginning.
    """
    total = len(order)
    return order[torch.arange(-(-total // size) * size) % total].view(-1, size)


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """Of images and labels in memory or in a mapped file, on the CPU, in their order and layout."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    digest.update(images.numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


class Split(ABC):
    """One split of a data set: N labelled images."""

    labels: Tensor
    """(N,) int64 in [0, K), on the CPU."""
    moment_images: ClassVar[int] = sys.maxsize
    """How many images, evenly spaced over the split, ``moments`` looks at."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batches(
        self, order: Tensor, batch_size: int, device: Device, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (B, C, H, W) float32 in [0, 1] and labels (B,) int64.

        Args:
            order: (M,) int64, the samples in the order in which they come.
            batch_size: B; the last batch may be short.
            device: where the batches lie.
            seed: a number per epoch that keys the random crops of data augmented while it is read;
                None reads every image as evaluation does. Arrays have no such crops and ignore it:
                ``Splits.augment`` is for all data, after this.
        """

    @abstractmethod
    def fetch(self, index: Tensor, device: Device) -> tuple[Tensor, Tensor]:
        """The samples ``index`` (B,), in that order, as evaluation reads them: one batch on
        ``device``, images (B, C, H, W) float32 in [0, 1] and labels (B,) int64.
        """

    @abstractmethod
    def sha256(self) -> str:
        """A fingerprint of images, labels and their order, the same in every process."""

    @abstractmethod
    def subset(self, index: Tensor | Sequence[int]) -> Split:
        """A split of its own with the samples ``index``, in that order."""

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel over all pixels, in units of [0, 1]."""
        count = min(len(self), self.moment_images)
        order = torch.arange(count) * len(self) // count
        sums, squares, pixels = 0.0, 0.0, 0
        for chunk in order.split(500):
            x = self.fetch(chunk, "cpu")[0].double()
            sums = sums + x.sum((0, 2, 3))
            squares = squares + x.square().sum((0, 2, 3))
            pixels += x.numel() // x.shape[1]
        mean = torch.as_tensor(sums) / pixels
        return _mean_and_std(mean, torch.as_tensor(squares) / pixels - mean.square())


def _mean_and_std(mean: Tensor, variance: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # A channel without variation is left at its scale.
    std = torch.where(variance > 1e-12, variance.clamp(min=0).sqrt(), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


class ArraySplit(Split):
    """A split in memory, which moves to a device once and stays there.

    Args:
        images: (N, C, H, W), uint8 in [0, 255] or float32 in [0, 1], on the CPU.
        labels: (N,) int64, on the CPU.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.contiguous()
        self.labels = labels
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: Device) -> tuple[Tensor, Tensor]:
        target_device = place(device)
        if target_device not in self._copies:
            self._copies[target_device] = (
                self.images.to(target_device),
                self.labels.to(target_device),
            )
        return self._copies[target_device]

    def batches(
        self, order: Tensor, batch_size: int, device: Device, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in order.to(device).split(batch_size):
            yield self.fetch(chunk, device)

    def fetch(self, index: Tensor, device: Device) -> tuple[Tensor, Tensor]:
        images, labels = self._on(device)
        index = index.to(images.device)
        return to_unit(images.index_select(0, index)), labels.index_select(0, index)

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.images.dtype != torch.uint8:
            return super().moments()
        # Counting the 256 values is twenty times as fast as adding up 150 million pixels.
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in self.images.unbind(1)]
        )
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        return _mean_and_std(mean, (share * (values - mean[:, None]).square()).sum(1))

    def sha256(self) -> str:
        return fingerprint(self.images, self.labels)

    def subset(self, index: Tensor | Sequence[int]) -> ArraySplit:
        index = torch.as_tensor(index, dtype=torch.int64)
        return ArraySplit(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Info:
    """What a model must know of its data."""

    name: str
    """Of the data set."""
    num_classes: int
    """Number of classes, K."""
    input_shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    mean: tuple[float, ...]
    """Per channel, in pixel units of [0, 1]."""
    std: tuple[float, ...]
    """Per channel, in pixel units of [0, 1]."""
    classes: tuple[str, ...]
    """A name for each label."""
    notes: tuple[str, ...] = ()
    """What its user should know of how it was read, a line each."""


class Source(ABC):
    """Where a data set comes from. It opens one part at a time, and only when asked."""

    name: str
    """Of the data set, in results and messages."""
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation per channel, in pixel units of [0, 1]; None where they are not
    known."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), without opening the test part where there is a training part."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """A name for each label, without opening the test part where there is a training part."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its user should know of how it was read, a line each."""
        return ()

    @property
    def has_train(self) -> bool:
        return True

    @abstractmethod
    def open(self, part: Part) -> Split:
        """Read ``part``, ``train`` or ``test``.

        Raises:
            UserError: where it is missing, damaged or wrong.
        """


class Splits:
    """A data set: ``train``, ``val`` and ``test``, each read when it is first touched.

    The validation part is held out of the training part, stratified, and depends on the
    arguments here alone. The test part is opened by touching ``test`` and by nothing else, except
    that a source without a training part has nothing else to learn its ``info`` from.

    Args:
        source: opens the training and the test part.
        val: below 1 the fraction, from 1 on the number of training samples that are held out.
        split_seed: which ones, in [0, 2**32); independent of the seed of an experiment.
        mean: per channel, in pixel units of [0, 1]; None takes the known values of a known set,
            else those of ``train``, else (evaluation data alone) 0, which means no normalisation.
        std: per channel, as ``mean``; the last resort is 1.
        augment: of training batches; an object, or a config node with its keys.
        extra: opens further training images that fit such an ``Info`` (``advbench.data.extra``);
            called when ``extra`` is first touched.
        extra_fraction: which share of every training batch they are, in [0, 1); 0 leaves them away.

    Raises:
        UserError: for a value out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        val: float,
        split_seed: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augment: Augment | Mapping[str, Any],
        extra: Callable[[Info], Split] | None = None,
        extra_fraction: float = 0.7,
    ) -> None:
        val = float(val)
        if not val > 0 or (val >= 1 and not val.is_integer()):
            raise UserError(
                f"data.val={val:g} is neither a fraction like 0.1 nor a number of samples like 1000"
            )
        if not 0 <= split_seed < 2**32:
            raise UserError(f"data.split_seed={split_seed} is not between 0 and 2**32 - 1")
        if not 0 <= extra_fraction < 1:
            raise UserError(
                f"data.extra_fraction={extra_fraction:g} is the share of extra images in a batch: "
                f"give at least 0 and less than 1"
            )
        self.augment = Augment.of(augment)
        self.extra_fraction = extra_fraction
        self._extra = extra
        self._source = source
        self._val = val
        self._split_seed = split_seed
        self._mean = mean
        self._std = std

    @cached_property
    def _parts(self) -> tuple[Split, Split]:
        complete = self._source.open("train")
        count = max(1, round(self._val * len(complete))) if self._val < 1 else int(self._val)
        if count >= len(complete):
            raise UserError(
                f"data.val={self._val:g} leaves nothing to train on: the training split of "
                f"{self._source.name} has {len(complete)} samples"
            )
        try:
            rest, held_out = hold_out(complete.labels, count, self._split_seed)
        except UserError as problem:
            raise UserError(f"data.val={self._val:g}: in {self._source.name} {problem}") from None
        return complete.subset(rest), complete.subset(held_out)

    @property
    def has_train(self) -> bool:
        """Whether there are training images."""
        return self._source.has_train

    @property
    def train(self) -> Split:
        return self._parts[0]

    @property
    def val(self) -> Split:
        return self._parts[1]

    @cached_property
    def test(self) -> Split:
        return self._source.open("test")

    @cached_property
    def extra(self) -> Split | None:
        """Further images to train on, and for nothing else: the size and classes of ``train``.

        Raises:
            UserError: where the file does not hold such images.
        """
        if self._extra is None or self.extra_fraction == 0:
            return None
        return self._extra(self.info)

    def fingerprints(self) -> dict[str, str]:
        """Of everything that a training sees, by part; the test part is not opened."""
        parts = {"train": self.train, "val": self.val, "extra": self.extra}
        return {name: part.sha256() for name, part in parts.items() if part is not None}

    def augmented(
        self, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A training batch as the model is to see it: x, y, and soft labels where there are any.

        Args:
            x: images in [0, 1], (B, C, H, W).
            y: classes, (B,).
            generator: on the device of ``x``; one state of it gives one result.

        Returns:
            x, y and, if CutMix is on, (B, K) the share of each class, else None; y is then the
            class with most of the image. Attacks inside recipes take y, cross-entropy the shares
            (ours; Rebuffi et al. 2021 attack the divergence from the shares).
        """
        x = self.augment(x, generator)
        return self.augment.mix(x, y, self.info.num_classes, generator)

    @cached_property
    def info(self) -> Info:
        source = self._source
        channels = source.shape[0]
        return Info(
            name=source.name,
            num_classes=len(source.classes),
            input_shape=source.shape,
            mean=self._per_channel("mean", self._mean, channels),
            std=self._per_channel("std", self._std, channels),
            classes=source.classes,
            notes=source.notes,
        )

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self._source.moments is not None:
            return self._source.moments
        if self._source.has_train:
            return self.train.moments()
        channels = self._source.shape[0]
        return (0.0,) * channels, (1.0,) * channels

    def _per_channel(
        self, name: Literal["mean", "std"], values: Sequence[float] | None, channels: int
    ) -> tuple[float, ...]:
        if values is None:
            return self._moments[name == "std"]
        if len(values) != channels:
            raise UserError(
                f"data.{name} has {len(values)} values and {self._source.name} has {channels} "
                f"channels: give one per channel, or null"
            )
        if name == "std" and min(values) <= 0:
            raise UserError(f"data.std={list(values)}: images are divided by it, give numbers > 0")
        return tuple(float(value) for value in values)
