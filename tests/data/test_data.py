"""Data sets: one table of small made-up sets, and generic tests over all of it."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import math
import pickle
import random
import re
import tarfile
import typing
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from advbench.data import arrays, sources, torchvision_sets
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Split, Splits, hold_out, to_unit
from advbench.data.stream import random_box
from advbench.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """The made-up set of that name; written once, and not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        known: dict[str, Made] = {}

        def get(name: str) -> Made:
            if name not in known:
                known[name] = MAKERS[name](tmp_path_factory.mktemp(name), patch)
            return known[name]

        yield get


def build(name: str, made: Made, **overrides: Any) -> Splits:
    return getattr(sources, name)(**{**made.kwargs, **overrides})


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


# --- the configs ----------------------------------------------------------------------------


def test_every_config_has_a_source_and_a_made_up_set() -> None:
    assert len(NAMES) == 9
    assert sorted(MAKERS) == NAMES
    assert len(COPIED) == 8


@pytest.mark.parametrize("name", NAMES)
def test_config_writes_out_the_signature_and_its_values(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    command, description = text.splitlines()[:2]
    assert command.startswith(f"# advbench train data={name}")
    assert description.startswith("# ") and len(description) <= 100
    config = OmegaConf.create(text)
    assert isinstance(config, type(OmegaConf.create({})))
    factory = getattr(sources, name)
    assert config.pop("_target_") == f"{factory.__module__}.{factory.__name__}"
    parameters = inspect.signature(factory).parameters
    assert list(config) == list(parameters)
    # OmegaConf takes every annotation, and every value fits its own.
    hints = typing.get_type_hints(factory)
    schema = make_dataclass("Schema", [(key, hints[key]) for key in parameters])
    merged = OmegaConf.merge(OmegaConf.structured(schema), config)
    assert OmegaConf.to_object(merged.augment) == Augment.of(config.augment)
    known = getattr(torchvision_sets, name.upper()) if name in TORCHVISION else None
    for key, parameter in parameters.items():
        value: Any = None if OmegaConf.is_missing(config, key) else config[key]
        if OmegaConf.is_missing(config, key):
            assert parameter.default is inspect.Parameter.empty
        elif key == "augment":
            assert Augment.of(value) == parameter.default
        elif key in ("mean", "std") and known is not None:
            assert tuple(value) == getattr(known, key)
        elif not (key in ("mean", "std") and name == "imagenet"):
            assert value == parameter.default, key
    if name == "imagenet":
        assert (tuple(config.mean), tuple(config.std)) == sources.ImageNetSource.moments


def test_class_names() -> None:
    assert len(set(torchvision_sets.CIFAR100.classes)) == 100
    assert list(torchvision_sets.CIFAR100.classes) == sorted(torchvision_sets.CIFAR100.classes)
    for name in TORCHVISION:
        known = getattr(torchvision_sets, name.upper())
        assert known.name == name and len(known.mean) == len(known.std) == known.shape[0]


# --- all sources ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_splits_and_info(name: str, made: Callable[[str], Made]) -> None:
    data = build(name, made(name))
    info = data.info
    assert info.num_classes == made(name).num_classes == len(info.classes)
    assert len(info.mean) == len(info.std) == info.input_shape[0]
    assert all(0 < value < 1 for value in info.mean) and all(0 < value <= 1 for value in info.std)
    for split in (data.train, data.val, data.test):
        assert split.labels.dtype == torch.int64 and split.labels.shape == (len(split),)
        assert split.labels.min() >= 0 and split.labels.max() < info.num_classes
        x, y = split.fetch(torch.arange(3), "cpu")
        assert x.dtype == torch.float32 and x.shape == (3, *info.input_shape)
        assert x.min() >= 0 and x.max() <= 1
        assert torch.equal(y, split.labels[:3])


@pytest.mark.parametrize("name", COPIED)
def test_pixels_and_labels_arrive_as_they_were_written(
    name: str, made: Callable[[str], Made]
) -> None:
    data = build(name, made(name))
    want = made(name)
    assert torch.equal(everything(data.test), as_float(want.x["test"]))
    assert data.test.labels.tolist() == want.y["test"].tolist()
    assert rows(everything(data.train)) + rows(everything(data.val)) == rows(
        as_float(want.x["train"])
    )
    assert Counter(data.train.labels.tolist()) + Counter(data.val.labels.tolist()) == Counter(
        want.y["train"].tolist()
    )


@pytest.mark.parametrize("name", NAMES)
def test_validation_part_is_stratified_and_depends_on_the_config_alone(
    name: str, made: Callable[[str], Made]
) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    data = build(name, made(name))
    torch.manual_seed(2)
    np.random.seed(2)
    again = build(name, made(name))
    assert data.val.sha256() == again.val.sha256()
    assert data.train.sha256() == again.train.sha256()
    assert build(name, made(name), split_seed=1).val.sha256() != data.val.sha256()
    in_val, in_train = data.val.labels.bincount(), data.train.labels.bincount()
    share = len(data.val) / (len(data.val) + len(data.train))
    assert ((in_val - share * (in_val + in_train)).abs() < 1).all()
    assert len(build(name, made(name), val=7).val) == 7


@pytest.mark.parametrize("name", NAMES)
def test_batches_keep_the_order_and_end_short(name: str, made: Callable[[str], Made]) -> None:
    split = build(name, made(name)).test
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:11]
    batches = list(split.batches(order, 4, "cpu"))
    assert [len(x) for x, _ in batches] == [4, 4, 3]
    x, y = split.fetch(order, "cpu")
    assert torch.equal(torch.cat([x for x, _ in batches]), x)
    assert torch.equal(torch.cat([y for _, y in batches]), y)
    assert torch.equal(x, everything(split)[order]) and torch.equal(y, split.labels[order])
    repeated = split.fetch(torch.tensor([5, 5, 0]), "cpu")[0]
    assert torch.equal(repeated[0], repeated[1]) and not torch.equal(repeated[0], repeated[2])


