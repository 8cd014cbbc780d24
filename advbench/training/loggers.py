"""Where the curves of a training go besides metrics.csv: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advbench.errors import UserError
from advbench.files import read_json, write_json
from advbench.training.metrics import Row
from advbench.training.tracking import Logger, Run, Session

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
        self.where = f"tensorboard --logdir {run.folder.parent}"
        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("config", _block(run.config))
        self.began = (run.folder / "config.yaml").stat().st_mtime
        self.sent = 0

    def log(self, rows: Sequence[Row]) -> None:
        clock = self.began
        for row in rows:
            clock += row["seconds"]  # of training, without the interruptions
            if row["epoch"] > self.sent:
                for name, value in _values(row).items():
                    self.writer.add_scalar(name, value, int(row["epoch"]), walltime=clock)
                self.sent = int(row["epoch"])
        self.writer.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.writer.add_text("summary", _block(summary))
        self.writer.close()


# --- Weights & Biases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wandb(Logger):
    """A run of Weights & Biases; its id is kept in the run's directory."""

    package = "wandb"
    project: str = "advbench"
    """As ``wandb.init`` takes them."""
    entity: str | None = None
    """As ``wandb.init`` takes them."""
    group: str | None = None
    """As ``wandb.init`` takes them."""
    tags: list[str] | None = None
    """As ``wandb.init`` takes them."""
    mode: str | None = None
    """``online``, ``offline`` (send it later with ``wandb sync RUN/wandb/offline-run-*``) or
    ``disabled``; None is as WANDB_MODE says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"logger.mode={self.mode} is not online, offline, disabled or null")

    def start(self, run: Run) -> Session | None:
        import wandb  # pyright: ignore[reportMissingImports]

        state = _State(run.folder / "wandb.json", f"{self.entity or ''}/{self.project}")
        sent = state.value or {"id": secrets.token_hex(4), "epochs": 0, "finished": False}
        if sent["finished"]:
            return None
        remote = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            mode=self.mode,  # pyright: ignore[reportArgumentType]
            id=sent["id"],
            name=run.name,
            config=dict(run.config),
            resume="allow",
            dir=str(run.folder),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        if remote.disabled:  # it kept nothing
            remote.finish()
            return None
        return _WandbRun(remote, state, sent)


class _WandbRun:
    def __init__(self, run: Any, state: _State, sent: dict[str, Any]) -> None:
        self.run, self.state, self.sent = run, state, sent
        self.where = run.url or f"wandb sync {Path(run.dir).parent}"
        state.keep(sent)

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row["epoch"] > self.sent["epochs"]:
                self.run.log({"epoch": row["epoch"], **_values(row)}, step=int(row["epoch"]))
                self.sent["epochs"] = int(row["epoch"])
        self.state.keep(self.sent)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if summary is not None else 1)
        self.sent["finished"] = summary is not None
        self.state.keep(self.sent)


# --- MLflow ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLflow(Logger):
    """A run of MLflow; its id is kept in the run's directory."""

    package = "mlflow"
    experiment: str = "advbench"
    """Created if it does not exist."""
    tracking_uri: str | None = None
    """A server, a database such as sqlite:///mlflow.db, or a folder (file:mlruns); None is as
    MLFLOW_TRACKING_URI says, or else MLflow's own default."""

    def start(self, run: Run) -> Session | None:
        # A server that does not answer holds up the training by this much, not by many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is not None and (uri.startswith("file:") or "://" not in uri):
            # Newer releases take a folder only if this is set as well.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        logging.getLogger("alembic").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri)
        state = _State(run.folder / "mlflow.json", f"{client.tracking_uri} {self.experiment}")
        if state.value is None:
            made = client.create_run(self._experiment(client), run_name=run.name)
            state.keep(made.info.run_id)
        remote = client.get_run(state.value)
        if remote.info.status == "FINISHED":
            return None
        params = [Param(key, str(value)[:500]) for key, value in _flat(run.config).items()]
        for start in range(0, len(params), 100):  # as many as one call may have
            client.log_batch(remote.info.run_id, params=params[start : start + 100])
        return _MLflowRun(client, remote)

    def _experiment(self, client: Any) -> str:
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            with suppress(Exception):  # another job of a sweep may be first
                return client.create_experiment(self.experiment)
            experiment = client.get_experiment_by_name(self.experiment)
        return experiment.experiment_id


class _MLflowRun:
    """Asks the store what it knows: it may have had half of a row."""

    def __init__(self, client: Any, run: Any) -> None:
        self.client, self.id = client, run.info.run_id
        self.where = f"{client.tracking_uri}, run {self.id}"
        client.update_run(self.id, status="RUNNING")
        self.sent = {
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
                if epoch > self.sent.get(name, 0)
            ]
            if new:
                self.client.log_batch(self.id, metrics=new)
                self.sent |= {metric.key: epoch for metric in new}

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is None:
            self.client.set_terminated(self.id, "KILLED")
            return
        for key, value in _flat(summary).items():
            self.client.set_tag(self.id, f"summary.{key}", str(value)[:500])
        self.client.set_terminated(self.id, "FINISHED")


# --- what they share -----------------------------------------------------------------------------


class _State:
    """What a logger keeps in the run's directory, for each place where it logs."""

    def __init__(self, file: Path, place: str) -> None:
        self.file, self.place = file, place

    @property
    def value(self) -> Any:
        """None where nothing is kept."""
        return self._all().get(self.place)

    def keep(self, value: Any) -> None:
        write_json(self.file, {**self._all(), self.place: value})

    def _all(self) -> dict[str, Any]:
        try:
            return dict(read_json(self.file))
        except (OSError, ValueError, TypeError):
            return {}


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
