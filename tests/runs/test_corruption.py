"""Every file of a run, damaged in every way: noticed in one line, or without effect on a number."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
LEFT_TO_RESUMING = {"model.safetensors", "last.safetensors", "metrics.csv"}
"""Of an interrupted training: they are written anew from its state."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The benchmark that flips bits; its runs and looks are used here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("corruption")
        sys.modules.pop("corruption", None)


@pytest.fixture
def runs(bench: Any, start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """Four runs, and four of another seed."""

    def make() -> None:
        bench.make(Path("runs"))
        bench.make(Path("others"), seed=1)

    return start_in("corruption", make)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def replaced(path: Path) -> None:
    """By the file of another run."""
    shutil.copyfile(Path(str(path.absolute()).replace("copy", "others", 1)), path)


def removed(path: Path) -> None:
    path.unlink()


def symlinked(path: Path) -> None:
    shutil.move(path, "elsewhere")
    path.symlink_to(Path("elsewhere").absolute())


WAYS = (truncated, flipped, emptied, replaced, removed, symlinked)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_damaged_file_changes_no_number_in_silence(
    runs: Path, bench: Any, kind: str, way: Callable[[Path], None]
) -> None:
    seen = {}
    for case in bench.cases_in(Path("runs")):
        if not case.name.startswith(kind):
            continue
        copy = Path("copy") / case.folder.name
        whole = case.look(bench.fresh(case, copy))
        for names in together(case):

            def damage(folder: Path, names: tuple[str, ...] = names) -> None:
                for name in names:
                    way(folder / name)

            seen[case.name, names[0]] = bench.outcome(case, damage, copy, whole)
    assert len(seen) >= (9 if kind == "training" else 10)
    for (name, file), (found, why) in seen.items():
        assert found in ("noticed", "harmless"), (name, file, found, why)
        seal = file in ("summary.json", "results.json")  # without it the work is done again
        if "finished" in name and file != "config.yaml" and not (seal and way is removed):
            assert found == "noticed", (name, file, why)
            assert Path(file).name in why or (seal and way is replaced), (name, file, why)
        elif Path(file).suffix in (".pt", ".npz") and way is not removed:
            assert found == "noticed" and (file in why or way is replaced), (name, file, why)


def together(case: Any) -> list[tuple[str, ...]]:
    """The files of a run that are damaged one by one, and those that are so at once."""
    names = [name for name in case.files if not name.endswith(("1.npz", "2.npz", "3.npz", "4.npz"))]
    if case.name != "training, interrupted":
        return [(name,) for name in names]
    return [
        *((name,) for name in names if name not in LEFT_TO_RESUMING),
        tuple(sorted(LEFT_TO_RESUMING)),
    ]
