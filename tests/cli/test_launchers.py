"""Sweeps through Hydra's launchers: the same runs as one after the other, mistakes in one line."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from omegaconf import OmegaConf
from processes import Process, main_of

from advbench.cli import multirun
from advbench.cli.main import main
from advbench.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "running-on-slurm-and-ray.md"
FAST = ["recipe=standard", "trainer.epochs=1", "trainer.val_steps=1"]
PLUGINS = {
    "hydra/launcher=joblib": "hydra_plugins.hydra_joblib_launcher",
    "hydra/launcher=submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=ray": "hydra_plugins.hydra_ray_launcher",
    "hydra/sweeper=optuna": "hydra_plugins.hydra_optuna_sweeper",
}
EXTRAS = {"joblib": "sweep", "submitit": "slurm", "ray": "ray", "optuna": "sweep"}


def installed(option: str) -> bool:
    try:
        return importlib.util.find_spec(PLUGINS[option]) is not None
    except ModuleNotFoundError:
        return False


def needs(option: str) -> Any:
    (extra,) = (extra for name, extra in EXTRAS.items() if name in option)
    reason = f"needs a plugin: pip install 'advbench[{extra}]'"
    return pytest.mark.skipif(not installed(option), reason=reason)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def advbench(*words: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a command that starts other processes."""
    if "hydra/launcher=joblib" in words or "hydra/launcher=ray" in words:
        # Their workers end at the exit of a Python, which a forked process does not go through.
        command = [sys.executable, "-m", "advbench", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=cwd, env=environment, text=True, timeout=400,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout
    process = Process(main_of, list(words), folder=cwd)
    return process.wait(), process.output


# --- for real -----------------------------------------------------------------------------------


@pytest.fixture
def alone(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """The sweep as it is without a launcher."""

    def make() -> None:
        assert main(["train", "-m", "trainer.batch_size=128,64", *FAST]) == 0

    return start_in("sweep", make)


def weights(folder: Path) -> dict[str, bytes]:
    """Of the finished runs, by name."""
    return {
        file.parent.name: file.with_name("model.safetensors").read_bytes()
        for file in folder.glob("outputs/train/*/summary.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sizes"),
    [
        pytest.param("joblib", (128, 64), marks=needs("hydra/launcher=joblib")),
        # Each job is a new Python: one is enough.
        pytest.param("submitit_local", (64,), marks=needs("hydra/launcher=submitit_local")),
        pytest.param("ray", (128, 64), marks=needs("hydra/launcher=ray")),
    ],
)
def test_a_launcher_makes_the_same_runs(
    launcher: str, sizes: tuple[int, ...], alone: Path, tmp_path: Path
) -> None:
    """Runs and a mistake."""
    listed = ",".join(map(str, [*sizes, 100000]))
    sweep = [f"hydra/launcher={launcher}", f"trainer.batch_size={listed}"]
    code, said = advbench("train", "-m", *sweep, *FAST, cwd=tmp_path)
    assert code == 2, said
    same, found = weights(alone), weights(tmp_path)
    assert (len(same), len(found)) == (2, len(sizes)) and found.items() <= same.items()
    number = len(sizes)
    (mistake,) = re.findall(rf"\[{number} trainer.batch_size=100000\] advbench: (.*)", said)
    assert "is more than the" in mistake
    assert "Traceback" not in said
    assert not list(tmp_path.glob(".advbench-*"))


@pytest.mark.slow
@needs("hydra/launcher=joblib")
def test_eval_through_a_launcher(alone: Path) -> None:
    """Each job with its exit code; the highest counts."""
    run = f"run={next(iter(alone.glob('outputs/train/*')))}".replace(f"{alone}/", "")
    words = ["-m", "hydra/launcher=joblib", run, "protocol=fgsm", "n=16,32,0", "trainer.devices=1"]
    code, said = advbench("eval", *words, cwd=alone)
    assert code == 2, said
    assert len(list(alone.glob("outputs/eval/*/results.json"))) == 2
    (line,) = [line for line in said.splitlines() if "advbench:" in line]
    assert line.startswith("[2 n=0] advbench: ")


@pytest.mark.slow
@needs("hydra/sweeper=optuna")
def test_optuna_maximises_and_goes_on(tmp_path: Path) -> None:
    words = [
        "train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3",
        "optimizer.lr=interval(0.001,0.2)", *FAST,
    ]  # fmt: skip
    code, said = advbench(*words, cwd=tmp_path)
    assert code == 0, said
    found = re.findall(r"best epoch.*robust (\S+) %", said)
    (best,) = re.findall(r"best of 3: \[\d optimizer.lr=\S+\] with (\S+) % ", said)
    assert len(found) == 3 and float(best) == max(float(value) for value in found)
    _, again = advbench(*words, cwd=tmp_path)
    assert again.count("finished already") == 3  # seeded: the same trials


@pytest.mark.slow
def test_jobs_on_two_devices_have_processes_of_their_own(tmp_path: Path) -> None:
    """Which say nothing of their own, also where little is asked for."""
    devices = ["--quiet", "trainer.devices=2", "trainer.accelerator=cpu"]
    code, said = advbench("train", "-m", "seed=1,2", *devices, *FAST, cwd=tmp_path)
    assert code == 0, said
    assert len(weights(tmp_path)) == 2
    ends = [line for line in said.splitlines() if "validation accuracy" in line]
    assert len(ends) == 2 and "epoch   1" not in said and "training:" not in said


# --- the commands of the documentation ----------------------------------------------------------


def commands() -> list[str]:
    """Those of the page, whole lines with their continuations."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split("#")[0].strip() for line in lines if re.search(r"advbench (train|eval)", line)
    ]


def composed(command: str) -> Any:
    """The config that Hydra makes of a command of a sweep, before it is split into jobs."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from advbench import config

    words = shlex.split(command)
    verb = words[words.index("advbench") + 1]
    overrides = [word for word in words[words.index("advbench") + 2 :] if word != "-m"]
    config.register()
    with initialize_config_module("advbench.configs", version_base="1.3"):
        return (
            GlobalHydra.instance()
            .config_loader()
            .load_configuration(
                verb,
                multirun.with_presets(overrides),
                RunMode.MULTIRUN if "-m" in words else RunMode.RUN,
            )
        )


def test_the_page_shows_every_launcher() -> None:
    shown = "\n".join(commands())
    assert len(commands()) >= 8
    assert all(option in shown for option in PLUGINS)


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_page_compose(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in PLUGINS:
        if option in command and not installed(option):
            pytest.skip(f"{option} needs a plugin")
    cfg = composed(command)
    target = str(cfg.hydra.launcher._target_)
    if "submitit_slurm" in command:
        assert target.endswith("SlurmLauncher") and cfg.hydra.launcher.gpus_per_node
    if "optuna" in command:
        assert str(cfg.hydra.sweeper.direction) == "maximize"
        assert cfg.hydra.sweeper.sampler.seed == 0


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", list(PLUGINS))
def test_a_missing_plugin_is_one_line(
    option: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if installed(option):
        pytest.skip("the plugin is installed")
    assert main(["train", "-m", option, "seed=1,2"]) == 2
    (extra,) = (extra for name, extra in EXTRAS.items() if name in option)
    line = f"advbench: {option} needs a plugin: pip install 'advbench[{extra}]'\n"
    assert capsys.readouterr().err == line


def test_eval_refuses_a_search(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "-m", "hydra/sweeper=optuna", "defense.jump=interval(0,1)"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "test split" in message and "advbench train" in message
    multirun.refuse_search("eval", ["hydra/sweeper=basic"])
    multirun.refuse_search("train", ["hydra/sweeper=optuna"])


def test_presets_of_a_search() -> None:
    search = "hydra/sweeper=optuna"
    both = ["hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0"]
    assert multirun.with_presets(["seed=1"]) == ["seed=1"]
    assert multirun.with_presets([search]) == [search, *both]
    said = [search, "hydra.sweeper.direction=minimize", "hydra/sweeper/sampler=grid"]
    assert multirun.with_presets(said) == said


# --- a task, here and elsewhere -----------------------------------------------------------------


def job(cfg: Any, seen: dict[str, Any] | None = None) -> tuple[int, float | None]:
    """Does what its config says."""
    if seen is not None:
        seen.update(argv=list(sys.argv), cwd=Path.cwd())
    print("at work")
    if cfg == "mistake":
        raise UserError("no such thing")
    if cfg == "bug":
        raise ZeroDivisionError("oops")
    return (3, None) if cfg == "strict" else (0, float(cfg))


@pytest.fixture
def hydra_job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make Hydra say that this is a job."""
    from hydra.core.hydra_config import HydraConfig

    def becomes(number: int, *overrides: str, launcher: str = "x.JoblibLauncher") -> None:
        launched = {"_target_": launcher, "cpus_per_task": None}
        cfg = SimpleNamespace(
            job={"num": number},
            overrides=SimpleNamespace(task=OmegaConf.create(list(overrides))),
            launcher=launched,
        )
        monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: cfg))

    return becomes


COMMAND = ["advbench", "train", "-m", "--config-dir", "conf", "hydra/launcher=joblib",
           "hydra.searchpath=[pkg://a]", "seed=1,2", "trainer.epochs=1"]  # fmt: skip


def elsewhere(task: multirun.Task) -> multirun.Task:
    """The task as another process gets it."""
    copy = cloudpickle.loads(cloudpickle.dumps(task))
    copy.origin = ("another machine", 1)
    return copy


@pytest.mark.parametrize("launcher", ["x.JoblibLauncher", "hydra_submitit.SlurmLauncher"])
def test_a_job_elsewhere_leaves_word(
    launcher: str,
    here: Path,
    hydra_job: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["worker"])
    seen: dict[str, Any] = {}
    task = multirun.Task(job, COMMAND)
    assert not list(here.glob(".*"))
    away = elsewhere(task)
    away.job = partial(job, seen=seen)
    (other := here / "other").mkdir()
    scores = []
    for number, config in enumerate(["0.25", "mistake", "bug", "strict"]):
        hydra_job(number, f"seed={number}", "trainer.epochs=1", launcher=launcher)
        monkeypatch.chdir(other)
        scores.append(away(config))
    assert scores == [0.25, None, None, None]
    assert seen["cwd"] == here
    own = ["hydra.searchpath=[pkg://a]", "seed=3", "trainer.epochs=1"]
    assert seen["argv"] == ["advbench", "train", "--config-dir", "conf", *own]
    out, told = capsys.readouterr()
    assert out.splitlines() == [f"[{n} seed={n}] at work" for n in range(4)]
    assert task.settle() == 3
    later = capsys.readouterr().err
    silent, loud = (later, told) if "Joblib" in launcher else (told, later)
    assert silent == ""
    assert "[1 seed=1] advbench: no such thing\n" in loud
    assert "[2 seed=2] Traceback" in loud and "ZeroDivisionError: oops" in loud
    task.close()
    assert [path.name for path in here.iterdir()] == ["other"]
    away("0.5")  # the user has gone: nobody reads it, and nothing is left behind
    assert [path.name for path in here.iterdir()] == ["other"]


def test_a_sweep_here(
    here: Path, hydra_job: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    task = multirun.Task(job, [*COMMAND, "hydra/sweeper=optuna"])
    for number, config in enumerate(["0.25", "0.75", "mistake"]):
        hydra_job(number, f"seed={number}")
        task(config)
    assert task.settle() == 2
    out, err = capsys.readouterr()
    assert err == "[2 seed=2] advbench: no such thing\n"
    assert out.splitlines()[-1] == "best of 2: [1 seed=1] with 75.0 % validation accuracy"
    task.close()
    assert not any(here.iterdir())


def test_what_a_launcher_raises(
    here: Path, hydra_job: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    task = multirun.Task(job, COMMAND)
    with pytest.raises(ZeroDivisionError):  # nothing was sent anywhere: a bug
        task.settle(ZeroDivisionError())
    elsewhere(task)
    assert task.settle(RuntimeError("a worker\nwas killed")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "repeat the command to resume (RuntimeError: a worker was killed)" in line
    with pytest.raises(UserError):
        task.settle(UserError("mend it"))
    task.close()


def test_processes_share_out_the_gpus(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    taken, locks = [], []
    for _ in range(3):
        held: list[Any] = []
        monkeypatch.setattr(multirun, "_HELD", held)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        multirun._take_gpu(here)
        multirun._take_gpu(here)  # a second job of the process stays where it is
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
        locks.append(held)
    assert taken[:2] == ["4", "7"] and taken[2] in ("4", "7")
    assert [len(held) for held in locks] == [1, 1, 0]
    for held in locks:
        for lock in held:
            lock.release()