@pytest.mark.parametrize("name", NAMES)
def test_subset_and_fingerprint(name: str, made: Callable[[str], Made]) -> None:
    split = build(name, made(name)).test
    part = split.subset([4, 1, 7])
    assert len(part) == 3 and torch.equal(everything(part), everything(split)[[4, 1, 7]])
    assert part.labels.tolist() == split.labels[[4, 1, 7]].tolist()
    # The first of the nested subset is the second of the outer one.
    assert torch.equal(everything(part.subset(torch.tensor([1]))), everything(split)[[1]])
    fingerprints = {s.sha256() for s in (split, part, split.subset([1, 4, 7]), split.subset([4]))}
    assert len(fingerprints) == 4
    assert split.subset([4, 1, 7]).sha256() == part.sha256()
    assert all(len(value) == 64 for value in fingerprints)


def test_fingerprint_sees_pixels_labels_shape_and_type() -> None:
    x, y = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    brighter = x.clone()
    brighter[0, 0, 0, 0] = 1
    splits = [
        ArraySplit(x, y),
        ArraySplit(brighter, y),
        ArraySplit(x, y.flip(0)),
        ArraySplit(x.view(4, 1, 4, 1), y),
        ArraySplit(x.float(), y),
    ]
    assert len({split.sha256() for split in splits}) == len(splits)


def test_digits_are_exact_and_their_split_is_pinned() -> None:
    from sklearn.datasets import load_digits

    data = sources.digits()
    assert (len(data.train), len(data.val), len(data.test)) == (1293, 144, 360)
    levels = everything(data.train) * 16
    assert torch.equal(levels, levels.round()) and levels.max() == 16
    pixels, _ = load_digits(return_X_y=True)
    parts = [everything(split) for split in (data.train, data.val, data.test)]
    assert rows(torch.cat(parts)) == rows(torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8))
    assert ((data.test.labels.bincount() - 36).abs() <= 1).all()
    assert data.test.sha256() == "c027f5397ac2c4d89148d957023b224f3521f8c473a40be8381f28caea18122f"
    assert data.val.sha256() == "a0fd25e2f2c9c42ef393e4fd77b84e11be36a809e07f01df7d235a72a52c4f25"
    assert data.info.mean == pytest.approx([0.3058], abs=1e-4)
    assert data.info.std == pytest.approx([0.3765], abs=1e-4)


def test_hold_out_by_hand() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    rest, held = hold_out(labels, 4, seed=0)
    # Shares 2, 1.2 and 0.8: whole parts 2, 1, 0, and the one that is left goes to 0.8.
    assert labels[held].bincount().tolist() == [2, 1, 0, 1]
    assert sorted(rest.tolist() + held.tolist()) == list(range(10))
    assert held.tolist() == sorted(held.tolist()) and rest.tolist() == sorted(rest.tolist())


def test_equal_shares_are_rounded_by_the_seed() -> None:
    labels = torch.arange(100).repeat(5)
    chosen = []
    for seed in range(20):
        rest, held = hold_out(labels, 50, seed)
        assert labels[held].bincount(minlength=100).max() == 1
        assert labels[rest].bincount(minlength=100).min() == 4
        chosen.append(set(labels[held].tolist()))
    assert all(len(classes) == 50 for classes in chosen)
    assert len(set.union(*chosen)) == 100, "no class is always left out"
    assert not set.intersection(*chosen), "and none always chosen"


def test_digits_are_split_as_in_every_version() -> None:
    """Shares are equal there, so a new way to break ties would give other images."""
    data = sources.digits()
    for split, start in ((data.train, "9b4c3f92"), (data.val, "a0fd25e2"), (data.test, "c027f539")):
        assert split.sha256().startswith(start)


