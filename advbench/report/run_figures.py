"""All that a report shows of one evaluation, read from its files, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from advbench.errors import UserError
from advbench.files import read_rows
from advbench.report import plots
from advbench.report.collection import Entry
from advbench.report.evidence import Evidence
from advbench.report.gallery import Gallery, Library, Opened, gallery
from advbench.runs import directory, manifest
from advbench.runs.manifest import checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plate:
    """A figure to be: nothing is drawn before ``draw`` is called.

    name: for a file.  title, caption: for a page.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass
class Dossier:
    """One evaluation with what its files hold; what can't be read is None and said in ``notes``.

    names: of the classes, by label.  learning: columns of the training's metrics.csv.
    """

    entry: Entry
    evidence: Evidence | None = None
    names: Sequence[str] = ()
    gallery: Gallery | None = None
    learning: Mapping[str, np.ndarray] = field(default_factory=dict)
    best: int | None = None
    notes: list[str] = field(default_factory=list)

    def plates(self) -> Iterator[Plate]:
        """Its figures, but for the learning curves and the gallery."""
        results, evidence = self.entry.results, self.evidence
        if plots.radii(results):
            yield Plate(
                "curve",
                "Robust accuracy over the radius",
                "A sample that breaks at one radius is broken at every larger one. "
                f"Band: Wilson 95 %.{self._unfinished()}",
                lambda: plots.curve({results.run: results}),
            )
        elif results.attacked:
            yield Plate(
                "stages",
                "What each stage left",
                "Accuracy after each attack in turn, each on the survivors. Bars: Wilson 95 %."
                f"{self._unfinished()}",
                lambda: plots.stages(results),
            )
        if evidence is None or not len(evidence.classes()):
            return
        partly = "" if evidence.complete else " Of images that were classified correctly at first."
        yield Plate(
            "classes",
            "Accuracy by class",
            "Still correct, in per cent, after the stages that broke something. In brackets: "
            f"images.{partly}{self._only_worst(evidence)}",
            lambda: plots.classes(evidence, self.names),
        )
        if not results.attacked:
            return
        yield Plate(
            "confusion",
            "What broken images are taken for",
            f"Images by true class and class after the attack; shades are shares of a row.{partly}",
            lambda: plots.confusion(evidence, self.names),
        )
        yield Plate(
            "margins",
            "Margins before and after",
            "Left of the dashed line an image is misclassified. After the attack: the smallest "
            "margin seen.",
            lambda: plots.margins(evidence),
        )

    def learning_plate(self) -> Plate | None:
        if "epoch" not in self.learning:
            return None
        chosen = "" if self.best is None else f" Dashed line: epoch {self.best}, which was chosen."
        return Plate(
            "learning",
            "Training",
            f"Accuracy and loss over the epochs.{chosen}",
            lambda: plots.learning(self.learning, self.best),
        )

    def _unfinished(self) -> str:
        """What the figures do not show, because it was not done."""
        missing = self.entry.results.missing
        return (
            f" Unfinished: the budget was spent before the end of {', '.join(missing)}."
            if missing
            else ""
        )

    @staticmethod
    def _only_worst(evidence: Evidence) -> str:
        total, shown = len(evidence.classes()), plots.MOST_CLASSES
        return f" The {shown} worst of {total} classes." if total > shown else ""


def read(entry: Entry, library: Library) -> Dossier:
    """Read everything there is. Never raises for files that are missing, damaged or strange."""
    dossier = Dossier(entry)
    try:
        directory.refuse_links(entry.folder)
        records = entry.records
    except UserError as problem:
        dossier.notes.append(f"No figures from single images: {problem}.")
        _read_training(dossier)
        return dossier
    opened: Opened | None = None
    try:
        opened = library.open(entry)
        dossier.names = opened.names
    except UserError as problem:
        dossier.notes.append(f"The data could not be opened ({problem}): no clean images to show.")
    try:
        dossier.evidence = Evidence.of(records, opened.labels if opened else None)
        if opened is not None:
            dossier.gallery = gallery(entry, opened)
    except (ValueError, IndexError, UserError) as problem:
        dossier.notes.append(f"Left out: {problem}.")
    _read_training(dossier)
    return dossier


def _read_training(dossier: Dossier) -> None:
    folder = dossier.entry.training
    if folder is None:
        return
    try:
        directory.refuse_links(folder)
        dossier.learning = read_metrics(folder / "metrics.csv")
        dossier.best = _best_epoch(folder / directory.SUMMARY)
    except (UserError, OSError) as problem:
        dossier.notes.append(f"No learning curves: {problem}.")


def _best_epoch(path: Path) -> int | None:
    """Of a training, also of one whose summary an older advbench wrote; None if it is not told."""
    try:
        best = manifest.read_json(path)["best_epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return best if isinstance(best, int) else None


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a metrics.csv, NaN where a row has nothing.

    Raises UserError for a file without epochs or with words in it.
    """
    try:
        rows = read_rows(checked(path))
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
        if not np.isfinite(columns["epoch"]).all():
            raise ValueError("an epoch is missing")
    except (ValueError, KeyError, IndexError, TypeError) as problem:
        raise UserError(f"'{path}' is not a table of epochs: {problem}") from problem
    return columns
