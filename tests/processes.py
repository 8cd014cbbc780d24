"""Commands and functions in processes of their own, which have imported everything already.

A new Python takes some ten seconds of a core until it trains. These are forked from a process that
has done its imports and nothing else, so that a test may start, and kill, as many as it needs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PRELOADED = [
    "advbench.cli.hydra_app", "advbench.cli.multirun", "advbench.data.sources",
    "advbench.experiments.evaluate", "advbench.experiments.train", "advbench.report.plots",
    "matplotlib.pyplot", "sklearn.datasets", "torch._dynamo", "torchattacks",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Process:
    """A function at work in a process of its own, whose output goes to a file.

    Args:
        work: of a module that can be imported; what it returns is the exit code.
        given: its arguments.
        folder: where it works.
        output: the file; both streams.
    """

    def __init__(self, work: Callable[..., int | None], *given: Any, folder: Path) -> None:
        self._file = folder / f".output-{time.monotonic_ns()}"
        self._process = _context.Process(target=_child, args=(work, given, folder, self._file))
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> bool:
        """SIGKILL. Returns whether it was still at work."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def wait(self, timeout: float = 240.0) -> int:
        """Its exit code."""
        self._process.join(timeout)
        if self.running():
            self.kill()
            raise AssertionError(f"not finished after {timeout} s: {self.output}")
        code = self._process.exitcode
        assert code is not None
        return code

    @property
    def output(self) -> str:
        return self._file.read_text() if self._file.exists() else ""


def advbench(*words: str, folder: Path) -> Process:
    """A command line, in that directory."""
    return Process(_main, list(words), folder=folder)


def stamps(folder: Path) -> Mapping[Path, int]:
    """When each file under a directory was written."""
    found = {}
    for path in folder.rglob("*"):
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:  # just replaced
            continue
    return found


def _main(words: list[str]) -> int:
    from advbench.cli.main import main

    sys.argv = ["advbench", *words]
    return main(words)


def _child(work: Callable[..., int | None], given: Any, folder: Path, file: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.stdin.close()
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.exit(work(*given))
