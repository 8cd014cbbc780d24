"""Loggers hear of every epoch once, whatever happens; they never end a training, nor make another
one of it. The curves are drawn."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advbench.cli.main import main
from advbench.errors import UserError
from advbench.experiments.train import score
from advbench.progress import NullProgress
from advbench.report import curves
from advbench.training import loggers, tracking
from advbench.training.metrics import Row, read_table, write_table
from advbench.training.summary import Summary

FAST = ["trainer.epochs=3", "recipe=standard", "trainer.val_steps=1"]


def row(epoch: int) -> Row:
    return {"epoch": epoch, "lr": 0.1 / epoch, "loss": 2.0 / epoch, "val_clean": 0.1 * epoch,
            "seconds": 2.5}  # fmt: skip


ROWS = [row(epoch) for epoch in (1, 2, 3)]
OUTCOME = {"best_epoch": 3, "val": {"clean": 0.3}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path) -> tracking.Run:
    """A run's directory with a table of three epochs."""
    folder = here / "digits-s0"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    write_table(folder / "metrics.csv", ROWS)
    return tracking.Run(folder, {"seed": 0, "optimizer": {"lr": 0.1}})


def cut_and_gone_on_with(logger: tracking.Logger, run: tracking.Run) -> None:
    """A process that is killed after two epochs, one that repeats the second, one more to spare."""
    session = logger.start(run)
    assert session is not None and session.where
    session.log(ROWS[:1])
    session.log(ROWS[:2])
    again = logger.start(run)  # the first was never closed
    assert again is not None
    again.log(ROWS[:2])
    again.log(ROWS)
    again.close(OUTCOME)


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read


# --- each of them -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_each_row_once(run: tracking.Run) -> None:
    cut_and_gone_on_with(loggers.TensorBoard(), run)
    read = events(run.folder / "tensorboard")
    names = set(ROWS[0]) - {"epoch"}
    assert set(read.Tags()["scalars"]) == names and len(names) == 4
    for name in names:
        seen = [(event.step, event.value) for event in read.Scalars(name)]
        assert seen == [(e, pytest.approx(row(e)[name])) for e in (1, 2, 3)]
    times = [event.wall_time for event in read.Scalars("loss")]
    assert np.diff(times) == pytest.approx([2.5, 2.5], abs=0.01)  # training time, without breaks
    assert {"config/text_summary", "summary/text_summary"} <= set(read.Tags()["tensors"])


class FakeWandb(types.ModuleType):
    """Keeps what it is told, by the id of the run."""

    def __init__(self, where: Path) -> None:
        super().__init__("wandb")
        self.where, self.runs, self.given = where, {}, []
        self.Settings = lambda **settings: settings

    def init(self, **given: Any) -> Any:
        self.given.append(given)
        told = self.runs.setdefault(given["id"], [])
        return types.SimpleNamespace(
            disabled=given["mode"] == "disabled",
            url=None,
            dir=str(self.where / "wandb" / "offline-run-1" / "files"),
            summary={},
            log=lambda values, step: told.append((step, values)),
            finish=lambda exit_code=0: told.append(("finish", exit_code)),
        )