def test_each_class_keeps_a_sample() -> None:
    labels = torch.tensor([0, 1, 2, 3] + [4] * 6)
    for seed in range(5):
        rest, held = hold_out(labels, 5, seed)
        assert labels[held].tolist() == [4] * 5 and labels[rest].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"10 samples of 5 classes.*up to 5$"):
        hold_out(labels, 6, 0)


def test_a_validation_part_that_takes_whole_classes_is_refused(tmp_path: Path) -> None:
    x, y = np.full((20, 2, 2), 255, np.uint8), np.arange(20)
    np.savez(tmp_path / "one.npz", x_train=x, y_train=y)
    data = sources.npz(path=str(tmp_path / "one.npz"), val=0.1)
    with pytest.raises(UserError, match=r"data.val=0.1: in npz:one there are 20 samples of 20"):
        _ = data.train


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


@pytest.mark.parametrize("name", COPIED)
def test_the_test_part_is_opened_by_touching_test_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MAKERS[name](tmp_path, monkeypatch)
    damage_test_part(name, made)
    data = build(name, made)
    assert len(data.train) >= len(data.val) > 0 and data.info.num_classes == made.num_classes
    with pytest.raises(UserError) as error:
        everything(data.test)
    assert "test" in one_line(error) or "val" in one_line(error)


# --- normalisation --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_moments_by_numpy(kind: str) -> None:
    x = np.random.default_rng(0).integers(0, 200, (1100, 5, 4, 3), dtype=np.uint8)
    x[..., 2] = 51
    images = as_float(x) if kind == "float32" else torch.from_numpy(x).permute(0, 3, 1, 2)
    mean, std = ArraySplit(images, torch.zeros(1100, dtype=torch.int64)).moments()
    want = x.astype(np.float64) / 255
    assert mean == pytest.approx(want.mean((0, 1, 2)), abs=1e-6)
    assert std[:2] == pytest.approx(want.std((0, 1, 2))[:2], abs=1e-6)
    assert std[2] == 1, "a channel without variation stays at its scale"


@pytest.mark.parametrize("name", ["npz", "imagefolder"])
def test_normalisation_comes_from_the_training_part(name: str, made: Callable[[str], Made]) -> None:
    data = build(name, made(name))
    want = everything(data.train).double()
    assert data.info.mean == pytest.approx(want.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.info.std == pytest.approx(want.std((0, 2, 3), correction=0).tolist(), abs=1e-6)
    given = build(name, made(name), mean=[0.1, 0.2, 0.3])
    assert given.info.mean == (0.1, 0.2, 0.3) and given.info.std == data.info.std


def test_known_sets_need_no_file_for_their_info(tmp_path: Path) -> None:
    info = sources.cifar10(root=str(tmp_path / "nothing")).info
    assert info.mean == (0.4914, 0.4822, 0.4465) and info.classes[9] == "truck"


def test_uint8_becomes_exactly_v_over_255() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([v / 255 for v in range(256)], dtype=torch.float64).float()
    assert torch.equal(to_unit(levels), want)
    assert to_unit(want) is want


def test_images_come_on_the_device_that_was_asked_for() -> None:
    split = ArraySplit(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
    for x, y in split.batches(torch.arange(4), 3, "meta"):
        assert x.is_meta and y.is_meta and x.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_gives_the_same_pixels() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    split = ArraySplit(images, torch.arange(4))
    order = torch.tensor([2, 0, 3])
    here, there = split.fetch(order, "cpu")[0], split.fetch(order, "cuda")[0]
    assert there.is_cuda and torch.equal(here, there.cpu())
    generator = torch.Generator("cuda").manual_seed(0)
    x = Augment(crop=2, flip=True, cutout=3)(there, generator)
    assert x.is_cuda and x.shape == there.shape


# --- values of the config -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"val": 0}, "data.val=0 is neither"),
        ({"val": -0.1}, "data.val=-0.1 is neither"),
        ({"val": 1.5}, "data.val=1.5 is neither"),
        ({"val": math.nan}, "data.val=nan is neither"),
        ({"val": math.inf}, "data.val=inf is neither"),
        ({"val": 1437}, "leaves nothing to train on: the training split of digits has 1437"),
        ({"split_seed": -1}, "data.split_seed=-1"),
        ({"mean": [0.1, 0.2, 0.3]}, "data.mean has 3 values and digits has 1 channels"),
        ({"std": [0.0]}, "data.std=[0.0]"),
        ({"augment": {"crop": -1}}, "data.augment.crop=-1"),
        ({"augment": {"cutuot": 3}}, "no data.augment.cutuot; did you mean 'cutout'?"),
    ],
)
def test_bad_values_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        data = sources.digits(**overrides)
        assert data.info and data.train
    assert message in one_line(error)


@pytest.mark.parametrize(
    "given",
    [
        Augment(crop=2, flip=True),
        {"crop": 2, "flip": True},
        OmegaConf.create({"crop": 2, "flip": True, "cutout": 0}),
    ],
)
def test_augment_is_taken_as_it_comes(given: Any) -> None:
    assert sources.digits(augment=given).augment == Augment(crop=2, flip=True, cutout=0)


