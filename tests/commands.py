"""Settings, data and models of the command lines that tests give, and how a mistake is answered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from advbench.cli.main import main

FAST = ["trainer.epochs=1", "recipe.steps=2", "trainer.val_steps=1"]
MODEL = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def resnet():
    from torchvision.models import resnet18

    return resnet18(num_classes=5)


def shaped():
    model = build()
    model.input_shape = [3, 8, 8]
    return model


def half():
    return nn.Linear(2, 2).half
"""


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {
        "x_train": random.integers(0, 256, (64, 8, 8, 3), np.uint8),
        "y_train": random.integers(0, 5, 64),
        "x_test": random.integers(0, 256, (32, 8, 8, 3), np.uint8),
        "y_test": random.integers(0, 5, 32),
    }
    return {**made, **changes}


def save(name: str, **changes: np.ndarray) -> str:
    np.savez(name, **arrays(**changes))  # pyright: ignore
    return f"data.path={name}"


def without_checksums(*folders: str | Path) -> None:
    """Leave runs as an earlier version wrote them, or as who forges them would."""
    for folder in folders:
        for name in ("summary.json", "results.json", "plan.json"):
            if (file := Path(folder, name)).exists():
                content = json.loads(file.read_text())
                del content["checksum"]
                content.pop("files", None)
                file.write_text(json.dumps(content))


CPU = ["trainer.accelerator=cpu"]
OWN = ["eval", "model=m.py:build", "data=npz", "data.path=ok.npz", "threat=linf_8", "protocol=pgd"]


def complain(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path for path in Path.cwd().rglob("*") if path.is_dir()}
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.removeprefix("[0] ")  # of a sweep
    assert expected in error
    assert error.startswith("advbench: ") and error.count("\n") == 1, error
    assert "Traceback" not in error
    assert {path for path in Path.cwd().rglob("*") if path.is_dir()} == before, "left something"
