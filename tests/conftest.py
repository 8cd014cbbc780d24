"""One thread per process: the models here are small, and the suite runs in several processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from advbench.training import settings, trainer

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs the network, unless it is asked for."""
    if "network" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("network")])
        items[:] = [item for item in items if not item.get_closest_marker("network")]


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of a test, imported in this process, do not keep their names from the next test's."""
    before, folder = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as one with bfloat16, so that this mode is tested on any machine.

    A processor that only emulates it gives the same kind of numbers, only later.
    """
    for module in (settings, trainer):
        monkeypatch.setattr(module, "emulates_bf16", lambda device: False)