# --- npz ------------------------------------------------------------------------------------

X = np.random.default_rng(1).integers(0, 256, (8, 5, 6, 3), dtype=np.uint8)
Y = np.arange(8) % 4
UNIT = (X / 255).astype(np.float32)


def write_npz(folder: Path, **changes: Any) -> str:
    path = folder / "f.npz"
    arrays = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y} | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"y_test": with_value(Y, 4)}, "y_test in .* has the label 4, and there are 4 classes"),
    ({"y_test": with_value(Y, -1)}, "y_test in .* has the label -1: number the classes from 0"),
    ({"y_test": Y.astype(float)}, "y_test in .* is float64: labels are integers"),
    ({"y_test": np.eye(8)}, r"y_test in .* has shape \(8, 8\).*y.argmax\(1\)"),
    ({"y_test": Y[:, None]}, r"y_test in .* has shape \(8, 1\).*y.reshape\(-1\)"),
    ({"y_test": Y[:5]}, "has 8 images and y_test in .* 5 labels"),
    ({"y_test": Y[:0]}, "y_test in .* is empty"),
    ({"x_test": X[:0]}, "x_test in .* is empty"),
    ({"x_test": X.transpose(0, 3, 1, 2)}, r"looks like \(N, C, H, W\).*transpose\(0, 2, 3, 1\)"),
    ({"x_test": X[0, 0]}, r"has shape \(6, 3\): images are \(N, H, W, C\)"),
    ({"x_test": X.astype(np.int64)}, "x_test in .* is int64: store uint8"),
    ({"x_test": X // 128}, r"uint8 with 1 as its largest.*store x.astype\('float32'\) / 1$"),
    ({"x_test": X // 15 % 17}, r"uint8 with 16 as its largest.*store x.astype\('float32'\) / 16$"),
    ({"x_test": X.astype(np.float32)}, r"from 0 to 255, outside \[0, 1\]: divide by 255 or store"),
    ({"x_test": UNIT * 2 - 1}, r"outside \[0, 1\]: undo the normalisation"),
    ({"x_test": with_value(UNIT, math.nan)}, "x_test in .* holds NaN or infinity"),
    ({"x_test": with_value(UNIT, -math.inf)}, "x_test in .* holds NaN or infinity"),
    ({"x_test": X[:, :4]}, r"images of shape \(3, 4, 6\) and x_train of \(3, 5, 6\)"),
    ({"x_test": X.astype(object)}, "x_test in .* holds pickled Python objects"),
    ({"y_test": Y.astype(object)}, "y_test in .* holds pickled Python objects"),
    ({"y_test": None}, r"has no y_test \(it holds: x_test, x_train, y_train\)"),
    (
        {"x_test": None, "y_test": None, "images": X},
        r"has no x_test and no y_test \(it holds: images, x_train, y_train\)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS)
def test_bad_arrays_are_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = sources.npz(path=write_npz(tmp_path, **changes), val=2)
    assert len(data.train) == 6, "the training part is sound"
    with pytest.raises(UserError, match=message) as error:
        assert data.test
    one_line(error)


def test_bad_training_arrays_are_found_before_a_model_is_built(tmp_path: Path) -> None:
    data = sources.npz(path=write_npz(tmp_path, x_train=X[0, 0]), mean=[0.0], std=[1.0])
    with pytest.raises(UserError, match=r"x_train in .* has shape \(6, 3\)"):
        assert data.info


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
def test_npz_takes_uint8_and_floats(kind: Any, tmp_path: Path) -> None:
    x = X if kind is np.uint8 else UNIT.astype(kind)
    test = sources.npz(path=write_npz(tmp_path, x_test=x, y_test=Y.astype(np.uint8))).test
    assert everything(test).dtype == torch.float32
    tolerance = 1e-3 if kind is np.float16 else 0
    assert (everything(test) - as_float(X)).abs().max() <= tolerance
    assert test.labels.tolist() == Y.tolist()


def test_rounding_beyond_the_range_is_clipped(tmp_path: Path) -> None:
    x = with_value(with_value(UNIT.astype(np.float64), 1 + 5e-7), 1 + 5e-7)
    assert everything(sources.npz(path=write_npz(tmp_path, x_test=x)).test).max() == 1


def test_npz_takes_gray_without_channels(tmp_path: Path) -> None:
    path = write_npz(tmp_path, x_train=X[..., 0], x_test=X[..., 0])
    data = sources.npz(path=path)
    assert data.info.input_shape == (1, 5, 6)
    assert torch.equal(everything(data.test), as_float(X[..., 0]))


def test_npz_for_evaluation_alone(tmp_path: Path) -> None:
    data = sources.npz(path=write_npz(tmp_path, x_train=None, y_train=None), name="mine")
    assert len(data.test) == 8
    info = data.info
    assert (info.name, info.num_classes, info.input_shape) == ("mine", 4, (3, 5, 6))
    assert info.mean == (0, 0, 0) and info.std == (1, 1, 1)
    for part in ("train", "val"):
        with pytest.raises(UserError, match=r"has no x_train and no y_train .it holds: x_test, y_"):
            getattr(data, part)


def test_npz_for_training_alone(tmp_path: Path) -> None:
    data = sources.npz(path=write_npz(tmp_path, x_test=None, y_test=None))
    assert data.info.name == "npz:f" and len(data.train) == 7 and len(data.val) == 1
    with pytest.raises(UserError, match="has no x_test and no y_test"):
        assert data.test


def test_number_of_classes_is_asked_for_where_it_cannot_be_seen(tmp_path: Path) -> None:
    for labels, least, most in ((Y + 5, 5, 8), (Y + 1, 1, 4), (Y * 0, 0, 0)):
        path = write_npz(tmp_path, y_train=labels, y_test=labels)
        says = f"y_train in .* labels from {least} to {most}: .*data.num_classes=K"
        with pytest.raises(UserError, match=says) as error:
            assert sources.npz(path=path).info
        one_line(error)
    path = write_npz(tmp_path, y_train=Y * 5, y_test=Y * 5)
    with pytest.raises(UserError, match=r"8 labels and one of them is 15: .*data.num_classes=K"):
        assert sources.npz(path=path).info
    alone = write_npz(tmp_path, x_train=None, y_train=None, y_test=Y + 1)
    assert sources.npz(path=alone).info.num_classes == 5, "a test set may miss a class"
    path = write_npz(tmp_path, y_train=Y + 5, y_test=Y + 5)
    data = sources.npz(path=path, num_classes=10)
    assert data.info.num_classes == 10 and len(data.test) == 8
    with pytest.raises(UserError, match="has the label 8, and there are 6 classes"):
        assert sources.npz(path=path, num_classes=6).train
    with pytest.raises(UserError, match=r"data.num_classes=1"):
        sources.npz(path=path, num_classes=1)


def test_small_maps_of_many_channels_are_no_mistake() -> None:
    assert arrays.image_shape((5, 4, 4, 8), "x") == (8, 4, 4)
    assert arrays.image_shape((5, 1, 1, 16), "x") == (16, 1, 1)


def npy_bytes(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file '.*': name it with data.path=FILE.npz"),
        (b"", "cannot be read as .npz"),
        (b"<!doctype html><p>log in", "cannot be read as .npz"),
        (npy_bytes(X), "cannot be read as .npz"),
        (pickle.dumps({"x_train": 1}), "cannot be read as .npz"),
    ],
)
def test_files_that_are_no_npz(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        sources.npz(path=str(path))
    one_line(error)
    with pytest.raises(UserError, match=r"cannot be read as .npz"):
        sources.npz(path=str(tmp_path))


def test_a_truncated_npz_is_refused(tmp_path: Path) -> None:
    path = Path(write_npz(tmp_path))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cannot be read as .npz"):
        sources.npz(path=str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_in_an_npz_is_found(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    save(path, x_train=X, y_train=Y, x_test=X, y_test=Y)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        middle = file.getinfo("x_test.npy")
        data[middle.header_offset + 30 + middle.compress_size // 2 + 40] ^= 0xFF
    path.write_bytes(data)
    splits = sources.npz(path=str(path))
    assert splits.train
    with pytest.raises(UserError, match=r"x_test in .* is damaged") as error:
        assert splits.test
    one_line(error)


# --- torchvision: missing, damaged, downloads ------------------------------------------------


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_missing_set_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for part in ("train", "val", "test"):
        with pytest.raises(UserError) as error:
            getattr(getattr(sources, name)(root=str(root)), part)
        assert one_line(error) == (
            f"{name} is not under '{root}': add data.download=true, "
            f"or say where it is with data.root=DIR"
        )
    assert not root.exists(), "nothing is made without being asked for"


class Answer(io.BytesIO):
    """What urlopen returns."""

    def __init__(self, url: str, content: bytes) -> None:
        super().__init__(content)
        self.url = url
        self.length = len(content)


def serve(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], bytes]) -> list[str]:
    asked: list[str] = []

    def urlopen(request: urllib.request.Request, *_: Any, **__: Any) -> Answer:
        asked.append(request.full_url)
        return Answer(request.full_url, answer(request.full_url))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def offline(url: str) -> bytes:
    raise urllib.error.URLError("Name or service not known")


def gone(url: str) -> bytes:
    raise urllib.error.HTTPError(url, 404, "Not Found", None, None)  # type: ignore[arg-type]


def interrupted(url: str) -> bytes:
    raise ConnectionResetError("Connection reset by peer")


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_damaged_set_says_what_to_delete(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MAKERS[name](tmp_path, monkeypatch)
    damage_test_part(name, made)
    what = r"is incomplete or damaged .*: delete '.*' and add data.download=true"
    with pytest.raises(UserError, match=what) as error:
        assert build(name, made).test
    one_line(error)
    # torchvision finds the damage by a checksum, where it has one, and then fetches them anew.
    serve(monkeypatch, offline)
    fetched = f"downloading {name} failed .*Name or service not known"
    with pytest.raises(UserError, match=what if "mnist" in name else fetched):
        assert build(name, made, download=True).test


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (offline, "Name or service not known"),
        (gone, "HTTP Error 404"),
        (interrupted, "Connection reset by peer"),
        (lambda url: b"<!doctype html><p>log in", "often it is a web page that asks to log in"),
    ],
)
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_failed_download_is_one_line(
    name: str,
    answer: Callable[[str], bytes],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = serve(monkeypatch, answer)
    with pytest.raises(UserError, match=f"downloading {name} failed .*{reason}") as error:
        assert getattr(sources, name)(root=str(tmp_path), download=True).train
    assert "by hand, from http" in one_line(error)
    assert asked


def test_a_download_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = tmp_path / "away"
    away.mkdir()
    made = make_cifar(away, monkeypatch, torchvision_sets._Cifar10)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(away / "cifar-10-batches-py", "cifar-10-batches-py")
    md5 = hashlib.md5(packed.getvalue()).hexdigest()
    monkeypatch.setattr(torchvision_sets._Cifar10, "tgz_md5", md5)
    asked = serve(monkeypatch, lambda url: packed.getvalue())
    root = str(tmp_path / "new" / "data")
    for _ in range(2):
        data = build("cifar10", made, root=root, download=True)
        assert len(data.train) == 150 and data.test.labels.tolist() == made.y["test"].tolist()
    assert set(asked) == {"https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"}


def test_mnist_is_unpacked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_mnist(tmp_path / "away", "MNIST")
    raw = tmp_path / "away" / "MNIST" / "raw"
    packed = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in raw.iterdir()}
    listed = [(name, hashlib.md5(data).hexdigest()) for name, data in packed.items()]
    monkeypatch.setattr(torchvision_sets.datasets.MNIST, "resources", listed)
    # A download that failed is taken up again.
    serve(monkeypatch, offline)
    with pytest.raises(UserError, match="downloading mnist failed"):
        assert build("mnist", made, root=str(tmp_path / "new"), download=True).test
    serve(monkeypatch, lambda url: packed[url.rpartition("/")[2]])
    data = build("mnist", made, root=str(tmp_path / "new"), download=True)
    assert torch.equal(everything(data.test), as_float(made.x["test"]))


# --- folders and streams ---------------------------------------------------------------------


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*train': images are read from train/CLASS"):
        sources.imagefolder(root=str(tmp_path))
    with pytest.raises(UserError, match=r"imagenet is not under .*data.root=DIR.* python -c"):
        sources.imagenet(root=str(tmp_path))
    made = make_imagefolder(tmp_path)
    with pytest.raises(UserError, match="has 4 class folders, not the 1000 of imagenet"):
        assert sources.imagenet(root=str(tmp_path), val=2).train
    (tmp_path / "train" / ".cache").mkdir()
    assert build("imagefolder", made).info.classes == ("n0000", "n0001", "n0002", "n0003")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"'.*train': Found no valid file for the classes empty"):
        assert build("imagefolder", made).train
    (tmp_path / "test" / "n0009").mkdir()
    with pytest.raises(UserError, match="n0009' is a class that the training part does not have"):
        assert build("imagefolder", made).test
    (tmp_path / "flat" / "test").mkdir(parents=True)
    with pytest.raises(UserError, match="has no folders: sort the images into one folder per"):
        assert sources.imagefolder(root=str(tmp_path / "flat")).test


def test_labels_of_the_test_part_are_those_of_the_training_part(tmp_path: Path) -> None:
    made = make_imagefolder(tmp_path)
    for path in (tmp_path / "test" / "n0001").iterdir():
        path.unlink()
    (tmp_path / "test" / "n0001").rmdir()
    assert set(build("imagefolder", made).test.labels.tolist()) == {0, 2, 3}


def test_a_folder_for_evaluation_alone(tmp_path: Path) -> None:
    made = make_imagefolder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "test").rename(tmp_path / "val")
    data = build("imagefolder", made)
    assert torch.equal(everything(data.test), as_float(made.x["test"]))
    assert data.info.mean == (0, 0, 0) and data.info.std == (1, 1, 1)
    assert data.info.name == f"imagefolder:{tmp_path.name}"
    with pytest.raises(UserError, match=r"no folder '.*train'"):
        assert data.train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"size": 0}, "data.size=0"),
        ({"size": 12, "resize": 8}, "data.size=12 and data.resize=8"),
        ({"crop_scale": [0.5]}, r"data.crop_scale=\[0.5\]"),
        ({"crop_scale": [0.0, 1.0]}, r"data.crop_scale=\[0.0, 1.0\]"),
        ({"crop_scale": [0.9, 0.1]}, r"data.crop_scale=\[0.9, 0.1\]"),
        ({"workers": -1}, "data.workers=-1"),
    ],
)
def test_bad_values_for_folders(
    overrides: dict[str, Any], message: str, made: Callable[[str], Made]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        build("imagefolder", made("imagefolder"), **overrides)
    one_line(error)


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Any]:
    """Gradients of 40x30 pixels: a crop shows where it was taken."""
    row, column = np.meshgrid(np.arange(30), np.arange(40), indexing="ij")
    for part, count in (("train", 12), ("test", 3)):
        for number in range(count):
            path = tmp_path / part / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = np.stack([row * 8, column * 6, np.full_like(row, number)], -1)
            Image.fromarray(image.astype(np.uint8)).save(path)
    return {"root": str(tmp_path), "size": 16, "resize": 20, "val": 2, "workers": 0}


