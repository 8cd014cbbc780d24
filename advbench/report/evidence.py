"""What the per-sample records of an evaluation say, as arrays; computed, never stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from advbench.evaluation.job import CLEAN
from advbench.evaluation.store import Records

UNKNOWN = -1


@dataclass(frozen=True)
class Evidence:
    """N samples, from their clean image to the end of the last stage. Arrays of length N.

    sample: ids, sorted.  truth: class, UNKNOWN where nobody told (see ``of``).  clean: class of the
    clean image.  final: class after the attack, of a sample that held its own.  fell: index of the
    column of ``stages`` in which the sample was lost, -1 for one that held.  clean_margin,
    final_margin: true logit minus the best wrong one, on the clean image and the smallest seen
    anywhere.  distance: of the image that broke it, NaN where there is none.
    stages: ``clean`` first.
    """

    stages: tuple[str, ...]
    sample: np.ndarray
    truth: np.ndarray
    clean: np.ndarray
    final: np.ndarray
    fell: np.ndarray
    clean_margin: np.ndarray
    final_margin: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, records: Mapping[str, Records], labels: np.ndarray | None = None) -> Evidence:
        """From the records of all stages, in order.

        labels: of the whole split, by sample id. Records name the true class of a sample that held;
        without labels, that of one whose clean image was misclassified stays UNKNOWN.
        Raises ValueError for records that are not of one evaluation.
        """
        names = (CLEAN, *(name for name in records if name != CLEAN))
        if CLEAN not in records:
            raise ValueError("there are no records of the clean images")
        first = records[CLEAN]
        n = len(first)
        predicted = np.where(first.broken, UNKNOWN, first.label)
        truth = predicted if labels is None else labels[first.sample]
        if labels is not None and (truth != predicted)[~first.broken].any():
            raise ValueError("the labels are not the evaluation's")
        final, margin = first.label.copy(), first.margin.astype(float)
        fell = np.where(first.broken, 0, -1)
        distance = np.full(n, np.nan)
        for column, name in enumerate(names[1:], 1):
            stage = records[name]
            if not np.isin(stage.sample, first.sample).all():
                raise ValueError(f"stage {name} has samples that the clean images lack")
            position = np.searchsorted(first.sample, stage.sample)
            margin[position] = np.fmin(margin[position], stage.margin)
            new = stage.broken & (fell[position] < 0)
            final[position[new]] = stage.label[new]
            fell[position[new]] = column
            distance[position[new]] = stage.distance[new]
        return cls(
            stages=names,
            sample=first.sample,
            truth=truth,
            clean=first.label,
            final=final,
            fell=fell,
            clean_margin=first.margin.astype(float),
            final_margin=margin,
            distance=distance,
        )

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def complete(self) -> bool:
        """Whether the class of every sample is known."""
        return not (self.truth == UNKNOWN).any()

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: samples whose class is known."""
        return self.truth != UNKNOWN

    def classes(self) -> np.ndarray:
        """The classes that occur among the samples, ascending."""
        return np.unique(self.truth[self.known])

    def columns(self) -> list[int]:
        """Clean, and the stages that broke something: where a table by stage changes."""
        return [0, *(c for c in range(1, len(self.stages)) if (self.fell == c).any())]

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Still correct after each of ``columns``, and samples: (classes, columns), (classes,)."""
        classes, columns = self.classes(), self.columns()
        robust = np.stack([(self.fell < 0) | (self.fell > c) for c in columns], 1)
        mine = self.truth[None, :] == classes[:, None]
        return (mine @ robust.astype(np.int64)), mine.sum(1)

    def confusion(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes and counts (true class, class after the attack), of samples of known class."""
        truth, final = self.truth[self.known], self.final[self.known]
        classes = np.unique(np.concatenate([truth, final]))
        counts = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(counts, (np.searchsorted(classes, truth), np.searchsorted(classes, final)), 1)
        return classes, counts
