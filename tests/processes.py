"""Commands and functions in processes of their own, which have imported everything already.

A new Python takes some ten seconds of a core until it trains. These are forked from a process that
has done its imports and nothing else, so that a test may start, and kill, as many as it needs.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PRELOADED = [
    "advbench.cli.hydra_app", "advbench.cli.multirun", "advbench.data.sources",
    "advbench.experiments.evaluate", "advbench.experiments.train", "advbench.report.plots",
    "matplotlib.pyplot", "torch._dynamo", "torchattacks",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Process:
    """A function at work in a process of its own, whose output goes to a file.

    Args:
        work: of a module that can be imported; what it returns is the exit code.
        given: its arguments.
        folder: where it works.
        environment: changes of this process's.
    """

    def __init__(
        self,
        work: Callable[..., int | None],
        *given: Any,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        handle, name = tempfile.mkstemp(suffix=".output")
        os.close(handle)
        self._file = Path(name)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = _context.Process(
            target=_child, args=(work, given, folder, self._file, variables)
        )
        self._process.start()

    def wait(self, timeout: float = 300.0) -> int:
        """Its exit code, negative for a signal; all that it printed is then in ``output``."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            self._end()
            raise AssertionError(f"not finished after {timeout} s: {self.output}")
        self._end()
        code = self._process.exitcode
        assert code is not None
        return code

    def _end(self) -> None:
        if self._file.exists():
            self.output = self._file.read_text()
            self._file.unlink()


def together(number: int, work: Callable[..., int | None], *given: Any, folder: Path) -> str:
    """A function in so many processes, as torchrun starts them; returns the output of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests",
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "GROUP_RANK": "0",
    }  # fmt: skip
    ranks = [
        Process(work, *given, folder=folder, environment={**own, **meeting} if number > 1 else {})
        for own in ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number))
    ]
    codes = [rank.wait() for rank in ranks]
    assert codes == [0] * number, "\n".join(rank.output[-3000:] for rank in ranks)
    return ranks[0].output


def run_script(text: str, *arguments: str, folder: Path, processes: int = 1) -> str:
    """Python text in processes that find the helpers here; returns the output of the first."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return together(processes, script, str(path), list(arguments), folder=folder)


def killed(pattern: str, writes: int, work: Callable[..., int | None], *given: Any) -> int | None:
    """Work in a process that kills itself (SIGKILL) at a moment that no clock decides.

    Args:
        pattern: of the names of the files that count.
        writes: after so many of them were written; negative: inside that write, with the file
            beside its place.
        work: what is done, with ``given``.
    """
    replace, seen = os.replace, 0

    def counted(source: Any, target: Any) -> None:
        nonlocal seen
        seen += fnmatch(Path(target).name, pattern)
        if seen == -writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if seen == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    return work(*given)


def main_of(words: list[str]) -> int:
    """The command line, as work of a process; processes that it starts repeat its command."""
    import advbench
    from advbench.cli.main import main

    sys.argv = [str(Path(advbench.__file__).with_name("__main__.py")), *words]
    return main(words)


def script(path: str, arguments: list[str]) -> None:
    """A Python file, as work of a process."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).absolute().parent))
    runpy.run_path(path, run_name="__main__")


def _child(
    work: Callable[..., int | None], given: Any, folder: Path, file: Path, variables: dict[str, str]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.exit(work(*given))