# Python 3.12 warns of every fork while threads are about; the workers touch none of them.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_evaluation_resizes_the_shorter_side_and_cuts_out_the_centre(
    photos: dict[str, Any],
) -> None:
    photos["resize"] = 30  # the shorter side as it is: the centre can be written down
    x = everything(sources.imagefolder(**photos).test)[0] * 255
    assert x.shape == (3, 16, 16)
    assert x[0, :, 0].tolist() == [8 * row for row in range(7, 23)]
    assert x[1, 0, :].tolist() == [6 * column for column in range(12, 28)]


@forks
def test_training_crops_depend_on_the_seed_and_the_image_alone(photos: dict[str, Any]) -> None:
    def crops(order: Tensor, batch_size: int, seed: int | None, workers: int) -> Tensor:
        data = sources.imagefolder(**{**photos, "workers": workers}, crop_scale=[0.1, 1.0])
        x = torch.cat([x for x, _ in data.train.batches(order, batch_size, "cpu", seed)])
        return x[order.argsort()]

    order = torch.tensor([3, 1, 0, 7, 9, 2, 4, 5, 6, 8])
    before = torch.get_rng_state()
    one = crops(order, 4, seed=5, workers=0)
    two = crops(order.flip(0), 3, seed=5, workers=2)
    assert torch.equal(torch.get_rng_state(), before), "training's generator is not drawn from"
    assert torch.equal(one, two)
    other = crops(order, 4, seed=6, workers=0)
    whole = crops(order, 4, seed=None, workers=0)
    same = [torch.equal(a, b) for x in (other, whole) for a, b in zip(one, x, strict=True)]
    assert len(same) == 20 and not any(same)
    data = sources.imagefolder(**photos, crop_scale=[0.1, 1.0])
    assert torch.equal(whole, everything(data.train))
    # A subset draws what the whole draws, and each image its own.
    part = data.train.subset([7, 2])
    x = next(part.batches(torch.arange(2), 2, "cpu", seed=5))[0]
    assert torch.equal(x, one[[7, 2]])
    assert len({crop[:2].numpy().tobytes() for crop in one}) == 10


