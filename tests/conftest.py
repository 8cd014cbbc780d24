"""What holds for every test: one thread, its own modules and random numbers, any order."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from advbench.training import settings, trainer

# The models here are small, and the suite runs in several processes, which start others.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the modules, and the tests of each, in the random order of this seed"
    parser.addoption("--shuffle", type=int, metavar="SEED", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs the network, unless it is asked for; shuffle where asked for."""
    if "network" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("network")])
        items[:] = [item for item in items if not item.get_closest_marker("network")]
    if (seed := config.getoption("shuffle")) is not None:
        modules: dict[Path, list[pytest.Item]] = {}
        for item in items:
            modules.setdefault(item.path, []).append(item)
        generator, groups = random.Random(seed), list(modules.values())
        for group in (groups, *groups):
            generator.shuffle(group)
        items[:] = chain.from_iterable(groups)


def pytest_collection_finish() -> None:
    """What was imported stays: searching all of it for garbage is a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test draws numbers that depend on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of a test, imported in this process, do not keep their names from the next test's."""
    before, folder = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], None]], Path]:
    """A directory that is made once per session, by the process that comes first, and only read.

    make: fills the current directory.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which all workers share

    def once(name: str, make: Callable[[], None]) -> Path:
        folder, made = root / f"shared-{name}", root / f"shared-{name}.made"
        with FileLock(root / f"shared-{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                with pytest.MonkeyPatch.context() as patch:
                    patch.chdir(folder)
                    make()
                made.touch()
        return folder

    return once


@pytest.fixture
def start_in(
    once: Callable[[str, Callable[[], None]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str, Callable[[], None]], Path]]:
    """Puts a test in a directory of its own, a copy of the one that ``once`` makes."""
    folder = tmp_path.with_name(f"{tmp_path.name}-start")

    def start_in(name: str, make: Callable[[], None]) -> Path:
        shutil.copytree(once(name, make), folder)
        monkeypatch.chdir(folder)
        return folder

    yield start_in
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device counts as one with bfloat16, so that this mode is tested on any machine.

    A processor that only emulates it gives the same kind of numbers, only later.
    """
    for module in (settings, trainer):
        monkeypatch.setattr(module, "emulates_bf16", lambda device: False)


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a device whose compiled models hand out the same memory at every call."""
    from advbench import devices

    monkeypatch.setattr(devices, "WITH_GRAPHS", {"cpu"})
