"""Clean and adversarial images side by side, for evaluations that kept them.

The clean images come from the data set itself, opened anew from the config of the evaluation on
this machine, and are used only if their hash is that of the evaluation.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from advbench import config
from advbench.errors import UserError
from advbench.report.collection import Entry
from advbench.report.style import CLEAN
from advbench.runs.directory import CONFIG

if TYPE_CHECKING:
    from advbench.data.base import Split

PICTURES = 6
DARKER, BRIGHTER = (0, 114, 178), (194, 80, 10)
LARGEST = 96
"""Longer side of an image in a page, in pixels; larger ones are reduced."""


@dataclass(frozen=True)
class Opened:
    """A test split that was found again, with the names of its classes."""

    split: Split
    names: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """(M,) classes of all samples of the split."""
        return self.split.labels.numpy()

    def image(self, sample: int) -> np.ndarray:
        """(H, W, C) in [0, 1]."""
        import torch

        x = self.split.fetch(torch.tensor([sample]), "cpu")[0][0]
        return x.permute(1, 2, 0).numpy()


class Library:
    """Data sets of evaluations, each opened once. Nothing is downloaded and no file of code run."""

    def __init__(self) -> None:
        self._known: dict[str, Opened | str] = {}

    def open(self, entry: Entry) -> Opened:
        """The test split of an evaluation. Raises UserError, saying why, if it is not available."""
        node = self._node(entry)
        key = repr((sorted(node.items()), entry.results.data.get("sha256")))
        if key not in self._known:
            try:
                self._known[key] = self._opened(node, entry)
            except (UserError, OSError) as problem:
                self._known[key] = str(problem)
        opened = self._known[key]
        if isinstance(opened, str):
            raise UserError(opened)
        return opened

    def _node(self, entry: Entry) -> dict[str, Any]:
        if not isinstance(entry.config.get("data"), Mapping):
            raise UserError("the evaluation does not say where its data are")
        node: Any = OmegaConf.create(dict(entry.config["data"]))
        trained = None if entry.training is None else config.read(entry.training / CONFIG)
        if node.get("_target_") is None and trained is None:
            raise UserError("the training run, which names the data, is not there any more")
        node = config.inherit(node, trained, "data")
        if "download" in node:
            node.download = False
        return config.plain(node)

    def _opened(self, node: Mapping[str, Any], entry: Entry) -> Opened:
        splits = config.build(OmegaConf.create(dict(node)), "data")
        if splits.test.sha256() != entry.results.data.get("sha256"):
            raise UserError("the data found here are not the evaluation's data")
        return Opened(splits.test, splits.info.classes)


@dataclass(frozen=True)
class Picture:
    """One broken sample. Images are (H, W, C) floats in [0, 1].

    truth, taken_for: names of classes.  distance: in the threat's norm.
    """

    sample: int
    clean: np.ndarray
    adversarial: np.ndarray
    truth: str
    taken_for: str
    distance: float

    @cached_property
    def delta(self) -> np.ndarray:
        return self.adversarial - self.clean


@dataclass(frozen=True)
class Gallery:
    """Pictures of one evaluation.

    factor: by which their perturbations are amplified where they are shown, the same for all: the
    largest change of a pixel spans the range.
    """

    pictures: tuple[Picture, ...]
    factor: float
    norm: str

    def change(self, picture: Picture) -> np.ndarray:
        """The amplified perturbation as an image (H, W, 3) in [0, 1].

        Of colour images around gray; of gray ones from DARKER over white to BRIGHTER.
        """
        change = np.clip(self.factor * picture.delta, -0.5, 0.5)
        if change.shape[-1] > 1:
            return 0.5 + change
        white = np.ones(3)
        ends = np.where(change < 0, np.array(DARKER), np.array(BRIGHTER)) / 255
        return white + 2 * np.abs(change) * (ends - white)

    @property
    def legend(self) -> str:
        """How ``change`` is to be read."""
        gray = all(picture.delta.shape[-1] == 1 for picture in self.pictures)
        how = "blue darker, orange brighter" if gray else "around gray"
        return f"perturbation times {self.factor:.3g} ({how})"


def gallery(entry: Entry, opened: Opened) -> Gallery | None:
    """A few broken samples, of as many classes as there are; None if no image was kept.

    Raises UserError for images that are not those of the evaluation.
    """
    from advbench.evaluation.store import read_images

    if (saved := read_images(entry.folder)) is None:
        return None
    shown = np.nan_to_num(saved.x.transpose(0, 2, 3, 1)).clip(0, 1)
    images = dict(zip(saved.ids.tolist(), shown, strict=True))
    changes: dict[int, tuple[int, float]] = {}
    for name, stage in entry.records.items():
        if name != CLEAN:
            rows = np.flatnonzero(stage.alone)
            for sample, label, size in zip(
                stage.sample[rows], stage.label[rows], stage.distance[rows], strict=True
            ):
                changes.setdefault(int(sample), (int(label), float(size)))
    labels = opened.labels
    chosen = _varied([sample for sample in images if sample in changes], labels)
    pictures = []
    for sample in chosen:
        clean = opened.image(sample)
        if clean.shape != images[sample].shape:
            raise UserError(f"the images of '{entry.folder}' have another size than the data")
        label, distance = changes[sample]
        truth, predicted = (class_name(opened.names, int(k)) for k in (labels[sample], label))
        pictures.append(Picture(sample, clean, images[sample], truth, predicted, distance))
    if not pictures:
        return None
    largest = max(float(np.abs(picture.delta).max()) for picture in pictures)
    return Gallery(tuple(pictures), 0.5 / max(largest, 1e-6), entry.results.threat["norm"])


def class_name(names: Sequence[str], label: int) -> str:
    """The name of a class, or its number."""
    return names[label] if 0 <= label < len(names) else str(label)


def _varied(samples: Sequence[int], labels: np.ndarray) -> list[int]:
    """PICTURES of the samples, one of each class before the second of any, sorted by class."""
    counts: Counter[int] = Counter()
    ranked = []
    for sample in sorted(s for s in samples if 0 <= s < len(labels)):
        label = int(labels[sample])
        ranked.append((counts[label], label, sample))
        counts[label] += 1
    return [sample for _, _, sample in sorted(sorted(ranked)[:PICTURES], key=lambda r: r[1:])]


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] (H, W, C) as bytes; one channel becomes (H, W)."""
    pixels = np.round(255 * image).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]


def png(image: np.ndarray) -> str:
    """An image in [0, 1], (H, W, C), as a data URI; none larger than LARGEST."""
    from PIL import Image

    picture = Image.fromarray(to_uint8(image))
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