@forks
def test_workers_stay_for_the_next_pass_even_after_a_broken_off_one(
    photos: dict[str, Any],
) -> None:
    split = sources.imagefolder(**{**photos, "workers": 1}).train
    order = torch.arange(10)
    for x, _ in split.batches(order, 2, "cpu"):
        assert torch.equal(x, split.fetch(order[:2], "cpu")[0])
        break
    x = torch.cat([x for x, _ in split.batches(order.flip(0), 3, "cpu")])
    assert torch.equal(x, everything(split).flip(0))


def test_a_pass_that_was_overtaken_says_so(photos: dict[str, Any]) -> None:
    split = sources.imagefolder(**photos).train
    first = split.batches(torch.arange(10), 2, "cpu")
    next(first)
    next(split.batches(torch.arange(10), 2, "cpu"))
    with pytest.raises(RuntimeError, match="another pass over this split"):
        next(first)


@forks
def test_an_image_that_cannot_be_read_is_named_in_one_line(photos: dict[str, Any]) -> None:
    path = Path(photos["root"]) / "test" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    order = torch.arange(3)
    for workers in (0, 1):
        split = sources.imagefolder(**{**photos, "workers": workers}).test
        messages = []
        for read in (
            lambda s=split: list(s.batches(order, 2, "cpu")),
            lambda s=split: everything(s),
        ):
            try:
                read()
            except UserError as error:  # unlike pytest.raises, lets go of the workers at once
                messages.append(str(error))
        assert len(messages) == 2 and messages[0] == messages[1]
        assert re.fullmatch(r"'.*1.png' cannot be read as an image \(.*\): remove.*", messages[0])


