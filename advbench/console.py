"""What a person sees: progress, lines, panels. Without a terminal, plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from advbench.errors import reason_of

PLAIN_SECONDS = 15.0
WINDOW = 20.0  # seconds over which a pace is measured
BAR = 20  # columns
WIDE = 1000  # columns, where nothing is cut or folded
FAILED = "failed: "


def table_console() -> Console:
    """For tables; without a terminal they are as wide as they need to be."""
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=WIDE)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process


class Unbreakable:
    """A stream for the progress of long work, which outlasts whoever reads it.

    Once the stream can't be written, what comes is dropped. A reader that went away wanted no more;
    anything else is said once, on the standard error.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream, self._lost = stream, stream is None

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if self._lost:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except BrokenPipeError:
            self._lost = True
            discard(self._stream)
        except (OSError, ValueError) as problem:  # a ValueError: it is closed
            self._lost = True
            discard(self._stream)
            with suppress(AttributeError, OSError, ValueError):
                print(
                    f"advbench: can't print any more ({reason_of(problem)}); the work continues, "
                    "and log.txt has everything",
                    file=sys.stderr,
                )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: IO[str] | None) -> None:
    """Send what is in a stream's buffer, and what comes, to nowhere."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]
        os.close(nowhere)


class Screen:
    """Lines for a person, kept in ``log.txt`` as well once the run has a directory.

    quiet: show the outcome alone, in one line; the log gets everything.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        # Bound to the stream of now: attacks of other libraries are silenced by replacing it.
        file = cast(IO[str], Unbreakable(sys.stdout))
        self.console = console or Console(highlight=False, file=file)
        self.quiet = quiet
        self.log: Path | None = None

    @property
    def live(self) -> bool:
        """Whether something may move on the screen."""
        return self.console.is_terminal and not self.quiet

    def line(self, text: str) -> None:
        """One line, on the screen and in the log."""
        if not self.quiet:
            self._print(text)
        self.note(text)

    def note(self, text: str) -> None:
        """One line, in the log alone. If the log can't be written, the work continues."""
        if self.log is not None:
            stamp = datetime.now().isoformat(sep=" ", timespec="seconds")
            with suppress(OSError), self.log.open("a", encoding="utf-8") as file:
                file.write(f"{stamp} {text}\n")

    def failed(self, reason: str) -> None:
        """Keep in the log what ended a run; a run that was taken back has none."""
        if self.log is not None and self.log.exists():
            self.note(f"{FAILED}{reason}")

    def outcome(
        self,
        headline: str,
        lines: Sequence[str],
        panel: RenderableType,
        below: Sequence[str] = (),
    ) -> None:
        """The end of a run: a panel on a terminal, lines elsewhere, the headline if quiet.

        below: lines below the panel, such as commands, which a panel would wrap.
        """
        if self.quiet:
            self._print(headline)
        elif self.console.is_terminal:
            self.console.print(panel)
            for text in below:
                self._print(text)
        else:
            for text in lines:
                self._print(text)
        for text in lines:
            self.note(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class Meter:
    """How fast something goes, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def at(self, done: float) -> None:
        """So much is done now."""
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Per second; None while nothing is known."""
        if len(self._seen) < 2:
            return None
        (began, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / (now - began) if now > began and done > before else None


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then. It appears with ``update``."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.title = ""
        self._spoken = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, title: str) -> None:
        """Something new begins."""
        self.end()
        self.title, self._spoken = title, time.monotonic()

    def update(self, done: int, total: int, parts: Sequence[str]) -> None:
        """parts: what to say beside the bar, the most important first; what fits is shown."""
        if self.screen.live:
            room = self.screen.console.width - len(f"{self.title} {done}/{total}  ") - BAR
            text = parts[0]
            for part in parts[1:]:
                if len(text) + len(part) + 2 <= room:
                    text += f"  {part}"
            if self._progress is None:
                self._progress = self._new()
                self._progress.add_task(self.title, total=total, completed=done, text=text)
                self._progress.start()
            self._progress.update(TaskID(0), completed=done, total=total, text=text)
        elif time.monotonic() - self._spoken > PLAIN_SECONDS:
            self._spoken = time.monotonic()
            self.screen.line("  ".join([f"{self.title} {done}/{total}", *parts]))

    def rest(self) -> None:
        """Something was said just now."""
        self._spoken = time.monotonic()

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _new(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.screen.console,
            transient=True,
        )
