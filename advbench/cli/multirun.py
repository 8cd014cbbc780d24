"""The jobs of a command: in this process, or where one of Hydra's launchers has put them.

A launcher pickles the ``Task`` and sends it to other processes, or machines that see the same
files. There it leaves word of each job in a directory that the process of the user reads at the
end: Hydra hands results to its sweepers alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

import advbench.cli.explain as explain
from advbench.config import options
from advbench.errors import UserError
from advbench.files import write_json

Job = Callable[[Any], tuple[int, float | None]]
"""Config -> exit code, and what a search maximises."""

SEARCH = "hydra/sweeper="
PRESETS = ("hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0")
"""Of a search by Optuna, whose plugin minimises. (A config of ours may not have its option's name.)

Seeded: the same command proposes the same settings, finds what is finished, and resumes.
"""
MULTIRUN = ("-m", "--multirun")
QUIET = ("-q", "--quiet")


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    status: exit code.  score: what a search maximises.  text: for the user, who has not seen it.
    """

    number: int
    label: str
    status: int
    score: float | None = None
    text: str = ""


@dataclass
class Task:
    """What Hydra calls with the config of each job.

    job: runs it.  command: of the user, from the name of the program on.
    """

    job: Job
    command: Sequence[str]
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place = Path.cwd()
        self.origin = _process()
        self.word: Path | None = None
        self.multirun = any(word in MULTIRUN for word in self.command)

    def __getstate__(self) -> dict[str, Any]:
        if self.word is None:  # not before a job leaves this process
            self.word = Path(tempfile.mkdtemp(prefix=".advbench-", dir=self.place))
        return {**vars(self), "outcomes": []}

    def __call__(self, cfg: Any) -> float | None:
        """Run a job. Returns what a search maximises; None for a job that failed."""
        from hydra.core.hydra_config import HydraConfig

        hydra_cfg: Any = HydraConfig.get()
        away = self.origin != _process()
        number = int(hydra_cfg.job.get("num", 0)) if self.multirun else 0
        label = self._label(overrides(hydra_cfg), number)
        # What a process of another device is started with.
        sys.argv = self._own_command(hydra_cfg) if self.multirun else list(self.command)
        if away:
            os.chdir(self.place)
            _limit_threads(hydra_cfg.launcher)
            if str(hydra_cfg.launcher.get("_target_")).endswith("JoblibLauncher"):
                _take_gpu(self.word)
        if self.multirun and not away and not set(QUIET) & set(self.command):
            print(label, flush=True)  # the heading of what follows
        with _labelled(label) if away else nullcontext(), _alone():
            status, score, text = self._run(cfg)
        if text and not _to_a_file(hydra_cfg.launcher):
            prefix = f"{label} " if self.multirun else ""
            print(f"{prefix}{text}", file=sys.stderr, flush=True)
            text = ""
        outcome = Outcome(number, label, status, score, text)
        if not away:
            self.outcomes.append(outcome)
        elif self.word is not None:
            with suppress(OSError):  # the process of the user is gone: nobody will read it
                write_json(self.word / f"{number}.json", asdict(outcome))
        return score

    def _run(self, cfg: Any) -> tuple[int, float | None, str]:
        """Exit code, score, and what there is to say to the user."""
        try:
            return *self.job(cfg), ""
        except Exception as problem:  # of one job: a sweep continues with the next
            message = explain.of(problem)
            if message is not None:
                return 2, None, f"advbench: {message}" if _speaks(message) else ""
            if not self.multirun:
                raise
            return 1, None, traceback.format_exc().rstrip()

    def settle(self, problem: Exception | None = None) -> int:
        """After all jobs: say what has not been said. Returns the exit code.

        problem: what Hydra, its sweeper or its launcher raised; raised again if it is a bug.
        """
        outcomes = sorted([*self.outcomes, *self._words()], key=lambda outcome: outcome.number)
        for outcome in outcomes:
            if outcome.text:
                print(f"{outcome.label} {outcome.text}", file=sys.stderr)
        status = max((outcome.status for outcome in outcomes), default=0)
        if problem is None:
            self._tell_best(outcomes)
            return status
        if explain.of(problem) is None and (self.word is not None or status):
            name, text = type(problem).__name__, " ".join(str(problem).split())
            reason = f"{name}: {text:.300}" if text else name
            print(
                f"advbench: the sweep ended early; repeat the command to resume ({reason})",
                file=sys.stderr,
            )
            return status or 1
        raise problem

    def close(self) -> None:
        """Remove what the jobs left word in."""
        if self.word is not None:
            shutil.rmtree(self.word, ignore_errors=True)

    def _words(self) -> Iterator[Outcome]:
        if self.word is not None:
            for path in self.word.glob("*.json"):
                yield Outcome(**json.loads(path.read_text(encoding="utf-8")))

    def _tell_best(self, outcomes: Sequence[Outcome]) -> None:
        scored = [outcome for outcome in outcomes if outcome.score is not None]
        if scored and any(word.startswith(SEARCH) for word in self.command):
            best = max(scored, key=lambda outcome: outcome.score or 0.0)
            print(
                f"best of {len(scored)}: {best.label} with {100 * (best.score or 0.0):.1f} % "
                "validation accuracy"
            )

    def _label(self, overrides: Sequence[str], number: int) -> str:
        """The number of a job and what is its own, such as ``[1 seed=2]``."""
        swept = {
            word.partition("=")[0] for word in self.command if "," in word or word.endswith(")")
        }
        different = [word for word in overrides if word.partition("=")[0] in swept]
        return f"[{' '.join([str(number), *different])}]"

    def _own_command(self, hydra_cfg: Any) -> list[str]:
        """The command of this job alone."""
        program, subcommand, *rest = self.command
        flags = [
            word
            for word in rest
            if word not in MULTIRUN and (word.startswith("-") or "=" not in word)
        ]
        searched = [word for word in rest if word.startswith("hydra.searchpath=")]
        return [program, subcommand, *flags, *searched, *overrides(hydra_cfg)]


def overrides(hydra_cfg: Any) -> list[str]:
    """The words of a job as they were typed: reading them plainly would resolve ``${...}``."""
    typed: Any = OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)
    return list(typed)


