"""The table to choose a setting by: validation results of trainings, over their seeds."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from advbench import config
from advbench.cli.main import main
from advbench.report import validation


def trained(folder: Path, seed: int, rate: float, clean: float, robust: float | None) -> None:
    """A finished training, as far as its config and its summary tell."""
    folder.mkdir(parents=True)
    node = {
        "seed": seed,
        "init_from": None,
        "choices": {"backbone": "convnet", "defense": "none", "recipe": "pgd_at", "data": "digits"},
        "data": config.plain(config.shipped("data", "digits")),
        "backbone": config.plain(config.shipped("backbone", "convnet")),
        "defense": config.plain(config.shipped("defense", "none")),
        "recipe": config.plain(config.shipped("recipe", "pgd_at")),
        "optimizer": {**config.plain(config.shipped("optimizer", "sgd")), "lr": rate},
        "threat": config.plain(config.shipped("threat", "linf_8")),
        "trainer": {"epochs": 3},
    }
    (folder / "config.yaml").write_text(json.dumps(node))
    val = {"n": 100, "clean": clean, "robust": robust, "attack": robust and "PGD-10, linf 8/255"}
    (folder / "summary.json").write_text(json.dumps({"val": val}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for seed, robust in ((1, 0.4), (2, 0.44)):
        trained(tmp_path / f"a{seed}", seed, 0.1, 0.9, robust)
        trained(tmp_path / f"b{seed}", seed, 0.2, 0.8, robust + 0.1)
    return tmp_path


def test_the_best_setting_comes_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = validation.table([place])
    assert found.keys == ("optimizer.lr",)
    sheet = found.sheet()
    assert sheet.title == "validation, PGD-10, linf 8/255"
    assert sheet.headings == ("optimizer.lr", "seeds", "clean", "robust")
    assert sheet.rows == (
        ("0.2", "2", "80.0 ± 0.0", "52.0 ± 2.8"),
        ("0.1", "2", "90.0 ± 0.0", "42.0 ± 2.8"),
    )
    (place / "bad").mkdir()
    (place / "bad/summary.json").write_text("[]")
    assert main(["report", "--validation", str(place)]) == 0
    shown = capsys.readouterr()
    assert "optimizer.lr" in shown.out and shown.err.count("\n") == 1
    for form in ("md", "latex", "json", "csv"):
        assert main(["report", "--validation", str(place), "--format", form]) == 0
        text = capsys.readouterr().out
        assert "52.0" in text or "0.52" in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["val_robust"]) for row in rows] == pytest.approx([0.52, 0.42])


def test_without_trainings_it_says_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--validation", str(tmp_path)]) == 2
    assert "make one with 'advbench train'" in capsys.readouterr().err


def test_what_robustness_was_not_measured_of_comes_last(tmp_path: Path) -> None:
    trained(tmp_path / "plain", 0, 0.1, 0.99, None)
    trained(tmp_path / "hard", 0, 0.2, 0.8, 0.1)
    sheet = validation.table([tmp_path]).sheet()
    assert [row[-1] for row in sheet.rows] == ["10.0", "-"] and "attack" in sheet.headings
