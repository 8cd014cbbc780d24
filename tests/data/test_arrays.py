"""Arrays and npz files: what is taken, and every fault that is named in one line."""

from __future__ import annotations

import io
import math
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_data import as_float, everything, one_line

from advbench.data import arrays, sources
from advbench.data.archive import Archive
from advbench.errors import UserError

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
    ({"x_test": np.full_like(X, 1, np.float32) * 1.0001}, r"to 1\.0001, .*clip it to \[0, 1\]"),
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
    data = sources.npz(path=write_npz(tmp_path, **changes), val=2).build()
    assert len(data.train) == 6, "the training part is sound"
    with pytest.raises(UserError, match=message) as error:
        assert data.test
    one_line(error)


def test_bad_training_arrays_are_found_before_a_model_is_built(tmp_path: Path) -> None:
    data = sources.npz(path=write_npz(tmp_path, x_train=X[0, 0]), mean=[0.0], std=[1.0]).build()
    with pytest.raises(UserError, match=r"x_train in .* has shape \(6, 3\)"):
        assert data.info


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
def test_npz_takes_uint8_and_floats(kind: Any, tmp_path: Path) -> None:
    x = X if kind is np.uint8 else UNIT.astype(kind)
    test = sources.npz(path=write_npz(tmp_path, x_test=x, y_test=Y.astype(np.uint8))).build().test
    assert everything(test).dtype == torch.float32
    tolerance = 1e-3 if kind is np.float16 else 0
    assert (everything(test) - as_float(X)).abs().max() <= tolerance
    assert test.labels.tolist() == Y.tolist()


def test_rounding_beyond_the_range_is_clipped(tmp_path: Path) -> None:
    x = with_value(with_value(UNIT.astype(np.float64), 1 + 5e-7), 1 + 5e-7)
    assert everything(sources.npz(path=write_npz(tmp_path, x_test=x)).build().test).max() == 1


def test_npz_takes_gray_without_channels(tmp_path: Path) -> None:
    path = write_npz(tmp_path, x_train=X[..., 0], x_test=X[..., 0])
    data = sources.npz(path=path).build()
    assert data.info.input_shape == (1, 5, 6)
    assert torch.equal(everything(data.test), as_float(X[..., 0]))


def test_npz_for_evaluation_alone(tmp_path: Path) -> None:
    data = sources.npz(path=write_npz(tmp_path, x_train=None, y_train=None), name="mine").build()
    assert len(data.test) == 8
    info = data.info
    assert (info.name, info.num_classes, info.input_shape) == ("mine", 4, (3, 5, 6))
    assert info.mean == (0, 0, 0) and info.std == (1, 1, 1)
    for part in ("train", "val"):
        with pytest.raises(UserError, match=r"has no x_train and no y_train .it holds: x_test, y_"):
            getattr(data, part)


def test_npz_for_training_alone(tmp_path: Path) -> None:
    data = sources.npz(path=write_npz(tmp_path, x_test=None, y_test=None)).build()
    assert data.info.name == "npz:f" and len(data.train) == 7 and len(data.val) == 1
    with pytest.raises(UserError, match="has no x_test and no y_test"):
        assert data.test


def test_number_of_classes_is_asked_for_where_it_cannot_be_seen(tmp_path: Path) -> None:
    for labels, least, most in ((Y + 5, 5, 8), (Y + 1, 1, 4), (Y * 0, 0, 0)):
        path = write_npz(tmp_path, y_train=labels, y_test=labels)
        says = f"y_train in .* labels from {least} to {most}: .*data.num_classes=K"
        with pytest.raises(UserError, match=says) as error:
            assert sources.npz(path=path).build().info
        one_line(error)
    path = write_npz(tmp_path, y_train=Y * 5, y_test=Y * 5)
    with pytest.raises(UserError, match=r"8 labels and one of them is 15: .*data.num_classes=K"):
        assert sources.npz(path=path).build().info
    alone = write_npz(tmp_path, x_train=None, y_train=None, y_test=Y + 1)
    assert sources.npz(path=alone).build().info.num_classes == 5, "a test set may miss a class"
    path = write_npz(tmp_path, y_train=Y + 5, y_test=Y + 5)
    data = sources.npz(path=path, num_classes=10).build()
    assert data.info.num_classes == 10 and len(data.test) == 8
    with pytest.raises(UserError, match="has the label 8, and there are 6 classes"):
        assert sources.npz(path=path, num_classes=6).build().train
    with pytest.raises(UserError, match=r"data.num_classes=1"):
        sources.npz(path=path, num_classes=1).build()


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
        sources.npz(path=str(path)).build()
    one_line(error)
    with pytest.raises(UserError, match=r"cannot be read as .npz"):
        sources.npz(path=str(tmp_path)).build()


def test_a_truncated_npz_is_refused(tmp_path: Path) -> None:
    path = Path(write_npz(tmp_path))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cannot be read as .npz"):
        sources.npz(path=str(path)).build()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_in_an_npz_is_found(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    save(path, x_train=X, y_train=Y, x_test=X, y_test=Y)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        middle = file.getinfo("x_test.npy")
        data[middle.header_offset + 30 + middle.compress_size // 2 + 40] ^= 0xFF
    path.write_bytes(data)
    splits = sources.npz(path=str(path)).build()
    assert splits.train
    with pytest.raises(UserError, match=r"x_test in .* is damaged") as error:
        assert splits.test
    one_line(error)


def test_images_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read block by block is what is read at once; only a block is there twice."""
    random = np.random.default_rng(0)
    x = random.random((2500, 16, 16, 3), np.float32)
    monkeypatch.setattr(arrays, "BLOCK", 100)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "f.npz", x_test=x, y_test=random.integers(0, 10, 2500))
        member = Archive(str(tmp_path / "f.npz"), "data.path", ()).member("x_test")
        tracemalloc.start()
        images = arrays.as_images(member, "x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert torch.equal(images, torch.from_numpy(x).permute(0, 3, 1, 2))
        assert peak < 0.4 * x.nbytes
    flipped = bytearray((tmp_path / "f.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "f.npz").write_bytes(flipped)
    with pytest.raises(UserError, match="damaged"):
        arrays.as_images(Archive(str(tmp_path / "f.npz"), "data.path", ()).member("x_test"), "x")