@pytest.fixture
def wandb(here: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb(here)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
    return fake


def test_wandb_goes_on_in_the_same_run(run: tracking.Run, wandb: FakeWandb) -> None:
    logger = loggers.Wandb(project="p", mode="offline", tags=["t"])
    cut_and_gone_on_with(logger, run)
    ((told),) = wandb.runs.values()
    assert [step for step, _ in told] == [1, 2, 3, "finish"]
    assert told[2][1] == {**row(3)} and told[3] == ("finish", 0)
    first, second = wandb.given
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert (first["name"], first["dir"], first["tags"]) == ("digits-s0", str(run.folder), ["t"])
    assert first["config"]["optimizer"] == {"lr": 0.1}
    assert logger.start(run) is None  # it has everything
    assert loggers.Wandb(project="other").start(run) is not None


def test_wandb_disabled_has_been_told_nothing(run: tracking.Run, wandb: FakeWandb) -> None:
    assert loggers.Wandb(mode="disabled").start(run) is None
    cut_and_gone_on_with(loggers.Wandb(mode="offline"), run)
    with pytest.raises(UserError, match="not online, offline"):
        loggers.Wandb(mode="of")


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of wandb's, a log as LevelDB writes it, of a single block."""
    data = file.read_bytes()
    assert data.startswith(b":W&B") and len(data) < 2**15
    at = 7
    while at + 7 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(run: tracking.Run) -> None:
    pytest.importorskip("wandb", reason="pip install 'advbench[track]'")
    from wandb.proto import wandb_internal_pb2  # pyright: ignore

    logger = loggers.Wandb(mode="offline")
    session = logger.start(run)
    assert session is not None
    session.log(ROWS[:2])
    session.close(None)
    again = logger.start(run)
    assert again is not None
    again.log(ROWS)
    again.close(OUTCOME)
    (kept,) = json.loads((run.folder / "wandb.json").read_text()).values()
    files = sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and all(kept["id"] in file.name for file in files)
    steps = []
    for file in files:
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    assert steps == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["sqlite:///mlflow.db", "file:mlruns"])
def test_mlflow(run: tracking.Run, store: str) -> None:
    pytest.importorskip("mlflow", reason="pip install 'advbench[track]'")
    from mlflow.tracking import MlflowClient  # pyright: ignore

    logger = loggers.MLflow(tracking_uri=store)
    cut_and_gone_on_with(logger, run)
    assert logger.start(run) is None
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("advbench")
    (there,) = client.search_runs([experiment.experiment_id])
    assert there.info.run_name == "digits-s0" and there.info.status == "FINISHED"
    assert there.data.params == {"seed": "0", "optimizer.lr": "0.1"}
    assert there.data.tags["summary.val.clean"] == "0.3"
    history = client.get_metric_history(there.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(e, 2.0 / e) for e in (1, 2, 3)]


def test_what_is_not_installed_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    names = ["tensorboard", "wandb", "mlflow"]
    for name in names:
        assert main(["train", f"logger={name}"]) == 2
        line = f"advbench: logger={name} needs {name}: pip install 'advbench[track]'\n"
        assert capsys.readouterr().err == line
    assert not any(here.iterdir())


# --- what they may not do -----------------------------------------------------------------------


class Heard(NullProgress):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Failing(tracking.Logger):
    package = "json"
    at: str = "start"

    def start(self, run: tracking.Run) -> tracking.Session:
        self.perhaps("start")
        return FailingSession(self)

    def perhaps(self, moment: str) -> None:
        if moment == self.at:
            raise ConnectionError("no route\n  to host")


class FailingSession:
    where = "nowhere"

    def __init__(self, logger: Failing) -> None:
        self.logger = logger

    def log(self, rows: Sequence[Row]) -> None:
        self.logger.perhaps("log")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.logger.perhaps("close")


def summary() -> Summary:
    return Summary(
        identity={}, epochs=3, steps=3, best_epoch=3, selected_by="", val={}, seconds=1.0,
        parameters=1, torch="", device="cpu", devices=1, precision="32-true", last={}, guards={},
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["start", "log", "close", "never"])
def test_a_failure_is_one_line(run: tracking.Run, moment: str) -> None:
    heard = Heard()
    with tracking.Tracked(heard, Failing(moment), run, lambda folder, best: None) as progress:
        for epoch in (1, 2, 3):
            progress.update(epoch)
            progress.epoch(row(epoch))
        progress.finish(summary())
    failures = [note for note in heard.notes if "failed" in note]
    assert len(failures) == (moment != "never")
    assert not failures or "(ConnectionError: no route to host)" in failures[0]


