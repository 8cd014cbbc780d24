"""Small made-up data sets in the formats of the published ones, and what they hold."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import Tensor

from advbench.data import sources, torchvision_sets
from advbench.data.base import Split, Splits
from advbench.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs" / "data"
# "run" is no data set: evaluation replaces it with the data of the run.
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "run")


@dataclass
class Made:
    """A small data set in the format of a published one, and what it holds (uint8, NHWC)."""

    kwargs: dict[str, Any]
    num_classes: int
    x: dict[str, np.ndarray] = field(default_factory=dict)
    y: dict[str, np.ndarray] = field(default_factory=dict)

    def fill(self, shape: tuple[int, ...], train: int, test: int) -> Made:
        rng = np.random.default_rng(0)
        for part, count in (("train", train), ("test", test)):
            self.x[part] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
            self.y[part] = rng.permutation(np.arange(count) % self.num_classes)
        return self


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST: two zeros, type 8 (unsigned byte), dimensions, big-endian sizes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def make_mnist(root: Path, folder: str) -> Made:
    made = Made({"root": str(root), "val": 0.25}, 10).fill((28, 28), 40, 12)
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(made.x[part]))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(made.y[part]))
    return made


def make_cifar(root: Path, patch: pytest.MonkeyPatch, known: Any) -> Made:
    """CIFAR's pickles, with the checksums of these instead of the published ones."""
    fine = known is torchvision_sets._Cifar100
    classes = 100 if fine else 10
    made = Made({"root": str(root), "val": 0.25}, classes).fill((32, 32, 3), 20 * classes, 100)
    folder = root / known.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for part, files in (("train", known.train_list), ("test", known.test_list)):
        listed = []
        for number, rows in enumerate(np.array_split(np.arange(len(made.y[part])), len(files))):
            data = made.x[part][rows].transpose(0, 3, 1, 2).reshape(len(rows), -1)
            key = "fine_labels" if fine else "labels"
            name = files[number][0]
            listed.append([name, write(name, {"data": data, key: made.y[part][rows].tolist()})])
        patch.setattr(known, f"{part}_list", listed)
    names = {known.meta["key"]: [str(label) for label in range(classes)]}
    md5 = write(known.meta["filename"], names)
    patch.setattr(known, "meta", {**known.meta, "md5": md5})
    return made


def make_svhn(root: Path, patch: pytest.MonkeyPatch) -> Made:
    """SVHN's .mat files: (H, W, C, N), labels (N, 1) in which 10 stands for the digit 0."""
    made = Made({"root": str(root), "val": 0.25}, 10).fill((32, 32, 3), 40, 12)
    listed = {}
    for part in ("train", "test"):
        path = root / f"{part}_32x32.mat"
        y = np.where(made.y[part] == 0, 10, made.y[part]).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": made.x[part].transpose(1, 2, 3, 0), "y": y})
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        listed[part] = [f"http://nowhere.invalid/{path.name}", path.name, md5]
    patch.setattr(torchvision_sets._Svhn, "split_list", listed)
    return made


def make_folder(root: Path, made: Made, test: str) -> Made:
    for part, folder in (("train", "train"), ("test", test)):
        # Read back class by class, so that is how the arrays are sorted.
        order = np.argsort(made.y[part], kind="stable")
        made.x[part], made.y[part] = made.x[part][order], made.y[part][order]
        for number, (image, label) in enumerate(zip(made.x[part], made.y[part], strict=True)):
            path = root / folder / f"n{label:04d}" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return made


def make_imagenet(root: Path) -> Made:
    kwargs = {"root": str(root), "val": 0.5, "size": 8, "resize": 8, "workers": 0}
    return make_folder(root, Made(kwargs, 1000).fill((8, 8, 3), 2000, 1000), "val")


def make_imagefolder(root: Path) -> Made:
    kwargs = {"root": str(root), "val": 0.25, "size": 12, "workers": 0}
    return make_folder(root, Made(kwargs, 4).fill((12, 12, 3), 40, 12), "test")


def make_npz(root: Path) -> Made:
    path = root / "own.npz"
    made = Made({"path": str(path), "val": 0.25}, 5).fill((6, 7, 3), 40, 12)
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        arrays |= {f"x_{part}": made.x[part], f"y_{part}": made.y[part]}
    np.savez(path, **arrays)
    return made


MAKERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Made]] = {
    "digits": lambda root, patch: Made({}, 10),
    "mnist": lambda root, patch: make_mnist(root, "MNIST"),
    "fashion_mnist": lambda root, patch: make_mnist(root, "FashionMNIST"),
    "cifar10": lambda root, patch: make_cifar(root, patch, torchvision_sets._Cifar10),
    "cifar100": lambda root, patch: make_cifar(root, patch, torchvision_sets._Cifar100),
    "svhn": lambda root, patch: make_svhn(root, patch),
    "imagenet": lambda root, patch: make_imagenet(root),
    "imagefolder": lambda root, patch: make_imagefolder(root),
    "npz": lambda root, patch: make_npz(root),
}
COPIED = [name for name in NAMES if name != "digits"]
STREAMED = ["imagefolder", "imagenet"]
TORCHVISION = ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"]


def build(name: str, made: Made, **overrides: Any) -> Splits:
    return getattr(sources, name)(**{**made.kwargs, **overrides}).build()


def everything(split: Split) -> Tensor:
    return split.fetch(torch.arange(len(split)), "cpu")[0]


def as_float(x: np.ndarray) -> Tensor:
    """uint8 NHWC or NHW -> float32 NCHW, by NumPy's division."""
    x = x[..., None] if x.ndim == 3 else x
    return torch.from_numpy(x.astype(np.float32) / np.float32(255)).permute(0, 3, 1, 2)


def rows(x: Tensor) -> Counter[bytes]:
    return Counter(row.contiguous().numpy().tobytes() for row in x)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


def damage_test_part(name: str, made: Made) -> None:
    """Overwrite the content of every test file; what is not opened is not missed."""
    if name == "npz":
        path = Path(made.kwargs["path"])
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as file:
            for key in ("x_test.npy", "y_test.npy"):
                # Behind the local header (30 bytes, the name, an extra field).
                start = file.getinfo(key).header_offset + 30
                data[start + len(key) : start + 200] = b"\xff" * (200 - len(key))
        path.write_bytes(data)
        return
    root = Path(made.kwargs["root"])
    patterns = ("t10k-*", "test_*", "test", "test/*/*", "val/*/*")
    files = [path for pattern in patterns for path in root.rglob(pattern) if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"not what it was")