@forks
def test_more_than_eight_bits_are_refused_and_not_cut_off(photos: dict[str, Any]) -> None:
    path = Path(photos["root"]) / "test" / "b" / "1.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    split = sources.imagefolder(**{**photos, "workers": 0}).test
    with pytest.raises(UserError, match=r"1.png' has more than 8 bits per value: store 8-bit"):
        everything(split)


def test_fingerprint_of_a_folder_sees_paths_sizes_labels_and_geometry(
    photos: dict[str, Any],
) -> None:
    root = Path(photos["root"])

    def fingerprint(**overrides: Any) -> str:
        return sources.imagefolder(**{**photos, **overrides}).test.sha256()

    seen = [fingerprint()]
    assert fingerprint(workers=1) == seen[0]
    seen.append(fingerprint(size=15))
    (root / "test" / "b" / "1.png").rename(root / "test" / "b" / "9.png")
    seen.append(fingerprint())
    with (root / "test" / "b" / "9.png").open("ab") as file:
        file.write(b"\0")
    seen.append(fingerprint())
    (root / "train" / "aa").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "aa" / "0.png")
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_random_windows_lie_inside_and_cover_the_share() -> None:
    rng = random.Random(0)
    boxes = [random_box(400, 300, (0.25, 0.5), rng) for _ in range(400)]
    for top, left, height, width in boxes:
        assert 0 <= top <= top + height <= 300 and 0 <= left <= left + width <= 400
        assert 0.245 < height * width / 120_000 < 0.505
        assert 0.74 < width / height < 1.35
    assert len(set(boxes)) == 400
    assert random_box(300, 20, (1.0, 1.0), rng) == (0, 140, 20, 20), "ten draws do not fit"


