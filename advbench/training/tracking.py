"""A training as others follow it: loggers, and the curves as a picture.

A logger gets all rows of metrics.csv after each epoch and logs those that are new to it. So an
interrupted run continues there without a row twice, and the same command with another logger sends
it all rows. No failure of a logger ends a training.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from advbench.errors import UserError
from advbench.progress import Progress
from advbench.training.checkpoint import METRICS
from advbench.training.metrics import Row, read_table
from advbench.training.summary import Summary

PICTURE = "curves.png"
REDRAW = 60.0
"""Seconds between two pictures of a running training."""

Draw = Callable[[Path, int | None], None]
"""Draws the curves of the run in a folder; which epoch is the best is known at the end."""


@dataclass(frozen=True)
class Run:
    """The training that is logged."""

    folder: Path
    """The run's directory, where a logger also keeps its own state."""
    config: Mapping[str, Any]
    """The resolved config."""

    @property
    def name(self) -> str:
        return self.folder.name


class Session(Protocol):
    """A logger at work on one run. Every method may fail.

    where: the user finds it.
    """

    where: str

    def log(self, rows: Sequence[Row]) -> None:
        """All rows so far; those that it has had are left out."""
        ...

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The end of the training, or None for an interruption."""
        ...


@dataclass(frozen=True)
class Logger:
    """A logger of trainings, and its settings.

    Raises:
        UserError: where its package is missing.
    """

    package: ClassVar[str]
    """The package that it needs."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"logger={self.package} needs {self.package}: pip install 'advbench[track]'"
            )

    def start(self, run: Run) -> Session | None:
        """Begin or continue; None if the run is complete there, or nothing is to be logged."""
        raise NotImplementedError


class Tracked:
    """Passes all progress on, feeds a logger and draws the curves.

    The logger begins with the first step: a mistake that is found before leaves nothing behind.
    """

    def __init__(self, progress: Progress, logger: Logger | None, run: Run, draw: Draw) -> None:
        self.progress, self.logger, self.run, self.draw = progress, logger, run, draw
        self.session: Session | None = None
        self._begun = False
        self._drawn = time.monotonic()

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(None)

    def note(self, text: str) -> None:
        self.progress.note(text)

    def stage(self, name: str, total: int) -> None:
        self.progress.stage(name, total)

    def update(
        self,
        done: int,
        text: str = "",
        *,
        correct: int | None = None,
        samples: int | None = None,
        seconds_left: float | None = None,
    ) -> None:
        self._begin()
        self.progress.update(
            done, text, correct=correct, samples=samples, seconds_left=seconds_left
        )

    def epoch(self, row: Mapping[str, float]) -> None:
        self._begin()
        self.progress.epoch(row)
        self._log()
        if time.monotonic() - self._drawn > REDRAW:
            self._draw(None)

    def finish(self, summary: Summary) -> None:
        """After the last epoch, or for a run that was finished before."""
        if self._begun or not (self.run.folder / PICTURE).exists():
            self._draw(summary.best_epoch)
        self._begin()
        self._log()
        self._close({k: v for k, v in asdict(summary).items() if k != "identity"})

    def _begin(self) -> None:
        if self.logger is not None and not self._begun:
            logger = self.logger
            self.session = self._try(lambda: logger.start(self.run))
            if self.session is not None:
                self.note(f"logger={logger.package}: {self.session.where}")
        self._begun = True

    def _log(self) -> None:
        if (session := self.session) is not None:
            self._try(lambda: session.log(read_table(self.run.folder / METRICS)))

    def _close(self, summary: Mapping[str, Any] | None) -> None:
        if (session := self.session) is not None:
            self._try(lambda: session.close(summary))
            self.session = None

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            with _unwarned():
                return call()
        except Exception as problem:
            self.session = None
            name = "" if self.logger is None else self.logger.package
            self.note(
                f"logger={name} failed and is left out from here on; metrics.csv has it all, and "
                f"the same command tells it again ({_in_a_line(problem)})"
            )
            return None

    def _draw(self, best: int | None) -> None:
        self._drawn = time.monotonic()
        try:
            with _unwarned():
                self.draw(self.run.folder, best)
        except Exception as problem:
            self.note(f"no {PICTURE}: {_in_a_line(problem)}")


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warnings of other libraries, which the user can't correct."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _in_a_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split()):.200}"
