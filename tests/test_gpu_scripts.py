"""The scripts for a first half hour with a GPU run anywhere, at a tiny size."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from advbench.cli import main as command_line

SCRIPTS = Path(__file__).parents[1] / "scripts" / "gpu"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of them; its commands run in this process, which spares their imports."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def here(*words: str) -> float:
        assert command_line(list(words)) == 0, words
        return 1.0

    def load(name: str) -> Any:
        module = importlib.import_module(name)
        if hasattr(module, "advbench") and name != "sitting":
            monkeypatch.setattr(module, "advbench", here)
        return module

    yield load
    for name in (
        "sitting",
        "check",
        "train",
        "evaluate",
        "defenses",
        "images",
        "slim",
        "table",
        "count",
    ):
        sys.modules.pop(name, None)


def call(monkeypatch: pytest.MonkeyPatch, module: Any, out: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__file__, "--tiny", "--out", str(out), *words])
    return module.main()


def records(path: Path) -> dict[str, Any]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["case"]: line for line in lines}


def test_train_and_evaluate(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = scripts("evaluate")
    with pytest.raises(SystemExit, match=r"run train\.py first"):
        call(monkeypatch, evaluate, tmp_path)
    assert call(monkeypatch, scripts("train"), tmp_path, "--only", "full") == 0
    trained = records(tmp_path / "train-tiny.jsonl")["full"]
    assert 0.3 < trained["last"]["val_clean"] <= 1
    names = ["float32-16", "reference-16"]
    assert call(monkeypatch, evaluate, tmp_path, "--only", *names) == 0
    found = records(tmp_path / "evaluate-tiny.jsonl")
    assert list(found) == names
    assert all(0 <= found[name]["robust"] <= found[name]["clean"] <= 16 for name in names)


def test_defenses(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, scripts("defenses"), tmp_path) == 0
    assert records(tmp_path / "defenses-tiny.jsonl")["jumprelu"]["n"] == 20


def test_check(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["ceilings", "passes-float32-nhwc", "waits-apgd-ce", "agree-apgd-ce"]
    check = scripts("check")
    assert call(monkeypatch, check, tmp_path, "--only", *names) == 0
    found = records(tmp_path / "check-tiny.jsonl")
    assert list(found) == names
    assert found["passes-float32-nhwc"]["both_TFLOPs"] > 0
    assert found["agree-apgd-ce"]["differ"] == 0


def test_a_sitting_repeats_nothing_and_loses_nothing(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sitting = scripts("sitting")
    calls: list[str] = []

    def good() -> dict[str, Any]:
        calls.append("good")
        return {"value": 1.5}

    def bad() -> dict[str, Any]:
        calls.append("bad")
        raise ValueError("no")

    given = sitting.parser("Words.").parse_args(["--out", str(tmp_path), "--tiny"])
    cases = {"good": good, "bad": bad}
    assert sitting.Sitting("s", given, cases).run() == 1  # a failure leaves no record
    assert sitting.Sitting("s", given, cases).run() == 1
    assert calls == ["good", "bad", "bad"]
    assert "| good | 1.5 |" in capsys.readouterr().out
    late = sitting.parser("Words.").parse_args(["--out", str(tmp_path), "--tiny", "--limit=-1"])
    assert sitting.Sitting("s", late, {"good": good, "other": good}).run() == 1
    assert "left for the next call: other" in capsys.readouterr().out


def test_images_come_back(scripts: Any, tmp_path: Path) -> None:
    import numpy as np

    images = scripts("images")
    ramp = np.linspace(40, 200, 32).astype(np.uint8)
    x = np.broadcast_to(ramp[None, :, None, None], (5, 32, 32, 3)).copy()
    arrays: dict[str, Any] = {f"{name}_{part}": v for part in ("train", "test")
              for name, v in (("x", x), ("y", np.arange(5)))}  # fmt: skip
    np.savez(tmp_path / "a.npz", **arrays)
    images.pack(tmp_path / "a.npz", tmp_path / "b.npz", 75)
    images.unpack(tmp_path / "b.npz", tmp_path / "c.npz")
    back = np.load(tmp_path / "c.npz")
    assert back["x_test"].shape == x.shape
    assert np.abs(back["x_test"].astype(int) - x).max() <= 8
    assert (back["y_train"] == np.arange(5)).all()


def test_a_wheel_without_its_examples(scripts: Any, tmp_path: Path) -> None:
    slim = scripts("slim")
    wheel = tmp_path / "a-1-py3-none-any.whl"
    record = "a/b.py,,\na/examples/c.pt,,\na-1.dist-info/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a/b.py", "1")
        file.writestr("a/examples/c.pt", "2")
        file.writestr("a-1.dist-info/RECORD", record)
    slim.slim(wheel, {"examples"})
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["a/b.py", "a-1.dist-info/RECORD"]
        assert "examples" not in file.read("a-1.dist-info/RECORD").decode()


def test_count(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = scripts("count")
    monkeypatch.setattr(count, "ROWS", 4)
    monkeypatch.setitem(count.STEPS, "APGD-CE", (4, 6))
    operations, waits = count.per_query("APGD-CE", "linf")
    assert 80 < operations < 150 and waits == 1