# --- augmentation ----------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> Tensor:
    """64 images of 3x6x5 with all pixels different and above zero."""
    return (torch.arange(64 * 90).view(64, 3, 6, 5) + 1) / (64 * 90)


def test_nothing_on_gives_the_input_and_draws_nothing(batch: Tensor) -> None:
    g = generator()
    before = g.get_state()
    assert Augment()(batch, g) is batch
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop=2),
        Augment(flip=True),
        Augment(cutout=3),
        Augment(crop=2, flip=True, cutout=3),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augmentation_is_keyed_by_the_generator_and_leaves_its_input(
    augment: Augment, layout: torch.memory_format, batch: Tensor
) -> None:
    batch = batch.contiguous(memory_format=layout)
    before = batch.clone()
    x = augment(batch, generator())
    assert torch.equal(batch, before)
    assert x.shape == batch.shape and x.dtype == batch.dtype
    assert torch.equal(x, augment(batch, generator()))
    assert not torch.equal(x, augment(batch, generator(1)))
    x.zero_()
    assert torch.equal(batch, before), "the result does not share the memory of the input"
    # Equal images, different draws.
    same = augment(batch[:1].expand(64, -1, -1, -1), generator())
    assert len(rows(same)) > 1


def test_flip_mirrors_about_half(batch: Tensor) -> None:
    x = Augment(flip=True)(batch, generator())
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, batch, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(x, batch, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 16 <= sum(mirrored) <= 48
    # The same draws once more undo it.
    assert torch.equal(Augment(flip=True)(x, generator()), batch)


def test_crop_is_a_window_of_the_padded_image(batch: Tensor) -> None:
    batch = batch[:1].expand(500, -1, -1, -1)
    x = Augment(crop=2)(batch, generator())
    padded = torch.zeros(3, 10, 9)
    padded[:, 2:8, 2:7] = batch[0]
    windows = {
        padded[:, top : top + 6, left : left + 5].contiguous().numpy().tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    assert len(windows) == 25
    found = rows(x)
    assert found.keys() == windows.keys(), "every window, and nothing else"
    assert max(found.values()) < 50, "20 each are expected"


def test_crop_and_flip_together_mirror_a_window(batch: Tensor) -> None:
    batch = batch[:1].expand(500, -1, -1, -1)
    crops = rows(Augment(crop=1)(batch, generator()))
    both = rows(Augment(crop=1, flip=True)(batch, generator()))
    mirrored = rows(Augment(crop=1)(batch, generator()).flip(-1))
    assert len(crops) == 9 and both.keys() == crops.keys() | mirrored.keys()


def test_cutout_is_one_square_that_the_border_clips() -> None:
    ones = torch.ones(500, 2, 9, 8)
    x = Augment(cutout=3)(ones, generator())
    assert torch.equal(x[:, 0], x[:, 1]), "all channels alike"
    holes = 1 - x[:, 0]
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    heights, widths = holes.amax(2).sum(1), holes.amax(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths), "a rectangle"
    assert set(heights.tolist()) == set(widths.tolist()) == {2.0, 3.0}
    # A centre that is not in the first or last row and column leaves the whole square.
    inside = (heights * widths == 9).float().mean()
    assert abs(inside - (7 / 9) * (6 / 8)) < 0.1
    assert Augment(cutout=4)(ones, generator()).sub(1).abs().sum((1, 2, 3)).max() == 2 * 16
