"""Runs that were made to harm: one line, no hang, no network, no code; others are still shown."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import without_checksums

from advbench import config
from advbench.cli import list_runs
from advbench.cli.main import main

TRAIN = ["train", "trainer.epochs=2", "recipe.steps=1", "trainer.val_steps=1"]
EVAL = ["eval", "protocol=pgd", "protocol.steps=1", "n=4"]
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def place(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """A directory with a finished run and its evaluation."""

    def make() -> None:
        assert main([*TRAIN, "hydra.run.dir=good"]) == 0
        assert main([*EVAL, "run=good", "hydra.run.dir=result"]) == 0

    return start_in("hostile", make)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def copy(name: str, **changes: Any) -> None:
    """A copy of the good run with other nodes; a key with a dot goes inside."""
    shutil.copytree("good", name)
    without_checksums(name)
    cfg = yaml.safe_load(Path(name, "config.yaml").read_text())
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = cfg
        for group in groups:
            node = node[group]
        node[last] = value
    Path(name, "config.yaml").write_text(yaml.safe_dump(cfg))


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command said, in a few seconds."""
    capsys.readouterr()
    began = time.monotonic()
    assert main(command) == 2
    assert time.monotonic() - began < 60
    error = capsys.readouterr().err
    assert error.startswith("advbench: ") and error.count("\n") == 1, error
    return error


TIMM = {"_target_": "advbench.backbones.external.timm", "name": "resnet18", "pretrained": True,
        "num_classes": 10, "input_shape": [1, 8, 8], "mean": None, "std": None}  # fmt: skip
