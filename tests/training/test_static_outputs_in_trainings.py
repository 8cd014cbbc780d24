"""Results of a compiled trunk and head hold until the next call, and training relies on no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from components import DEFENSES
from small import assert_same_result
from static_outputs import compiling
from test_training_on_device import TRAINER, train

pytestmark = pytest.mark.usefixtures("with_graphs")

COMPILED = replace(TRAINER, compile="reduce-overhead", epochs=2)


@pytest.mark.parametrize(
    ("defense", "recipe"),
    [("hpm", "pgd_at"), ("none", "trades"), ("none", "mart"), ("none", "mixed"), ("none", "awp")],
)
def test_the_same_bytes(defense: str, recipe: str, tmp_path: Path) -> None:
    for fresh in (True, False):
        with compiling(fresh) as calls:
            folder = tmp_path / str(fresh)
            assert train(folder, DEFENSES[defense], recipe, trainer=COMPILED).steps == 4
        assert calls == 2 * [{"mode": "reduce-overhead", "dynamic": False}]
    assert_same_result(tmp_path / "True", tmp_path / "False")
