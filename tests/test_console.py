"""What a person sees: progress with and without a terminal, the outcome, and the list of runs."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from advbench import console
from advbench.cli import list_runs, options
from advbench.cli.main import main
from advbench.config.words import setting
from advbench.console import Bar, Meter, Screen
from advbench.errors import UserError
from advbench.experiments import outcome
from advbench.experiments.views import EvaluationView, TrainingView
from advbench.runs.accuracy import Accuracy
from advbench.runs.results import Results, StageResult, Unfinished
from advbench.text import duration, number
from advbench.training.summary import Summary

FAST = ["trainer.epochs=1", "recipe=standard", "trainer.val_steps=1", "data.val=40"]
EVAL = ["protocol=pgd", "protocol.steps=2", "n=20"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


def screen(terminal: bool, width: int = 140, quiet: bool = False) -> tuple[Screen, io.StringIO]:
    stream = io.StringIO()
    made = Console(file=stream, force_terminal=terminal, width=width, highlight=False)
    return Screen(made, quiet=quiet), stream


def stage(name: str, attacked: int, broken: int, left: float) -> StageResult:
    return StageResult(name, "APGD", "model", "why", left, attacked, broken, 1.5, 10, 10)


RESULTS = Results(
    run="mine",
    data={"name": "digits", "n": 100},
    threat={"norm": "linf", "eps": 8 / 255},
    protocol={"name": "autoattack", "version": "1"},
    clean=Accuracy.of(90, 100),
    robust=Accuracy.of(30, 100),
    stages=(stage("apgd-ce", 90, 20, 0.7), stage("apgd-t", 70, 40, 0.3), stage("fab", 30, 0, 0.3)),
    measures={"wra": 0.6},
    provenance={"seconds": 130.0},
)
SIGN = {"class": "proof", "kind": "gradient", "question": "gradient"}
JUDGED = replace(
    RESULTS,
    verdict={
        "label": "unreliable",
        "indicators": [
            {**SIGN, "id": "flat", "triggered": True, "why": "the gradient vanishes"},
            {**SIGN, "id": "calm", "triggered": False, "why": "never said"},
        ],
    },
)


# --- while it works ------------------------------------------------------------------------------


def test_a_meter_knows_the_pace_of_the_last_seconds(clock: Clock) -> None:
    meter = Meter()
    assert meter.rate is None
    meter.at(100)  # of an earlier sitting: not this one's pace
    assert meter.rate is None
    clock.now = 2.0
    meter.at(120)
    assert meter.rate == 10.0
    for i in range(1, 60):
        clock.now = 2.0 + i
        meter.at(120 + 3 * i)
    assert meter.rate == pytest.approx(3.0)


def test_an_evaluation_on_a_terminal(clock: Clock) -> None:
    shown, stream = screen(terminal=True)
    with Bar(shown) as bar:
        view = EvaluationView(shown, bar, ["apgd-ce", "apgd-t"])
        view.stage("apgd-t", 80)
        clock.now = 4.0
        view.update(20, correct=70, samples=100, seconds_left=90.0)
    text = stream.getvalue()
    for part in ("[2/2] apgd-t", "20/80", "at most 70.0 %", "90 s left", "70 alive",
                 "30 broken", "5.0 samples/s"):  # fmt: skip
        assert part in text, part


def test_what_matters_most_stays_on_a_narrow_terminal(clock: Clock) -> None:
    shown, stream = screen(terminal=True, width=80)
    with Bar(shown) as bar:
        view = EvaluationView(shown, bar, ["apgd-ce"])
        view.stage("apgd-ce", 80)
        clock.now = 4.0
        view.update(20, correct=70, samples=100, seconds_left=90.0)
    text = stream.getvalue()
    assert "at most 70.0 %" in text and "90 s left" in text
    assert "samples/s" not in text


def test_an_evaluation_without_a_terminal_speaks_now_and_then(clock: Clock) -> None:
    shown, stream = screen(terminal=False)
    with Bar(shown) as bar:
        view = EvaluationView(shown, bar, ["apgd-ce"])
        view.stage("apgd-ce", 80)
        for second in range(1, 41):
            clock.now = float(second)
            view.update(second, correct=90 - second, samples=100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/1] apgd-ce: 80 samples"
    assert [line.split()[2] for line in lines[1:]] == ["16/80", "32/80"]
    assert lines[1].endswith("74 alive, 26 broken  1.0 samples/s")
    assert "\x1b" not in stream.getvalue()


def test_groups_of_one_stage_are_one_stage(clock: Clock) -> None:
    """Those of a stochastic model."""
    shown, stream = screen(terminal=False)
    view = EvaluationView(shown, Bar(shown), ["pgd"])
    for group in range(3):
        view.stage("pgd", 64)
        clock.now += 16
        view.update(64, correct=100, samples=200)
        assert f"{64 * (group + 1)}/{64 * (group + 1)}" in stream.getvalue().splitlines()[-1]
    assert stream.getvalue().count("64 samples") == 1


def test_a_training_with_and_without_a_terminal(clock: Clock) -> None:
    for terminal in (True, False):
        clock.now = 0.0
        shown, stream = screen(terminal)
        with Bar(shown) as bar:
            view = TrainingView(shown, bar, batch_size=128)
            view.stage("training", 100)
            view.update(40, "epoch 2/5  loss 0.512")  # 40 of them in an earlier sitting
            clock.now = 1.0
            row = {"epoch": 2, "loss": 0.5, "val_clean": 0.9, "val_robust": 0.5, "seconds": 1.0}
            view.epoch(row)
            clock.now = 17.0
            view.update(57, "epoch 3/5  loss 0.400")
        text = stream.getvalue()
        assert "epoch   2  loss 0.500  val_clean  90.0 %  val_robust  50.0 %  1.0 s" in text
        for part in ("epoch 3/5  loss 0.400", "43 s left", "val 90.0 / 50.0 %", "128 samples/s"):
            assert part in text, part


def test_times_and_numbers_for_people() -> None:
    assert [duration(s) for s in (4.4, 99, 130, 7200)] == ["4 s", "99 s", "2 min", "2.0 h"]
    assert [number(v) for v in (0.42, 3.14, 57.1, 1234.0)] == ["0.42", "3.1", "57", "1,234"]


# --- at the end ----------------------------------------------------------------------------------


def ended(results: Results, tmp_path: Path, terminal: bool, quiet: bool = False) -> tuple[str, str]:
    shown, stream = screen(terminal, quiet=quiet)
    shown.log = tmp_path / "log.txt"
    outcome.show_evaluation(results, Path("outputs/eval/it"), shown)
    return stream.getvalue(), shown.log.read_text()


def test_a_panel_on_a_terminal(tmp_path: Path) -> None:
    text, log = ended(RESULTS, tmp_path, terminal=True)
    assert "╭" in text and "mine, linf 8/255, autoattack 1" in text
    for part in (str(RESULTS.robust), str(RESULTS.clean), "an upper bound"):
        assert part in text, part
    (most,) = [line for line in text.splitlines() if "broke most" in line]
    assert "apgd-t" in most and "40" in most and "verdict" not in text
    assert "robust accuracy 30.0 % [21.9, 39.6], an upper bound" in log
    assert "╭" not in log and "verdict" not in log


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    text, log = ended(RESULTS, tmp_path, terminal=False)
    assert "╭" not in text and "  after apgd-t: 30.0 % (40 of 70 broken, 1.5 s)" in text
    assert [line[20:] for line in log.splitlines()] == text.splitlines()


def test_without_an_attack_there_is_no_robust_accuracy(tmp_path: Path) -> None:
    bare = replace(RESULTS, stages=(), robust=Accuracy(), measures={})
    for terminal in (True, False):
        text, log = ended(bare, tmp_path, terminal)
        assert "nothing attacked" in text and "an upper bound" not in text + log
        assert "robust accuracy - (nothing attacked)" in log


def test_the_verdict_and_what_it_rests_on(tmp_path: Path) -> None:
    for terminal in (True, False):
        text, _ = ended(JUDGED, tmp_path, terminal)
        assert "unreliable" in text and "flat (proof): the gradient vanishes" in text
        assert "the attacks were misled: better ones may leave much less" in text
        assert "never said" not in text
    assert ", unreliable;" in ended(JUDGED, tmp_path, terminal=True, quiet=True)[0]


def test_quiet_is_one_line_and_the_log_has_all(tmp_path: Path) -> None:
    text, log = ended(RESULTS, tmp_path, terminal=True, quiet=True)
    assert text.count("\n") == 1
    assert text.startswith("robust 30.0 % [21.9, 39.6], an upper bound; clean 90.0 %")
    assert "after apgd-ce" in log
    so_far = {"robust": Accuracy(0.3), "measures": {}, "unfinished": Unfinished(61, 90)}
    unfinished = replace(RESULTS, missing=("fab",), **so_far)
    said = "robust UNFINISHED: at most 30.0 %, 61 of 90 samples decided; clean 90.0 %"
    assert ended(unfinished, tmp_path, terminal=True, quiet=True)[0].startswith(said)
    assert "time was up before the end of fab" in ended(unfinished, tmp_path, terminal=True)[0]


def test_nobody_was_broken() -> None:
    assert (
        outcome.strongest(
            replace(RESULTS, clean=RESULTS.robust, stages=(stage("fab", 30, 0, 0.3),), measures={})
        )
        is None
    )
    best = outcome.strongest(RESULTS)
    assert best is not None and best.name == "apgd-t"


# --- --quiet on the command line -----------------------------------------------------------------


@pytest.fixture
def place(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """A directory with a finished training, ``good``, and its evaluation, ``seen``."""

    def make() -> None:
        assert main(["train", "hydra.run.dir=good", *FAST]) == 0
        assert main(["eval", "run=good", *EVAL, "hydra.run.dir=seen"]) == 0

    return start_in("console", make)


def test_the_end_of_a_training(place: Path) -> None:
    val = {"n": 100, "clean": 0.9, "robust": 0.5, "attack": "PGD-10, linf 8/255"}
    kept = json.loads((place / "good/summary.json").read_text())
    (place / "old.json").write_text(
        json.dumps(
            {k: v for k, v in kept.items() if k not in ("last", "guards", "checksum", "files")}
        )
    )
    summary = replace(Summary.load(place / "old.json"), best_epoch=2, epochs=3, val=val)
    assert summary.last == summary.guards == {}  # as before there was either
    command = "advbench eval run=here"
    for terminal, mark in ((True, "╭"), (False, f"next: {command}")):
        shown, stream = screen(terminal)
        outcome.show_training(summary, Path("here"), shown, command)
        text = stream.getvalue()
        assert mark in text and "2 of 3" in text and "50.0 %" in text
    assert str(Accuracy.of(50, 100)) not in text
    no_threat = replace(summary, val={**val, "robust": None, "attack": None})
    shown, stream = screen(terminal=True)
    outcome.show_training(no_threat, Path("here"), shown, command)
    assert "robust " not in stream.getvalue()


def test_quiet_runs_say_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "--quiet", *FAST, "hydra.run.dir=q1"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("best epoch 1 of 1") and ": q1" in said
    assert "training: q1" in Path("q1/log.txt").read_text()
    assert main(["eval", "run=good", "-q", *EVAL, "protocol.restarts=1,2", "-m"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and said.count("robust ") == 2
    assert main(["eval", "run=nowhere", "-q"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("advbench: there is no run 'nowhere'")


# --- the list of runs ----------------------------------------------------------------------------


def copied(source: str, name: str, *without: str) -> Path:
    folder = Path(name)
    shutil.copytree(source, folder)
    for file in without:
        (folder / file).unlink()
    return folder


def test_the_states_of_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, seen = str(place / "good"), str(place / "seen")
    copied(good, "done")
    copied(good, "cut", "summary.json")
    copied(good, "busy", "summary.json")
    failed = copied(good, "sick", "summary.json")
    with (failed / "log.txt").open("a") as file:
        file.write("2026-01-01 00:00:00 failed: the loss is not finite\n")
    copied(seen, "measured")
    short = copied(seen, "short")
    results = json.loads((short / "results.json").read_text())
    del results["checksum"], results["files"]
    cut = {"missing": ["pgd-ce"], "unfinished": {"decided": 0, "of": 1}, "measures": {}}
    cut["verdict"] = {"label": None, "indicators": []}
    cut["robust"] = {"acc": results["robust"]["acc"], "ci95": None}
    (short / "results.json").write_text(json.dumps({**results, **cut}))
    for name, content in (("wrong", '{"robust": 1}'), ("odd", '"\\u001b"')):
        (copied(seen, name) / "results.json").write_text(content)
    (copied(good, "strange") / "summary.json").write_text('{"val": [3]}')
    Path("other").mkdir()
    Path("other/config.yaml").write_text("just: a file\n")
    with FileLock("busy/.lock"):
        found = {str(run.folder): run for run in list_runs.find([Path(".")])}
    assert len(found) == 9
    states = {name: (run.kind, run.state) for name, run in found.items()}
    assert states == {
        "done": ("train", "finished"),
        "cut": ("train", "interrupted"),
        "busy": ("train", "at work"),
        "sick": ("train", "failed"),
        "measured": ("eval", "finished"),
        "short": ("eval", "interrupted"),
        "wrong": ("eval", "damaged"),
        "odd": ("eval", "damaged"),
        "strange": ("train", "damaged"),
    }
    assert "wrong/results.json is not a result of advbench" in found["wrong"].where
    assert found["sick"].where == "the loss is not finite"
    assert found["cut"].where == "after epoch 1 of 1"
    assert found["cut"].resume == "advbench train resume=cut"
    assert found["done"].resume == found["busy"].resume == found["measured"].resume == ""
    assert found["done"].what == "digits convnet standard"
    robust = Results.load(Path("measured/results.json")).robust
    assert found["measured"].robust == str(robust).replace(" %", "")
    assert found["short"].robust.startswith("<= ")


def test_what_goes_on_is_what_the_list_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for names with signs of Hydra's, a plugin and a model that is code."""
    monkeypatch.chdir(tmp_path)
    Path("plug.py").write_text("")
    code = "from torch import nn\n\n\ndef build():\n"
    code += "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    Path("own.py").write_text(code)
    names = ("a b", "seed=1,recipe=standard", "it's [one]")
    for name in names:
        home = setting("hydra.run.dir", name)
        assert main(["train", *FAST, "plugins=[plug.py]", home]) == 0
        Path(f"{name}/summary.json").unlink()
    model = ["model=own.py:build", "data=digits", "threat=linf_8", *EVAL, "protocol.steps=3000"]
    assert main(["eval", *model, "budget=0.1s", "hydra.run.dir=late"]) == 0
    found = {str(run.folder): run for run in list_runs.find([Path(".")])}
    assert {run.state for run in found.values()} == {"interrupted"}
    assert "stage" in found["late"].where or found["late"].where == "at the start"
    for name, run in found.items():
        program, *arguments = shlex.split(run.resume)
        assert program == "advbench"
        if name == "late":
            assert arguments[-1] == "model=own.py:build"
            arguments.append("budget=0.1s")
        assert main(arguments) == 0, run.resume
    assert all(Path(f"{name}/summary.json").exists() for name in names)