def test_pictures_fail_in_a_line_and_not_too_often(
    run: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 30.0, 61.0, 61.0, 90.0, 200.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    drawn: list[int | None] = []

    def draw(folder: Path, best: int | None) -> None:
        drawn.append(best)
        raise RuntimeError("no font")

    heard = Heard()
    with tracking.Tracked(heard, None, run, draw) as progress:
        for epoch in (1, 2, 3):  # at 30, 61 and 90 s
            progress.epoch(row(epoch))
        progress.finish(summary())
    assert drawn == [None, 3]
    assert heard.notes == ["no curves.png: RuntimeError: no font"] * 2


# --- in a training ------------------------------------------------------------------------------


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Interrupt the training as the logger hears of an epoch."""
    log = loggers._Events.log

    def at(epoch: int) -> None:
        def dies(self: Any, rows: Sequence[Row]) -> None:
            log(self, rows)
            if len(rows) == epoch:
                raise KeyboardInterrupt

        monkeypatch.setattr(loggers._Events, "log", dies)

    yield at


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_any_logger(
    here: Path, dying: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "hydra.run.dir=whole", *FAST]) == 0
    dying(2)
    assert main(["train", "hydra.run.dir=cut", "logger=tensorboard", *FAST]) == 130
    assert not Path("cut/summary.json").exists()
    dying(-1)
    assert main(["train", "resume=cut"]) == 0  # with the logger of its config
    assert "logger=tensorboard: tensorboard --logdir ." in capsys.readouterr().out
    weights = [Path(run, "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]
    read = events(Path("cut/tensorboard"))
    assert [event.step for event in read.Scalars("val_clean")] == [1, 2, 3]
    rows = read_table(Path("cut/metrics.csv"))
    assert len(rows) == 3 and set(read.Tags()["scalars"]) == set(rows[0]) - {"epoch"}

    # Another logger is no other run, and a finished one is told from the beginning.
    assert main(["train", "hydra.run.dir=whole", "logger=tensorboard", *FAST]) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(events(Path("whole/tensorboard")).Scalars("loss")) == 3
    assert main(["train", *FAST]) == main(["train", "logger=tensorboard", *FAST]) == 0
    assert len(list(Path("outputs/train").iterdir())) == 1

    # The picture is there, marks the epoch that was chosen, and is made again if it is missing.
    assert Path("whole/curves.png").read_bytes().startswith(b"\x89PNG")
    os.remove("whole/curves.png")
    assert main(["train", "hydra.run.dir=whole", *FAST]) == 0
    assert Path("whole/curves.png").exists()
    table = curves.read_metrics(Path("whole/metrics.csv"))
    assert curves.best_epoch(table) == Summary.load(Path("whole/summary.json")).best_epoch
    assert score(Path("whole")) == pytest.approx(table["val_robust"][-1], abs=1e-6)


# --- the picture --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "best"),
    [
        ({"val_clean": [0.5, 0.7, 0.7]}, 3),  # of equals the later
        (
            {"val_clean": [0.5, 0.7, 0.6], "val_robust": [0.1, 0.2, 0.3]},
            2,
        ),  # noise: not trained for
        (
            {
                "val_clean": [0.9, 0.7, 0.6],
                "val_robust": [0.2, 0.3, 0.3],
                "train_adversarial": [0, 0, 0],
            },
            2,
        ),
    ],
)
def test_best_epoch(columns: dict[str, list[float]], best: int) -> None:
    table = {name: np.array(values, float) for name, values in columns.items()}
    assert curves.best_epoch({"epoch": np.array([1.0, 2.0, 3.0]), **table}) == best


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_picture_has_every_column(
    run: tracking.Run, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one epoch, and without a warning."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    extra = {"loss_ce": 1.0, "loss_kl": 1.0, "train_clean": 0.5, "train_adversarial": 0.4,
             "val_robust": 0.3}  # fmt: skip
    write_table(run.folder / "metrics.csv", [{**row(e + 1), **extra} for e in range(epochs)])
    curves.draw(run.folder)
    upper, lower, rate = figures[0].axes
    shown = {line.get_label(): line for line in upper.lines}
    assert shown["training, adversarial"].get_color() == shown["validation, robust"].get_color()
    assert list(np.asarray(shown["validation, robust"].get_ydata())) == [30.0] * epochs
    assert f"best epoch {epochs}" in upper.get_title(loc="left")
    assert {"sum", "ce", "kl"} <= {line.get_label() for line in lower.lines}
    assert list(np.asarray(rate.lines[0].get_ydata())) == pytest.approx(
        [0.1 / (e + 1) for e in range(epochs)]
    )
