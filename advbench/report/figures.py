"""The figures as files, for papers and slides: ``advbench report --plots``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from advbench.files import write_atomic
from advbench.report import group_figures, plots, run_figures
from advbench.report.collection import Entry, find
from advbench.report.gallery import Library
from advbench.report.run_figures import Plate
from advbench.report.style import style

DPI = 300
FORMATS = ("png", "pdf")
LONGEST = 90
"""Characters of a part of a file's name; a name has two, and file systems end at 255."""


def save(paths: Sequence[Path], folder: Path) -> None:
    """Write each figure of the evaluations below the paths as PNG and PDF, and say where.

    Those of one evaluation go to a folder of its name, those over several to ``folder`` itself.
    Raises UserError if there are no evaluations.
    """
    entries = find(paths)
    with style():
        shared = [_write(plate, folder) for plate in _together(entries)]
        print(f"{folder}: {', '.join(shared)}")
        library, names = Library(), set[str]()
        for entry in entries:
            name = _free(entry.folder.resolve().name, names)
            written = [_write(plate, folder / name) for plate in _alone(entry, library)]
            print(f"{folder / name}: {', '.join(written)}", flush=True)


def _together(entries: Sequence[Entry]) -> Iterator[Plate]:
    """Figures over evaluations that may be ranked together, with their conditions in the name."""
    names = set[str]()
    for same in group_figures.ranked(entries):
        first = same[0]
        about = slug(f"{first.data}-{first.threat_name}-{first.results.protocol['name']}")
        plates = [group_figures.board_plate(same), group_figures.curves_plate(same)]
        for sweep in group_figures.sweeps(same):
            plates += [
                Plate(f"{plate.name}-{slug(sweep.key)}", plate.title, plate.caption, plate.draw)
                for plate in sweep.plates()
            ]
        for plate in plates:
            if plate is not None:
                name = _free(f"{plate.name}-{about}", names)
                yield Plate(name, plate.title, plate.caption, plate.draw)


def _alone(entry: Entry, library: Library) -> Iterator[Plate]:
    dossier = run_figures.read(entry, library)
    yield from dossier.plates()
    if plate := dossier.learning_plate():
        yield plate
    if (shown := dossier.gallery) is not None:
        yield Plate("images", "Images", "", lambda: plots.pictures(shown))


def _write(plate: Plate, folder: Path) -> str:
    """Write a figure in all formats; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = plate.draw()
    for kind in FORMATS:
        dates = {"CreationDate": None} if kind == "pdf" else {}
        write_atomic(
            folder / f"{plate.name}.{kind}",
            lambda path, kind=kind, dates=dates: figure.savefig(
                path, format=kind, dpi=DPI, metadata=dates
            ),
        )
    return plate.name


def slug(text: str) -> str:
    """Letters, digits, dots and dashes of a text: what is safe in the name of a file."""
    safe = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._") or "_"
    return safe if len(safe) <= LONGEST else f"{safe[: LONGEST // 2]}_{safe[-LONGEST // 3 :]}"


def _free(name: str, names: set[str]) -> str:
    """The name as a file name, numbered if it was given out before."""
    base = free = slug(name)
    number = 2
    while free in names:
        free, number = f"{base}-{number}", number + 1
    names.add(free)
    return free
