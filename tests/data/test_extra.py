"""Extra training images: how they are read, mixed into batches, dealt out and gone on with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_script
from torch import Tensor

from advbench.cli.main import main
from advbench.data import sources
from advbench.data.archive import Archive
from advbench.data.augment import Augment
from advbench.data.base import Splits
from advbench.data.extra import StoredSplit
from advbench.errors import UserError
from advbench.training.feed import Feed
from advbench.training.randomness import endless, permutation

ORIGINAL, EXTRA, VAL = 75, 53, 5
BATCH = 16
STEPS = (ORIGINAL - VAL) // BATCH


def coded(count: int, mark: int) -> np.ndarray:
    """Images (count, 2, 2, 1) that say which they are: number, mark, number again, 255."""
    x = np.zeros((count, 2, 2, 1), np.uint8)
    x[:, 0, 0, 0] = x[:, 1, 0, 0] = np.arange(count)
    x[:, 0, 1, 0], x[:, 1, 1, 0] = mark, 255
    return x


def write(path: Path, save: Callable[..., None] = np.savez, **changes: Any) -> str:
    arrays = {"image": coded(EXTRA, 1), "label": np.arange(EXTRA) % 3} | changes
    save(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def splits(folder: Path, fraction: float = 0.7, *, file: str | None = None, **more: Any) -> Splits:
    """Coded training images, and extra ones, or those of another file."""
    own, extra = folder / "own.npz", folder / "extra.npz"
    np.savez(own, x_train=coded(ORIGINAL, 0), y_train=np.arange(ORIGINAL) % 3)
    if file is None:
        file = write(extra)
    return sources.npz(path=str(own), val=VAL, extra=file, extra_fraction=fraction, **more).build()


def read(x: Tensor, y: Tensor) -> list[tuple[int, int]]:
    """(mark, number) of each row; their labels are what they should be."""
    pixels = (x * 255).round().long()
    assert x.dtype == torch.float32 and (pixels[:, 0, 1, 1] == 255).all()
    number, mark = pixels[:, 0, 0, 0], pixels[:, 0, 0, 1]
    assert torch.equal(number % 3, y)
    return list(zip(mark.tolist(), number.tolist(), strict=True))


def fed(feed: Feed, epoch: int, first: int = 0) -> list[list[tuple[int, int]]]:
    return [read(x, y) for x, y in feed.batches(epoch, first, "cpu")]


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "batch_size", "extra"),
    [(0.7, 16, 11), (0.5, 10, 5), (0.7, 10, 7), (0.1, 16, 2), (0.9, 16, 14), (0.3, 7, 2)],
)
def test_every_batch_has_the_fraction(
    fraction: float, batch_size: int, extra: int, tmp_path: Path
) -> None:
    data = splits(tmp_path, fraction)
    feed = Feed(data, 0, batch_size)
    batches = fed(feed, 0)
    assert len(batches) == len(data.train) // batch_size == feed.steps, "as many as without"
    for batch in batches:
        assert sorted(mark for mark, _ in batch) == [0] * (batch_size - extra) + [1] * extra


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_place_of_a_row_says_nothing_of_its_origin(ranks: int, tmp_path: Path) -> None:
    data, epochs = splits(tmp_path, 0.5), 100
    for rank in range(ranks):
        feed = Feed(data, 0, BATCH, rank, ranks)
        marks = torch.tensor(
            [[m for m, _ in batch] for e in range(epochs) for batch in fed(feed, e)]
        )
        share = marks.float().mean(0)
        assert len(share) == BATCH // ranks and len(marks) == epochs * STEPS
        # Four standard errors of a fair coin.
        assert (share - 0.5).abs().max() < 4 * 0.5 / len(marks) ** 0.5
        assert len({tuple(row) for row in marks.tolist()}) > 60, "each batch in its own order"


def test_none_comes_again_before_all_of_its_kind_did(tmp_path: Path) -> None:
    data = splits(tmp_path)
    batches = [batch for epoch in range(40) for batch in fed(Feed(data, 3, BATCH), epoch)]
    held = {number for _, number in read(*data.val.fetch(torch.arange(VAL), "cpu"))}
    kinds = {0: set(range(ORIGINAL)) - held, 1: set(range(EXTRA))}
    for mark, everything in kinds.items():
        seen = Counter(dict.fromkeys(everything, 0))
        for batch in batches:
            seen.update(number for m, number in batch if m == mark)
            assert max(seen.values()) - min(seen.values()) <= 1
        assert seen.keys() == everything and min(seen.values()) >= 10
        together = {frozenset(n for m, n in batch if m == mark) for batch in batches}
        assert len(together) == len(batches), "shuffled anew"
    assert held and len(batches) == 40 * STEPS


def test_a_stretch_is_cut_out_of_passes_in_orders_of_their_own() -> None:
    whole = endless(10, 7, "extra", 0, 45)
    assert torch.equal(whole[10:20], permutation(10, 7, 1, "extra"))
    assert not torch.equal(whole[10:20], permutation(10, 7, 1))
    for start, length in ((0, 3), (8, 2), (8, 3), (10, 10), (9, 31), (20, 0), (25, 0)):
        assert torch.equal(endless(10, 7, "extra", start, length), whole[start : start + length])
    assert not torch.equal(whole, endless(10, 8, "extra", 0, 45))


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_are_equal_and_make_up_the_batch(ranks: int, tmp_path: Path) -> None:
    data = splits(tmp_path)
    for epoch in range(3):
        whole = fed(Feed(data, 0, BATCH), epoch)
        parts = [fed(Feed(data, 0, BATCH, rank, ranks), epoch) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            shares = [part[step] for part in parts]
            assert {len(share) for share in shares} == {BATCH // ranks}
            assert Counter(row for share in shares for row in share) == Counter(batch)
            extra = [sum(mark for mark, _ in share) for share in shares]
            assert max(extra) - min(extra) <= 1
            assert sum(extra) == 11


def test_batches_depend_on_seed_and_position_alone(tmp_path: Path) -> None:
    data = splits(tmp_path)
    for epoch in (0, 5):
        whole = fed(Feed(data, 0, BATCH), epoch)
        assert len(whole) == STEPS
        for first in range(STEPS + 1):
            assert fed(Feed(splits(tmp_path), 0, BATCH), epoch, first) == whole[first:]
        assert fed(Feed(data, 1, BATCH), epoch) != whole
    assert fed(Feed(data, 0, BATCH), 0) != whole


def test_without_extra_data_an_epoch_is_a_permutation(tmp_path: Path) -> None:
    for data in (
        splits(tmp_path, 0.0),
        sources.npz(path=str(tmp_path / "own.npz"), val=VAL).build(),
    ):
        assert data.extra is None and "extra" not in data.fingerprints()
        order = permutation(len(data.train), 9, 4)
        want = [read(*data.train.fetch(part, "cpu")) for part in order.split(BATCH)][:STEPS]
        assert fed(Feed(data, 9, BATCH), 4) == want


def test_a_fraction_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    for fraction, batch_size, ranks, message in (
        (0.01, 16, 1, "16 original and 0 extra images: take a larger batch"),
        (0.99, 16, 1, "0 original and 16 extra images"),
        (0.9, 16, 4, "2 original and 14 extra images for 4 devices"),
    ):
        with pytest.raises(UserError, match=message):
            Feed(splits(tmp_path, fraction), 0, batch_size, 0, ranks)


# --- the file --------------------------------------------------------------------------------


def test_the_file_is_opened_for_training_alone(tmp_path: Path) -> None:
    data = splits(tmp_path, file=str(tmp_path / "gone.npz"))
    bare = sources.npz(path=str(tmp_path / "own.npz"), val=VAL).build()
    assert data.info == bare.info and data.val.sha256() == bare.val.sha256()
    assert data.train.sha256() == bare.train.sha256()
    with pytest.raises(UserError, match=r"no file '.*gone.npz': name it with data.extra=FILE.npz"):
        assert data.extra


def images(data: Splits) -> tuple[Tensor, Tensor]:
    extra = data.extra
    assert isinstance(extra, StoredSplit)
    return extra.fetch(torch.arange(len(extra)), "cpu")


def test_all_ways_of_storing_give_the_same(tmp_path: Path) -> None:
    x, y = coded(EXTRA, 1), np.arange(EXTRA) % 3
    path = tmp_path / "e.npz"
    want, labels = images(splits(tmp_path))
    for save, changes in (
        (np.savez_compressed, {}),
        (np.savez, {"image": None, "label": None, "x_train": x, "y_train": y}),
        (np.savez, {"x_train": x, "y_train": y, "image": x[:3], "label": y[:2]}),
        (np.savez, {"image": x[..., 0]}),
        (np.savez, {"image": np.asfortranarray(x)}),
        (np.savez, {"image": (x / 255).astype(np.float64)}),
        (np.savez, {"label": y.astype(np.uint8)}),
    ):
        got, classes = images(splits(tmp_path, file=write(path, save, **changes)))
        assert got.shape == (EXTRA, 1, 2, 2) and torch.allclose(got, want, rtol=0, atol=1e-7)
        assert torch.equal(classes, labels)
    assert torch.equal(want, torch.from_numpy(x).permute(0, 3, 1, 2) / 255)


def test_what_savez_wrote_stays_in_the_file(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), np.uint8)
    for name, long in (("a", "a"), ("b", "b" * 200)):
        np.savez(tmp_path / f"{name}.npz", **{long: np.arange(3), "x": x})
        file = Archive(str(tmp_path / f"{name}.npz"), "data.extra", ("x",))
        mapped = file.mapped("x")
        assert isinstance(mapped, np.memmap) and np.array_equal(mapped, x)
        assert np.array_equal(file.mapped(long), np.arange(3))
    np.savez_compressed(tmp_path / "c.npz", x=x)
    packed = Archive(str(tmp_path / "c.npz"), "data.extra", ("x",)).mapped("x")
    assert not isinstance(packed, np.memmap) and np.array_equal(packed, x)
    assert np.shares_memory(np.asarray(mapped), np.asarray(mapped.reshape(-1, 4, 5, 3)))


def test_the_content_is_part_of_the_identity(tmp_path: Path) -> None:
    prints = splits(tmp_path).fingerprints()
    assert sorted(prints) == ["extra", "train", "val"]
    path = tmp_path / "e.npz"

    def now(**changes: Any) -> dict[str, str]:
        return splits(tmp_path, file=write(path, **changes)).fingerprints()

    assert now() == prints
    packed = splits(tmp_path, file=write(path, np.savez_compressed))
    assert packed.fingerprints() == prints, "however it is stored"
    other = coded(EXTRA, 1)
    other[5, 0, 0, 0] ^= 1
    for found in (now(image=other), now(label=(np.arange(EXTRA) + 1) % 3)):
        assert found["extra"] != prints["extra"]
        assert found["train"] == prints["train"]
    part = splits(tmp_path).extra
    assert part is not None
    assert part.subset([4, 1]).sha256() == part.subset(torch.tensor([4, 1])).sha256()
    assert read(*part.subset([4, 1]).fetch(torch.tensor([1, 0]), "cpu")) == [(1, 1), (1, 4)]


X, Y = coded(6, 1), np.arange(6) % 3
BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": X[:, :1]}, r"shape \(1, 1, 2\) and npz:own of \(1, 2, 2\) \(C, H, W\): bring the"),
    ({"image": X[0, 0]}, r"has shape \(2, 1\): images are \(N, H, W, C\)"),
    ({"image": X.astype(np.int64)}, "image in .* is int64: store uint8"),
    ({"image": X.astype(np.float32)}, r"outside \[0, 1\]: divide by 255"),
    ({"image": X.astype(object)}, "image in .* holds pickled Python objects"),
    ({"image": X[:5]}, "has 5 images and label in .* 6 labels: store one label per image"),
    ({"label": Y + 1}, "label in .* has the label 3, and there are 3 classes"),
    ({"label": Y - 1}, "label in .* has the label -1: number the classes from 0"),
    ({"label": Y / 2}, "label in .* is float64: labels are integers"),
    ({"label": np.eye(6)}, r"y.argmax\(1\)"),
    ({"label": None}, r"has no label \(it holds: image\): add what is missing"),
    ({"image": None}, r"has no x_train and no y_train \(it holds: label\)"),
    ({"image": None, "label": None, "x_test": X, "y_test": Y}, "has no x_train and no y_train"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = splits(tmp_path, file=write(tmp_path / "e.npz", **{"image": X, "label": Y} | changes))
    assert len(data.train) == ORIGINAL - VAL
    with pytest.raises(UserError, match=message) as error:
        assert data.extra
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "e.npz"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"cannot be read as .npz .*FILE, x_train=..., y_train"):
        assert splits(tmp_path, file=str(path)).extra


@pytest.mark.parametrize("fraction", [1.0, 1.5, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.extra_fraction=.*at least 0 and less than 1"):
        splits(tmp_path, fraction)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("room", [0.0, 0.25])
def test_an_accelerator_gives_the_same_and_is_not_waited_for(
    room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advbench.data.extra.ROOM", room)
    data = splits(tmp_path, augment=Augment(crop=1, cutmix=0.5))
    batches = Feed(data, 0, BATCH).batches(0, 0, "cuda")
    got, generator = [next(batches)], torch.Generator("cuda").manual_seed(0)
    data.augmented(*got[0], generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches:
            got.append((x, y))
            data.augmented(x, y, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [read(x.cpu(), y.cpu()) for x, y in got] == fed(Feed(data, 0, BATCH), 0)


# --- on the command line ---------------------------------------------------------------------

MISTAKES = {
    "no file": (["data.extra=no.npz"], "there is no file 'no.npz': name it with data.extra="),
    "no archive": (["data.extra=text.npz"], "cannot be read as .npz"),
    "shape": (["data.extra=bad.npz"], "images of shape (1, 2, 2) and digits of (1, 8, 8)"),
    "fraction": (["data.extra_fraction=1"], "give at least 0 and less than 1"),
    "fraction's type": (["data.extra_fraction=much"], "data.extra_fraction"),
    "key": (["data.extra_fracton=0.5"], "did you mean 'data.extra_fraction'?"),
    "too few": (["data.extra=ok.npz", "data.extra_fraction=0.001"], "128 original and 0 extra"),
    "probability": (["data.augment.cutmix=1.5"], "cutmix=1.5 is not a probability: give 0 to 1"),
}


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("bad.npz"))
    write(Path("ok.npz"), image=np.zeros((EXTRA, 8, 8), np.uint8))
    Path("text.npz").write_text("log in")
    for name, (arguments, expected) in MISTAKES.items():
        assert main(["train", *arguments]) == 2, name
        error = capsys.readouterr().err
        assert expected in error, name
        assert error.startswith("advbench: ") and error.count("\n") == 1, error
    assert len(MISTAKES) == 8


KILLED = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
import torch
from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data import sources
from advbench.data.augment import Augment
from advbench.defenses.base import Defense
from advbench.recipes.pgd_at import PGDAT
from advbench.training.optimizers import SGD
from advbench.training.trainer import Trainer

THREAT = Threat("linf", 0.15)

@dataclass(frozen=True)
class Killing(Defense):
    at: int = -1
    def after_step(self, model, step):
        assert step.targets is not None and step.targets.shape == (200, 10)
        if step.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

def train(folder, at=-1):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU())
    model = Classifier(trunk, num_features=32, num_classes=10, input_shape=(1, 8, 8),
                       mean=[0.3], std=[0.4])
    data = sources.digits(extra=sys.argv[1], augment=Augment(crop=1, cutmix=0.8)).build()
    Path(folder).mkdir(exist_ok=True)
    Trainer(epochs=3, batch_size=200, val_steps=1, save_every=0).fit(
        model, data, PGDAT(threat=THREAT, steps=1), Killing(at=at), SGD(), threat=THREAT, seed=0,
        folder=Path(folder), identity={"run": "a"})
    os._exit(0)

assert train("whole") == 0
for at in (2, 5, 9, 14):
    assert train("parts", at) == signal.SIGKILL, at
assert train("parts") == 0
for name in ("model.safetensors", "last.safetensors"):
    assert (Path("whole") / name).read_bytes() == (Path("parts") / name).read_bytes(), name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks to save the imports")
def test_a_killed_training_with_extra_data_and_cutmix_ends_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (333, 8, 8), np.uint8), rng.integers(0, 10, 333)
    np.savez(tmp_path / "e.npz", image=x, label=y)
    run_script(KILLED, "e.npz", folder=tmp_path)
    assert (tmp_path / "parts" / "summary.json").exists()
