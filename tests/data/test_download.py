"""Published sets that are missing, damaged or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_data import (
    MAKERS,
    TORCHVISION,
    as_float,
    build,
    damage_test_part,
    everything,
    make_cifar,
    make_mnist,
    one_line,
)

from advbench.data import sources, torchvision_sets
from advbench.errors import UserError

# --- torchvision: missing, damaged, downloads ------------------------------------------------


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_missing_set_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for part in ("train", "val", "test"):
        with pytest.raises(UserError) as error:
            getattr(getattr(sources, name)(root=str(root)).build(), part)
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
        assert getattr(sources, name)(root=str(tmp_path), download=True).build().train
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
