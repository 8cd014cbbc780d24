"""Progress of long work: one protocol, and an object that shows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Shows the progress of a training or of an evaluation. The first process alone calls it.

    Derive from ``NullProgress`` to implement some of the methods only.
    """

    def note(self, text: str) -> None:
        """Show ``text``, one line."""
        ...

    def stage(self, name: str, total: int) -> None:
        """Begin a part of the work.

        Args:
            name: of the stage. Samples that are attacked in groups repeat it for each group.
            total: what there is to do in it: steps of a training, samples of a stage.
        """
        ...

    def update(
        self,
        done: int,
        text: str = "",
        *,
        correct: int | None = None,
        samples: int | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Say how far the stage is, at most a few times a second.

        Args:
            done: steps or samples of the ``total`` that ``stage`` named.
            text: a few words on the state, such as epoch and loss.
            correct: samples that are still classified correctly; None in a training.
            samples: all samples of the evaluation, of which ``correct`` are correct.
            seconds_left: a forecast for the stage; None where there is none.
        """
        ...

    def epoch(self, row: Mapping[str, float]) -> None:
        """Show a finished epoch of a training: ``row`` is that of metrics.csv, by column."""
        ...


class NullProgress(Progress):
    """Shows nothing."""

    def note(self, text: str) -> None:
        pass

    def stage(self, name: str, total: int) -> None:
        pass

    def update(
        self,
        done: int,
        text: str = "",
        *,
        correct: int | None = None,
        samples: int | None = None,
        seconds_left: float | None = None,
    ) -> None:
        pass

    def epoch(self, row: Mapping[str, float]) -> None:
        pass
