"""A directory to type commands in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import FAST, MODEL, arrays

from advbench.cli.main import main


@pytest.fixture
def place(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """A directory with a finished run, an interrupted one, models and data."""

    def make() -> None:
        Path("m.py").write_text(MODEL)
        np.savez("ok.npz", **arrays())  # pyright: ignore
        assert main(["train", "hydra.run.dir=good", *FAST]) == 0
        cut = Path("cut")
        cut.mkdir()
        (cut / "config.yaml").write_text(Path("good/config.yaml").read_text())

    return start_in("place", make)