WIDE = {"_target_": "advbench.backbones.wide_resnet.wide_resnet", "activation": "relu",
        "num_classes": 10, "input_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}  # fmt: skip
NODES: dict[str, tuple[dict[str, Any], str]] = {
    "a function": ({"defense": "os.system"}, "its defense is 'os.system', not a component"),
    "a list": ({"defense": [1, 2]}, "its defense is [1, 2], not a component"),
    "a number": ({"backbone": 7}, "its backbone is 7, not a component"),
    "choices": ({"choices": "all"}, "its choices is 'all', not a component"),
    "no target": ({"defense___target_": None}, "no defense is chosen"),
    "a number as target": ({"defense___target_": 7}, "defense may not be '.7'"),
    "a list as target": ({"defense___target_": ["os.system"]}, "defense may not be"),
    "code": ({"defense___target_": "os.system"}, "defense may not be 'os.system'"),
    "an import": ({"defense___target_": "advbench.defenses.base.dataclass"}, "not a component"),
    "another group": ({"defense___target_": "advbench.recipes.pgd_at.PGDAT"}, "may not be"),
    "a helper": ({"defense___target_": "advbench.defenses.base.worst"}, "bad"),
    "endless": ({"backbone": {**WIDE, "depth": 6_000_004, "width": 1}}, "more than 20000 tensors"),
    "wide": ({"backbone": {**WIDE, "depth": 10, "width": 10**9}}, "takes more memory than"),
    "narrow": ({"backbone": {**WIDE, "depth": 10, "width": -1}}, "bad/config.yaml"),
    "classes": ({"backbone__num_classes": -3}, "bad/config.yaml"),
    "many classes": ({"backbone__num_classes": 10**12}, "takes more memory than"),
    "a shape": ({"backbone__input_shape": [1, -8]}, "bad/config.yaml"),
    "no shape": ({"backbone__input_shape": "x"}, "bad/config.yaml"),
    "a download": ({"backbone": TIMM}, "do not match the model"),
    "an interpolation": ({"seed": "${oc.env:HOME}"}, "no interpolations"),
    "data": ({"data": {"_target_": "advbench.data.npz.NpzSource"}}, ""),
    "a threat": ({"threat": {"_target_": "advbench.attacks.threat.Threat", "eps": [1]}}, ""),
}


@pytest.mark.parametrize("name", list(NODES))
def test_an_odd_node(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, expected = NODES[name]
    copy("bad", **changes)
    said = refused([*EVAL, "run=bad"], capsys)
    assert expected in said
    if name not in ("a download", "data", "a threat"):
        assert "bad/config.yaml" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "has no aliases"),
        ("a: " + "[" * 5000 + "]" * 5000, "nest"),
        ("a: " + "x" * 2**21, "no config is larger than"),
        ("\x00", "can't be read"),
        ("- 1", "is not a config"),
        ("", "not a "),
        ("a: [1", "can't be read"),
    ],
    ids=range(7),
)
def test_an_odd_text(
    text: str, expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy("bad")
    Path("bad/config.yaml").write_text(text)
    for command in ([*EVAL, "run=bad"], ["train", "init_from=bad"]):
        assert expected in refused(command, capsys)
    listed = list_runs.look(Path("bad"))
    assert listed is None or listed.state == "damaged"
    assert (listed is None) == (text in ("", "- 1"))


def test_an_odd_state_of_a_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = "hydra.run.dir=cut"
    assert main([*TRAIN, where]) == 0
    Path("cut/summary.json").unlink()
    identity = {"identity": json.dumps(1)}
    for content in (
        7, [], {}, {"identity": 1}, {"state": 1}, {**identity, "state": 7},
    ):  # fmt: skip
        torch.save(content, "cut/epoch.pt")
        assert "cut" in refused([*TRAIN, where], capsys)


def test_one_bad_run_does_not_hide_the_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for name, file, content in (
        ("csv", "metrics.csv", "epoch\n" + "9" * 200_000),
        ("json", "summary.json", deep),
        ("bytes", "metrics.csv", "\x00\xff"),
    ):
        copy(name)
        Path(name, "summary.json").unlink()
        Path(name, file).write_text(content, encoding="latin-1")
    shutil.copytree("result", "deep")
    Path("deep/results.json").write_text(deep)
    capsys.readouterr()
    assert main(["list", "runs", "."]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[-1]: line.split()[0] for line in lines if len(line.split()) > 5}
    assert {states[name] for name in ("csv", "json", "bytes", "deep")} == {"damaged"}
    assert states["good"] == states["result"] == "finished"
    assert main(["report", "."]) == 0
    assert main(["report", "result", "deep", "--html", str(tmp_path / "page.html")]) == 0


def test_arrays_that_lie(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io
    import zipfile

    header = io.BytesIO()
    shape = (10**12, 8, 8, 1)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    labels = io.BytesIO()
    np.save(labels, np.arange(10))
    own = ["eval", "run=good", "data=npz", "data.path=lie.npz", "protocol=pgd"]
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile("lie.npz", "w", kind) as file:
            file.writestr("x_test.npy", header.getvalue() + b"\0" * 64)
            file.writestr("y_test.npy", labels.getvalue())
        assert "x_test in 'lie.npz' is damaged" in refused(own, capsys)
    x = np.zeros((20, 8, 8, 1), np.uint8) + 200
    for y, expected in (
        (np.full(20, 2**64 - 1, np.uint64), "18446744073709551615"),
        (np.full(20, 2**63, np.uint64), "9223372036854775808"),
    ):
        np.savez("lie.npz", x_test=x, y_test=y)
        assert expected in refused(own, capsys)
    np.savez("lie.npz", x_test=x, y_test=np.arange(20, dtype=np.uint64) % 10)
    assert main([*own, "protocol.steps=1", "hydra.run.dir=unsigned"]) == 0
    assert "data.num_classes" in refused([*own, "data.num_classes=1000000000000"], capsys)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    text = "a: 1e-05\nb: 1.0e-5\nc: [1, x]\nchoices: {data: digits}\n"
    (tmp_path / "config.yaml").write_text(text)
    assert config.plain(config.read(tmp_path / "config.yaml")) == {
        "a": 1e-5, "b": 1e-5, "c": [1, "x"], "choices": {"data": "digits"},
    }  # fmt: skip
