"""Folders of photographs: geometry, workers, files that cannot be read."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_data import Made, as_float, build, everything, make_imagefolder, one_line
from PIL import Image
from torch import Tensor

from advbench.data import sources
from advbench.data.stream import random_box
from advbench.errors import UserError

# --- folders and streams ---------------------------------------------------------------------


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*train': images are read from train/CLASS"):
        sources.imagefolder(root=str(tmp_path)).build()
    with pytest.raises(UserError, match=r"imagenet is not under .*data.root=DIR.* python -c"):
        sources.imagenet(root=str(tmp_path)).build()
    made = make_imagefolder(tmp_path)
    with pytest.raises(UserError, match="has 4 class folders, not the 1000 of imagenet"):
        assert sources.imagenet(root=str(tmp_path), val=2).build().train
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
        assert sources.imagefolder(root=str(tmp_path / "flat")).build().test


def test_labels_of_the_test_part_are_those_of_the_training_part(tmp_path: Path) -> None:
    made = make_imagefolder(tmp_path)
    for path in (tmp_path / "test" / "n0001").iterdir():
        path.unlink()
    (tmp_path / "test" / "n0001").rmdir()
    assert set(build("imagefolder", made).test.labels.tolist()) == {0, 2, 3}


@pytest.mark.parametrize(
    ("names", "ordered", "noted"),
    [
        (("1", "2", "10", "9"), ("1", "2", "9", "10"), True),
        (("00", "01", "02", "10"), ("00", "01", "02", "10"), False),
        (("01", "1", "2", "003"), ("01", "1", "2", "003"), True),
        (("1", "10", "2", "a"), ("1", "10", "2", "a"), False),
    ],
)
def test_folders_that_are_numbers_are_in_their_order(
    tmp_path: Path, names: tuple[str, ...], ordered: tuple[str, ...], noted: bool
) -> None:
    made = make_imagefolder(tmp_path)
    for old, new in zip(sorted(p.name for p in (tmp_path / "train").iterdir()), names, strict=True):
        for part in ("train", "test"):
            (tmp_path / part / old).rename(tmp_path / part / new)
    data = build("imagefolder", made)
    assert data.info.classes == ordered
    assert [("numbered as numbers" in note) for note in data.info.notes] == [True] * noted
    split: Any = data.test
    places = [os.fsdecode(path).split("/")[0] for path in split._files.paths]
    assert len(places) >= 4 and [ordered[label] for label in split.labels] == places


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
    x = everything(sources.imagefolder(**photos).build().test)[0] * 255
    assert x.shape == (3, 16, 16)
    assert x[0, :, 0].tolist() == [8 * row for row in range(7, 23)]
    assert x[1, 0, :].tolist() == [6 * column for column in range(12, 28)]


@forks
def test_training_crops_depend_on_the_seed_and_the_image_alone(photos: dict[str, Any]) -> None:
    def crops(order: Tensor, batch_size: int, seed: int | None, workers: int) -> Tensor:
        data = sources.imagefolder(**{**photos, "workers": workers}, crop_scale=[0.1, 1.0]).build()
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
    data = sources.imagefolder(**photos, crop_scale=[0.1, 1.0]).build()
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
    split = sources.imagefolder(**{**photos, "workers": 1}).build().train
    order = torch.arange(10)
    for x, _ in split.batches(order, 2, "cpu"):
        assert torch.equal(x, split.fetch(order[:2], "cpu")[0])
        break
    x = torch.cat([x for x, _ in split.batches(order.flip(0), 3, "cpu")])
    assert torch.equal(x, everything(split).flip(0))


def test_a_pass_that_was_overtaken_says_so(photos: dict[str, Any]) -> None:
    split = sources.imagefolder(**photos).build().train
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
        split = sources.imagefolder(**{**photos, "workers": workers}).build().test
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
    split = sources.imagefolder(**{**photos, "workers": 0}).build().test
    with pytest.raises(UserError, match=r"1.png' has more than 8 bits per value: store 8-bit"):
        everything(split)


def test_fingerprint_of_a_folder_sees_paths_sizes_labels_and_geometry(
    photos: dict[str, Any],
) -> None:
    root = Path(photos["root"])

    def fingerprint(**overrides: Any) -> str:
        return sources.imagefolder(**{**photos, **overrides}).build().test.sha256()

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
