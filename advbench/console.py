"""What a person sees: progress, lines, panels. Without a terminal, plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0


def table_console() -> Console:
    """For tables; without a terminal they are as wide as they need to be."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


class Screen:
    """Lines for a person, kept in ``log.txt`` as well once the run has a directory."""

    def __init__(self, console: Console | None = None) -> None:
        # Bound to the stream of now: attacks of other libraries are silenced by replacing it.
        self.console = console or Console(highlight=False, file=sys.stdout)
        self.log: Path | None = None

    def line(self, text: str) -> None:
        """One line, on the screen and in the log."""
        self.console.print(text, markup=False, soft_wrap=True)
        if self.log is not None:
            stamp = datetime.now().isoformat(sep=" ", timespec="seconds")
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{stamp} {text}\n")


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then.

    clock: guess the time left from the pace so far.
    """

    def __init__(self, screen: Screen, clock: bool = True) -> None:
        self.screen = screen
        self.title = ""
        self._spoken = 0.0
        self._progress = None
        if screen.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                *([TimeRemainingColumn()] if clock else []),
                console=screen.console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=None, text="")

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, title: str, total: int) -> None:
        self.title, self._spoken = title, time.monotonic()
        if self._progress is not None:
            self._progress.reset(self._task, total=total, description=title, text="")

    def update(self, done: int, total: int, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._spoken > PLAIN_SECONDS:
            self._spoken = time.monotonic()
            self.screen.line(f"{self.title} {done}/{total} {text}")


class TrainingView:
    """Shows a training: the ``Report`` of the training loop."""

    def __init__(self, screen: Screen, bar: Bar) -> None:
        self.screen, self.bar = screen, bar
        bar.begin("train", 1)

    def note(self, text: str) -> None:
        self.screen.line(text)

    def progress(self, done: int, total: int, text: str) -> None:
        self.bar.update(done, total, text)

    def epoch(self, row: Mapping[str, float]) -> None:
        shown = ("train_acc", "val_clean", "val_robust")
        parts = [f"{key} {100 * row[key]:5.1f} %" for key in shown if row.get(key) is not None]
        losses = [f"{k} {v:.3f}" for k, v in row.items() if k == "loss" or k.startswith("loss_")]
        losses = losses if len(losses) > 2 else losses[:1]  # one term is the sum
        text = "  ".join([f"epoch {int(row['epoch']):3d}", *losses, *parts])
        self.screen.line(f"{text}  {row['seconds']:.1f} s")


class EvaluationView:
    """Shows an evaluation: the ``Watch`` of the engine."""

    def __init__(self, screen: Screen, bar: Bar) -> None:
        self.screen, self.bar = screen, bar
        self.waiting = 0

    def stage(self, name: str, waiting: int) -> None:
        self.waiting = waiting
        self.bar.begin(name, waiting)
        self.screen.line(f"{name}: {waiting} samples")

    def progress(self, done: int, correct: int, n: int, left: float | None = None) -> None:
        text = f"{100 * correct / n:.1f} % still correct"
        if left is not None:
            text += f", {duration(left)} left"
        self.bar.update(done, self.waiting, text)

    def note(self, text: str) -> None:
        self.screen.line(text)


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
