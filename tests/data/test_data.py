"""Data sets: generic tests over all of them, made up small."""

from __future__ import annotations

import math
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_data import (
    CONFIGS,
    COPIED,
    MAKERS,
    NAMES,
    TORCHVISION,
    Made,
    as_float,
    build,
    damage_test_part,
    everything,
    one_line,
    rows,
)
from omegaconf import OmegaConf

from advbench.data import sources, torchvision_sets
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, hold_out, to_unit
from advbench.errors import UserError

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
    parameters = [field.name for field in fields(factory)]
    assert sorted(config) == sorted(parameters)
    missing = [key for key in parameters if OmegaConf.is_missing(config, key)]
    assert missing == {"npz": ["path"], "imagefolder": ["root"]}.get(name, [])
    defaults = vars(factory(**dict.fromkeys(missing, "")))
    # OmegaConf takes every annotation, and every value fits its own.
    hints = typing.get_type_hints(factory)
    schema = make_dataclass("Schema", [(key, hints[key]) for key in parameters])
    merged = OmegaConf.merge(OmegaConf.structured(schema), config)
    assert OmegaConf.to_object(merged.augment) == Augment.of(config.augment)
    known = getattr(torchvision_sets, name.upper()) if name in TORCHVISION else None
    for key in sorted({*parameters} - {*missing}):
        value: Any = config[key]
        if key == "augment":
            assert Augment.of(value) == defaults[key]
        elif key in ("mean", "std") and known is not None:
            assert tuple(value) == getattr(known, key)
        elif not (key in ("mean", "std") and name == "imagenet"):
            assert value == defaults[key], key
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

    data = sources.digits().build()
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
    data = sources.digits().build()
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
    data = sources.npz(path=str(tmp_path / "one.npz"), val=0.1).build()
    with pytest.raises(UserError, match=r"data.val=0.1: in npz:one there are 20 samples of 20"):
        _ = data.train


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
    info = sources.cifar10(root=str(tmp_path / "nothing")).build().info
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
        data = sources.digits(**overrides).build()
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
    assert sources.digits(augment=given).build().augment == Augment(crop=2, flip=True, cutout=0)
