"""Where the curves of a training go besides metrics.csv: TensorBoard, Weights & Biases, MLflow.

A logger is told all rows of metrics.csv after each epoch and passes on those that it has not had.
So a run that was interrupted goes on in the same place without a row twice, and the same command
with another logger tells it everything. No failure of a logger ends a training.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from advbench.errors import UserError
from advbench.files import write_json
from advbench.training.metrics import Row, read_table
from advbench.training.summary import Report, Summary

METRICS = "metrics.csv"
PICTURE = "curves.png"
REDRAW = 60.0
"""Seconds between two pictures of a training that goes on."""

Draw = Callable[[Path, int | None], None]
"""Draws the curves of the run in a folder; which epoch is the best is known at the end."""


@dataclass(frozen=True)
class Run:
    """The training that a logger hears of.

    folder: of the run, where a logger keeps what it needs to go on.  config: resolved.
    """

    folder: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


class Session(Protocol):
    """A logger at work on one run. Every method may fail."""

    def log(self, rows: Sequence[Row]) -> None:
        """All rows so far; those that it has had are left out."""
        ...

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The end of the training, or None for an interruption."""
        ...


@dataclass(frozen=True)
class Logger:
    """What to tell. Raises UserError where its package is missing."""

    package: ClassVar[str]

    def __post_init__(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"logger={self.package} needs {self.package}: pip install 'advbench[track]'"
            )

    def start(self, run: Run) -> Session | None:
        """Begin, or go on; None where the run is known to its end, or nothing is wanted."""
        raise NotImplementedError


# --- TensorBoard ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorBoard(Logger):
    """Event files in the run's directory: ``tensorboard --logdir outputs/train``."""

    package = "tensorboard"

    def start(self, run: Run) -> Session:
        return _Events(run)


class _Events:
    """Written anew from metrics.csv by each process, so no row is there twice."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("config", _block(run.config))
        self.began = (run.folder / "config.yaml").stat().st_mtime
        self.known = 0

    def log(self, rows: Sequence[Row]) -> None:
        clock = self.began
        for row in rows:
            clock += row["seconds"]  # of training, without the interruptions
            if row["epoch"] > self.known:
                for name, value in _values(row).items():
                    self.writer.add_scalar(name, value, int(row["epoch"]), walltime=clock)
                self.known = int(row["epoch"])
        self.writer.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.writer.add_text("summary", _block(summary))
        self.writer.close()


# --- Weights & Biases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wandb(Logger):
    """A run of Weights & Biases; its id is kept in the run's directory.

    project, entity, group, tags: as ``wandb.init`` takes them.  mode: online, offline (send it
    later with ``wandb sync RUN/wandb/offline-run-*``) or disabled; None is as WANDB_MODE says.
    """

    package = "wandb"
    project: str = "advbench"
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"logger.mode={self.mode} is not online, offline, disabled or null")

    def start(self, run: Run) -> Session | None:
        import wandb  # pyright: ignore[reportMissingImports]

        file = run.folder / "wandb.json"
        state = _read(file) or {"id": secrets.token_hex(4), "epochs": 0, "finished": False}
        if state["finished"]:
            return None
        there = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            mode=self.mode,  # pyright: ignore[reportArgumentType]
            id=state["id"],
            name=run.name,
            config=dict(run.config),
            resume="allow",
            dir=str(run.folder),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        if there.disabled:  # and so has been told nothing
            there.finish()
            return None
        return _WandbRun(there, file, state)


class _WandbRun:
    def __init__(self, run: Any, file: Path, state: dict[str, Any]) -> None:
        self.run, self.file, self.state = run, file, state
        write_json(file, state)

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row["epoch"] > self.state["epochs"]:
                self.run.log({"epoch": row["epoch"], **_values(row)}, step=int(row["epoch"]))
                self.state["epochs"] = int(row["epoch"])
        write_json(self.file, self.state)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if summary is not None else 1)
        self.state["finished"] = summary is not None
        write_json(self.file, self.state)


# --- MLflow ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLflow(Logger):
    """A run of MLflow; its id is kept in the run's directory.

    experiment: made where there is none.  tracking_uri: a server, a database such as
    sqlite:///mlflow.db, or a folder (file:mlruns); None is as MLFLOW_TRACKING_URI says, or else
    MLflow's own default.
    """

    package = "mlflow"
    experiment: str = "advbench"
    tracking_uri: str | None = None

    def start(self, run: Run) -> Session | None:
        # A server that does not answer holds up the training by this much, not by many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is not None and (uri.startswith("file:") or "://" not in uri):
            # A folder is what was asked for; newer releases want this to be said twice.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        logging.getLogger("alembic").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri)
        file = run.folder / "mlflow.json"
        state = _read(file)
        if state is None or state["tracking_uri"] != client.tracking_uri:
            made = client.create_run(self._experiment(client), run_name=run.name)
            state = {"tracking_uri": client.tracking_uri, "run_id": made.info.run_id}
            write_json(file, state)
        there = client.get_run(state["run_id"])
        if there.info.status == "FINISHED":
            return None
        params = [Param(key, str(value)[:500]) for key, value in _flat(run.config).items()]
        for start in range(0, len(params), 100):  # as many as one call may have
            client.log_batch(there.info.run_id, params=params[start : start + 100])
        return _MLflowRun(client, there)

    def _experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            with suppress(Exception):  # another job of a sweep may be first
                return client.create_experiment(self.experiment)
            found = client.get_experiment_by_name(self.experiment)
        return found.experiment_id


class _MLflowRun:
    """Asks the store what it knows: it may have had half of a row."""

    def __init__(self, client: Any, run: Any) -> None:
        self.client, self.id = client, run.info.run_id
        client.update_run(self.id, status="RUNNING")
        self.known = {
            name: max(metric.step for metric in client.get_metric_history(self.id, name))
            for name in run.data.metrics
        }

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        for row in rows:
            epoch = int(row["epoch"])
            new = [
                Metric(name, value, now, epoch)
                for name, value in _values(row).items()
                if epoch > self.known.get(name, 0)
            ]
            if new:
                self.client.log_batch(self.id, metrics=new)
                self.known |= {metric.key: epoch for metric in new}

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is None:
            self.client.set_terminated(self.id, "KILLED")
            return
        for key, value in _flat(summary).items():
            self.client.set_tag(self.id, f"summary.{key}", str(value)[:500])
        self.client.set_terminated(self.id, "FINISHED")


# --- what all have in common ----------------------------------------------------------------------


class Tracked:
    """A report that passes everything on, tells a logger as well and draws the curves.

    The logger begins with the first step: a mistake that is found before leaves nothing behind.
    """

    def __init__(self, report: Report, logger: Logger | None, run: Run, draw: Draw) -> None:
        self.report, self.logger, self.run, self.draw = report, logger, run, draw
        self.session: Session | None = None
        self._begun = False
        self._drawn = time.monotonic()

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(None)

    def note(self, text: str) -> None:
        self.report.note(text)

    def progress(self, done: int, total: int, text: str) -> None:
        self._begin()
        self.report.progress(done, total, text)

    def epoch(self, row: Mapping[str, float]) -> None:
        self._begin()
        self.report.epoch(row)
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
    """Without the warnings of other libraries, which are not for the user to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _in_a_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split()):.200}"


def _values(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "epoch"}


def _block(values: Mapping[str, Any]) -> str:
    """As text that TensorBoard shows as it is."""
    return "".join(f"    {line}\n" for line in json.dumps(values, indent=2).splitlines())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as ``a.b``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(file: Path) -> dict[str, Any] | None:
    """What a logger kept; None where there is nothing, or nothing of use."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
