"""An evaluation that nothing disturbed, and one that writes everything down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_up_searches import evaluation

from advbench.evaluation import search


@pytest.fixture
def whole(once: Callable[[str, Callable[[], None]], Path]) -> Path:
    """An evaluation that nothing disturbed."""

    def make() -> None:
        case = evaluation()
        results = case.execute(Path("."), case.plan())
        broken = [stage.broken for stage in results.stages]
        assert broken[0] > 3 and sum(broken[1:]) > 0 and results.robust.acc > 0.1, broken

    return once("evaluation", make)


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written down at once."""
    for name in ("COMMIT_SECONDS", "SHOW_SECONDS", "SAVE_SECONDS"):
        monkeypatch.setattr(search, name, 0.0)
    monkeypatch.setattr(search, "SAVE_SHARE", np.inf)