def test_a_hundred_runs_are_listed_without_torch(place: Path, tmp_path: Path) -> None:
    for i in range(100):
        folder = tmp_path / f"r{i:03d}"
        folder.mkdir()
        for name in ("config.yaml", "summary.json", "metrics.csv"):
            shutil.copy(f"good/{name}", folder / name)
        os.utime(folder / "summary.json", (i + 1, i + 1))
    code = (
        "import sys\nfrom advbench.cli import main\n"
        f"assert main(['list', 'runs', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [word for word in done.stdout.split() if word.startswith(str(tmp_path))]
    assert [Path(name).name for name in names] == [f"r{i:03d}" for i in range(100)]


@pytest.mark.parametrize("width", (60, 300))
def test_no_name_is_folded(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name can be copied from the list, and what is in a file steers no terminal."""
    monkeypatch.chdir(tmp_path)
    shown = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(list_runs, "table_console", lambda: shown)
    name = f"{'long-' * 20}run"
    for kept in ("epochs: 3", 'epochs: "\\e[31m"'):
        folder = Path(kept[:9]) / name
        folder.mkdir(parents=True)
        choices = "choices: {data: '[red]digits', recipe: standard}"
        (folder / "config.yaml").write_text(f"recipe: {{}}\ntrainer: {{{kept}}}\n{choices}\n")
    list_runs.show([Path(".")])
    said = capsys.readouterr().out
    assert said.count(f"/{name}") == 4 and "\x1b" not in said  # in the list, and to go on
    assert said.count("[red]digits own own standard") == 2 and ("state" in said) == (width == 300)


def test_no_runs_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no 'outputs': make a run with 'advbench train'"):
        list_runs.find([Path("outputs")])
    Path("empty").mkdir()
    with pytest.raises(UserError, match="there are no runs in empty"):
        list_runs.find([Path("empty")])
    assert main(["list", "backbones", "empty"]) == 2


def test_a_mistake_is_kept_in_the_log_of_its_run(place: Path) -> None:
    shown, _ = screen(terminal=False)
    shown.failed("nowhere to write")  # no run yet
    shown.log = Path("seen/log.txt")
    shown.failed("it broke")
    assert Path("seen/log.txt").read_text().splitlines()[-1].endswith("failed: it broke")
    shown.log = Path("gone/log.txt")
    shown.failed("taken back")
    assert not Path("gone").exists()


# --- the list of configs -------------------------------------------------------------------------


def test_descriptions_are_whole_sentences_that_fit() -> None:
    seen = 0
    for group in options.GROUPS:
        for name, file in options.config.options(group).items():
            _, description = options.header(file.read_text(encoding="utf-8"))
            assert len(description) <= 101, f"{group}/{name}"
            assert not description.endswith((":", ",", "with it")), f"{group}/{name}"
            seen += 1
    assert seen >= 60


def test_a_copy_comes_before_the_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("trainer/default", "protocol/paper/hpm"):
        assert main(["copy", name, "conf"]) == 0
        assert Path(f"conf/{name}.yaml").is_file()
    for name, old, new in (("trainer/default", "epochs: 30", "epochs: 7"),
                           ("protocol/paper/hpm", "steps: 20", "steps: 21")):  # fmt: skip
        file = Path(f"conf/{name}.yaml")
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    capsys.readouterr()
    for option in (["--config-dir", "conf"], ["-cd=conf"]):
        assert main(["train", *option, "--cfg", "job"]) == 0
        assert "epochs: 7" in capsys.readouterr().out
    assert main(["eval", "--config-dir=conf", "protocol=paper/hpm", "--cfg", "job"]) == 0
    assert "steps: 21" in capsys.readouterr().out
    assert main(["train", "--cfg", "job"]) == 0
    assert "epochs: 30" in capsys.readouterr().out