def refuse_search(subcommand: str, words: Sequence[str]) -> None:
    """Raise UserError for a search by the test split, which ``eval`` reads."""
    for word in words:
        if subcommand == "eval" and word.startswith(SEARCH) and word != f"{SEARCH}basic":
            raise UserError(
                f"{word} would choose by the test split, which is for measuring alone: search "
                "with advbench train, which returns the accuracy on the validation split"
            )


def refuse_experiment(subcommand: str, words: Sequence[str]) -> None:
    """Raise UserError for a shipped experiment, all of which are for ``train``, given to eval."""
    for word in words:
        key, _, name = word.partition("=")
        if subcommand == "eval" and key == "experiment" and name in options("experiment"):
            raise UserError(
                f"{word} is for train: leave it out (experiments are for train); eval takes model, "
                "data and threat from run=DIR"
            )


def with_presets(words: Sequence[str]) -> list[str]:
    """The words of a command, with what a search by Optuna needs and they do not say."""
    if f"{SEARCH}optuna" not in words:
        return list(words)
    keys = {word.partition("=")[0] for word in words}
    if "hydra/sweeper/sampler" in keys:  # not all of them have a seed
        keys.add("hydra.sweeper.sampler.seed")
    return [*words, *(preset for preset in PRESETS if preset.partition("=")[0] not in keys)]


def _speaks(message: str) -> bool:
    """Whether no other process of the run says so."""
    if "torch" not in sys.modules:  # then there is none, and it takes seconds to load
        return True
    from advbench.devices import speaks

    return speaks(message)


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _to_a_file(launcher: Any) -> bool:
    """Whether what a job prints goes into a file, and not to the user: submitit's does."""
    return "submitit" in str(launcher.get("_target_"))


def _limit_threads(launcher: Any) -> None:
    """As many threads as were asked for; SLURM sees to it, and submitit's local jobs do not."""
    if str(launcher.get("_target_")).endswith("LocalLauncher") and launcher.cpus_per_task:
        import torch

        torch.set_num_threads(launcher.cpus_per_task)


def _take_gpu(place: Path | None) -> None:
    """Of several GPUs, one that no other process of the sweep has, for all jobs of this process.

    With more processes than GPUs they are shared. SLURM and Ray hand out GPUs themselves.
    """
    import torch

    count = torch.cuda.device_count()
    if place is None or count < 2:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    mine = names[os.getpid() % len(names)]
    for name in names:
        lock = FileLock(place / f"gpu-{name}.lock")
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _HELD.append(lock)
            mine = name
            break
    os.environ["CUDA_VISIBLE_DEVICES"] = mine


_HELD: list[FileLock] = []
"""The lock of this process's GPU, which ends with it."""


@contextmanager
def _alone() -> Iterator[None]:
    """The processes of a job on several devices are its own: the next job starts others."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if (torch := sys.modules.get("torch")) and torch.distributed.is_available():
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def _labelled(label: str) -> Iterator[None]:
    """Begin each line that is printed with a label: other jobs print at the same time."""
    with redirect_stdout(_Labelled(label, sys.stdout)):
        yield


class _Labelled(io.TextIOBase):
    """Whole lines, one at a time; no terminal, so nothing moves."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self.label, self.stream, self.rest = label, stream, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.stream.write(f"{self.label} {line}\n")
        self.stream.flush()
        return len(text)
