"""The command line, end to end in a temporary directory; and every mistake that it answers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

import advbench
from advbench import config
from advbench.cli import hydra_app, options
from advbench.cli.main import main
from advbench.config.words import setting
from advbench.runs import directory
from advbench.runs.results import Results

FAST = ["trainer.epochs=1", "recipe.steps=2", "trainer.val_steps=1"]
MODEL = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def resnet():
    from torchvision.models import resnet18

    return resnet18(num_classes=5)


def shaped():
    model = build()
    model.input_shape = [3, 8, 8]
    return model


def half():
    return nn.Linear(2, 2).half
"""


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {
        "x_train": random.integers(0, 256, (64, 8, 8, 3), np.uint8),
        "y_train": random.integers(0, 5, 64),
        "x_test": random.integers(0, 256, (32, 8, 8, 3), np.uint8),
        "y_test": random.integers(0, 5, 32),
    }
    return {**made, **changes}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a finished run, an interrupted one, models and data."""
    folder = tmp_path_factory.mktemp("place")
    before = Path.cwd()
    os.chdir(folder)
    Path("m.py").write_text(MODEL)
    np.savez("ok.npz", **arrays())  # pyright: ignore
    assert main(["train", "hydra.run.dir=good", *FAST]) == 0
    cut = Path("cut")
    cut.mkdir()
    (cut / "config.yaml").write_text(Path("good/config.yaml").read_text())
    yield folder
    os.chdir(before)


def test_train_eval_report_list_copy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Path("good")
    names = {path.name for path in good.iterdir()}
    assert names >= {"config.yaml", "model.safetensors", "metrics.csv", "summary.json", "log.txt"}
    assert main(["eval", "run=good", "protocol=pgd", "protocol.steps=3", "n=40"]) == 0
    (file,) = place.glob("outputs/eval/*/results.json")
    results = Results.load(file)
    assert results.data["n"] == 40 and results.protocol["steps"] == 3
    assert {p.name for p in file.parent.iterdir()} >= {
        "config.yaml",
        "plan.json",
        "samples.parquet",
        "log.txt",
    }
    assert main(["report", "outputs"]) == 0
    assert "pgd 1" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert main(["list", "backbones"]) == 0
    assert "resnet18" in capsys.readouterr().out
    assert main(["copy", "defense/none", "own"]) == 0
    assert Path("own/defense/none.yaml").is_file()
    assert main(["--help"]) == main([]) == main(["--version"]) == 0


def test_the_same_command_does_not_work_twice(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = Path("good/summary.json").stat().st_mtime_ns
    assert main(["train", "hydra.run.dir=good", *FAST]) == 0
    assert "finished already" in capsys.readouterr().out
    assert Path("good/summary.json").stat().st_mtime_ns == stamp


def test_multirun_makes_a_run_per_job(place: Path) -> None:
    assert main(["train", "-m", "seed=1,2", "recipe=standard", "trainer.epochs=1"]) == 0
    found = sorted(place.glob("outputs/train/*/summary.json"))
    assert len(found) == 2 and all("standard-s" in str(run) for run in found)
    assert main(["eval", "protocol=clean"]) == 0  # the newest finished run
    (file,) = place.glob("outputs/eval/*standard-s2*clean*/results.json")
    assert Results.load(file).stages == ()


def test_a_model_of_your_own(place: Path) -> None:
    own = ["data=npz", "data.path=ok.npz", "threat=linf_8", "protocol=fgsm"]
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
               .state_dict(), "w.pt")  # fmt: skip
    assert main(["eval", "model=m.py:build", "weights=w.pt", *own]) == 0
    own[2:3] = ["threat.norm=linf", "threat.eps=8/255"]  # the same
    assert main(["eval", "model=m.py:resnet", *own]) == 0
    files = list(place.glob("outputs/eval/m-fgsm*/results.json"))
    assert len(files) == 2
    assert len({Results.load(file).provenance["model_sha256"] for file in files}) == 2


def test_data_and_threat_come_from_the_run_and_can_be_changed(place: Path) -> None:
    assert main(["eval", "run=good", "protocol=fgsm", "threat.eps=8/255", "n=20"]) == 0
    (file,) = place.glob("outputs/eval/good-fgsm-linf_8-255-*/results.json")
    assert Results.load(file).threat == {"norm": "linf", "eps": 8 / 255}
    assert main(["eval", "run=good", "protocol=fgsm", "threat=l2_05", "n=20"]) == 0
    assert list(place.glob("outputs/eval/good-fgsm-l2_0.5-*/results.json"))


def test_the_api_uses_the_same_objects(place: Path) -> None:
    model = advbench.load("good")
    x = torch.rand(12, 1, 8, 8)
    results = advbench.evaluate(model, x, model(x).argmax(1), threat="linf_8", protocol="pgd")
    assert results.clean.acc == 1.0 and results.data["n"] == 12


def test_a_plugin_is_named_on_the_command_line(place: Path) -> None:
    Path("mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from advbench.defenses.base import Defense\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Defense):\n    strength: float = 1.0\n"
    )
    Path("conf/defense").mkdir(parents=True)
    Path("conf/defense/mine.yaml").write_text("_target_: mine.Mine\nstrength: 2.0\n")
    command = ["train", "--config-dir", "conf", "defense=mine", "hydra.run.dir=mine_run", *FAST]
    assert main([*command, "plugins=[mine.py]"]) == 0
    assert main(["eval", "run=mine_run", "protocol=clean", "plugins=[mine.py]"]) == 0
    assert main(["eval", "run=mine_run", "protocol=clean"]) == 2


def test_what_is_suggested_can_be_typed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a training with a plugin, and for a run that did not finish, whatever its name is."""
    Path("my [1].py").write_text("")
    home, code = "outputs/train/seed=1,recipe=it's mine", setting("plugins", ["my [1].py"])
    command = ["train", code, setting("hydra.run.dir", home), *FAST]
    assert main(command) == 0
    (told,) = re.findall("^next: advbench (.+)$", capsys.readouterr().out, re.MULTILINE)
    words = shlex.split(told)
    assert code in words
    assert main([*words, "n=5", "budget=0.1s"]) == 0
    Path(f"{home}/summary.json").unlink()
    assert main(["eval", setting("run", home)]) == 2
    told = capsys.readouterr().err.rpartition("go on with: advbench ")[2]
    assert main(shlex.split(told)) == 0
    assert main(["eval", "run=nothing"]) == 2
    told = capsys.readouterr().err.rpartition("the newest is ")[2]
    assert shlex.split(told) == [setting("run", home)]


def save(name: str, **changes: np.ndarray) -> str:
    np.savez(name, **arrays(**changes))  # pyright: ignore
    return f"data.path={name}"


def save_test(name: str, y: np.ndarray) -> str:
    np.savez(name, x_test=arrays()["x_test"], y_test=y)
    return f"data.path={name}"


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


NPZ = ["train", "data=npz", *FAST]
CPU = ["trainer.accelerator=cpu"]
OWN = ["eval", "model=m.py:build", "data=npz", "data.path=ok.npz", "threat=linf_8", "protocol=pgd"]
MISTAKES: dict[str, tuple[Any, str]] = {
    "budget": ([*OWN, "budget=soon"], "budget=soon is not a duration: write 90s, 10min or 2h"),
    "slots": ([*OWN, "trainer.batch_size=0"], "trainer.batch_size=0 is not auto or at least 1"),
    "search": ([*OWN, "trainer.precision=fp8"], "no trainer.precision 'fp8'"),
    "engine": ([*OWN, "protocol=autoattack", "protocol.engine=quick"], "no protocol.engine 'qu"),
    "curve": ([*OWN, "protocol=curve", "protocol.eps=[0.9]"], "protocol.eps must lie above 0"),
    "option": (["train", "backbone=resnet19"], "no backbone 'resnet19'; did you mean 'resnet18'?"),
    "verb": (["trian"], "did you mean 'train'?"),
    "key": (["train", "trainer.epoch=3"], "'trainer.epoch'; did you mean 'trainer.epochs'?"),
    "group": (["train", "defence=none"], "no key 'defence'; did you mean 'defense'?"),
    "type": (["train", "trainer.epochs=many"], "trainer.epochs: Value 'many'"),
    "nested type": (["train", "data.augment.crop=x"], "data.augment.crop: Value 'x'"),
    "top type": (["train", "seed=one"], "seed: Value 'one'"),
    "no value": (["train", "backbone"], "'backbone' is not KEY=VALUE"),
    "no data": (["train", "data=cifar10"], "add data.download=true, or say where"),
    "no npz": ([*NPZ, "data.path=no.npz"], "there is no file 'no.npz'"),
    "no path": (NPZ, "data.path has no value"),
    "0..255": (
        lambda: [*NPZ, save("big.npz", x_train=arrays()["x_train"].astype(np.float32))],
        "divide by 255",
    ),
    "nan images": (
        lambda: [*NPZ, save("nan.npz", x_train=np.full((64, 8, 8, 3), np.nan, np.float32))],
        "NaN",
    ),
    "labels": (
        lambda: [*NPZ, save("neg.npz", y_train=arrays()["y_train"] - 1)],
        "label -1",
    ),
    "labels of the test set": (
        lambda: [*OWN[:3], save("high.npz", y_test=np.full(32, 7)), *OWN[4:]],
        "y_test in 'high.npz' has the label 7",
    ),
    "labels of the model": (
        lambda: [*OWN[:3], save_test("seven.npz", np.full(32, 7)), *OWN[4:], "data.num_classes=8"],
        "labels up to 7 and the model has 5 classes",
    ),
    "eps": (["train", "threat.eps=8"], "did you mean threat.eps=8/255?"),
    "no eps": (["train", "threat.eps=small"], "write 8/255 or 0.03"),
    "classes": (["train", "backbone.num_classes=5"], "does not fit digits, which has 10"),
    "shape": (["train", "backbone=lenet"], "lenet needs images of at least 16x16"),
    "shape of the run": (
        ["eval", "run=good", "data=npz", "data.path=ok.npz"],
        "is for images of shape (1, 8, 8)",
    ),
    "shape of the model": ([*OWN[:1], "model=m.py:build", "data=digits", *OWN[4:]], "can't take"),
    "unfinished": (["eval", "run=cut"], "did not finish; go on with: advbench train resume=cut"),
    "no run": (["eval", "run=nowhere"], "there is no run 'nowhere'"),
    "n": (["eval", "run=good", "n=361"], "n=361 but the split has 360 samples"),
    "no factory": ([*OWN[:1], "model=m.py:biuld", *OWN[2:]], "did you mean 'build'?"),
    "no model": ([*OWN[:1], "model=m.py:half", *OWN[2:]], "not a torch.nn.Module"),
    "no weights": ([*OWN, "weights=no.pt"], "there are no weights at 'no.pt'"),
    "no threat": (OWN[:4], "give threat=linf_8"),
    "plugin": (["train", "plugins=[no.py]"], "there is no file 'no.py'"),
    "group of list": (["list", "backbon"], "did you mean 'backbone'?"),
    "copy": (["copy", "backbone/resnet81", "."], "did you mean 'resnet18'?"),
    "no results": (["report", "m.py"], "m.py is not a result"),
    "loss": (["eval", "run=good", "protocol=pgd", "protocol.loss=crossent"], "no attack loss"),
    "eval's trainer": (["train", "trainer=evaluation"], "trainer=evaluation is for eval"),
    "train's trainer": (["eval", "run=good", "trainer=default"], "trainer=default is for train"),
    "norm without eps": (["eval", "run=good", "threat.norm=l2"], "give threat.eps=... as well"),
    "resume and more": (["eval", "resume=good", "n=5"], "leave out n"),
    "dir of a sweep": (["train", "-m", "seed=1", "hydra.run.dir=x"], "hydra.sweep.dir=DIR"),
    "dir is a file": (["train", "hydra.run.dir=m.py"], "can't use"),
    "l1": (
        ["eval", "run=good", "threat=l1_12", "protocol=pgd"],
        "PGD's step is not defined for l1: use protocol=apgd",
    ),
    "eval's data": (["train", "data=run"], "no data is chosen"),
    "batch size": (["train", "trainer.batch_size=5000"], "batch_size"),
    "no retrofit": (["eval", "run=good", "defense=hpm"], "has to be trained with the model"),
    "defense of none": (["eval", "run=good", "defense.jump=1"], "not a key of the run's defense"),
    "jump": (["eval", "run=good", "defense=jumprelu", "defense.jump=-1"], "not a number from 0 on"),
    "own defense": ([*OWN, "defense.jump=1"], "give defense=NAME"),
    "transfer": (["eval", "run=good", "protocol=pgd", "transfer=[good]"], "take protocol=adaptive"),
    "no transfer": (
        ["eval", "run=good", "protocol=adaptive", "transfer=[no]"], "there is no run 'no'"
    ),
    "traits of a run": (["eval", "run=good", "traits.stochastic=true"], "knows its own"),
    "traits": ([*OWN, "traits.gradient=exakt"], "did you mean 'exact'?"),
    "traits' key": ([*OWN, "traits.noisy=true"], "no key 'traits.noisy'"),
    "traits' type": ([*OWN, "traits.stochastic=maybe"], "'maybe' is not a valid bool"),
    "traits' size": ([*OWN, "traits.batch_size=10.5"], "traits.batch_size: Value '10.5'"),
    "key of the defense": (["eval", "run=good", "defense.ceiling=3"], "+defense.ceiling=VALUE"),
    "no curve": (["eval", "run=good", "protocol=curve", "threat.eps=0"], "threat.eps above 0"),
    "no step": (
        ["eval", "run=good", "protocol=paper/jumprelu", "protocol.step_size=0"], "is not above 0"
    ),
    "params": (["eval", "run=good", "protocol=torchattacks", "protocol.params=x"], "protocol.par"),
    "EOT": (
        ["eval", "run=good", "protocol.suite=rand", "protocol.attacks=[apgd-ce,fab]"],
        "fab-t in the place of fab",
    ),
    "warm-up": (["train", "optimizer.warmup=inf"], "optimizer.warmup=inf is not a number of ep"),
    "gamma": (["train", "optimizer.gamma=-1"], "optimizer.gamma=-1 is not in [0, 1]"),
    "milestones": (["train", "optimizer.milestones=[-5]"], "has epochs below 0"),
    "width": (["train", "backbone=wrn_28_10", "backbone.width=0"], "width=0 is not at least 1"),
    "batches": ([*OWN, "traits.batch_dependent=true"], "with traits.batch_size=NUMBER"),
    "members": (["train", "defense=chain", "defense.members=[spart]"], "did you mean 'sparta'?"),
    "a member's key": (
        ["train", "defense=chain", "defense.members=[{sparta: {shar: net}}, hpm]"],
        "did you mean 'share'?",
    ),
    "no list": (["train", "defense=chain", "defense.members=5"], "is not a list"),
    "no member": (["train", "defense=chain", "defense.members=[{hpm: 5}]"], "is no defense"),
    "one member": (["train", "defense=chain", "defense.members=[sparta]"], "at least two members"),
    "two heads": (
        ["train", "defense=chain", "defense.members=[mfdv_snn,hpm]"], "needs a linear head"
    ),
    "teachers": (["train", "recipe=mtard"], "needs two teachers"),
    "auto in training": (["train", "defense=jumprelu"], "defense.jump="),
    "phi": (["train", "defense=sparta", "defense.weights=good"], "phi"),
    "step": (
        ["eval", "run=good", "defense=jumprelu", "protocol=paper/jumprelu", "threat.eps=1/255"],
        "does not fit into",
    ),
    "a key of a list": (
        ["train", "defense=chain", "defense.members.beta=3"],
        "'defense.members' is a list, without a key 'beta': set it whole, defense.members=[...]",
    ),
    "parameter": (
        ["eval", "protocol=torchattacks", "protocol.params.steps=5"],
        "add it with +protocol.params.steps=VALUE",
    ),
    "logger of none": (["train", "logger.mode=offline"], "choose logger=NAME first"),
    "null": (["train", "data=null"], "null is no option: give GROUP=NAME"),
    "added key": (["train", "+epoch=3"], "no key 'epoch'"),
    "config of a sweep": (["train", "-m", "seed=1,2", "--cfg", "job"], "leave out -m"),
    "no option": (["train", "--hepl"], "unrecognized arguments: --hepl (advbench train --help)"),
    "spaces": (["train", "seed", "=", "1"], "'seed' is not KEY=VALUE, without spaces around"),
    "space in a list": (["train", "-m", "seed=1,", "2"], "'seed=1,' ends with a comma"),
    "group without a name": (["train", "defense", "--help"], "give defense=NAME (see: advbench li"),
    "sweep without -m": (["train", "seed=1,2"], "add -m to run each"),
    "paper": (["eval", "protocol=paper/hpn"], "did you mean 'paper/hpm'? (see: advbench list pro"),
    "eval's recipe": (["eval", "recipe=trades"], "eval takes its recipe from the run"),
    "eval's experiment": (["eval", "experiment=hpm_quick"], "(experiments are for train)"),
    "train's protocol": (["train", "protocol=pgd"], "give it to advbench eval"),
    "logger": (["train", "logger=tensorbord"], "did you mean 'tensorboard'?"),
    "launcher": (["train", "-m", "hydra/launcher=slurm", "seed=1"], "is: basic, joblib, submitit"),
    "extra": (["train", "data.extra=no.npz"], "name it with data.extra=FILE.npz"),
    "cutmix": (["train", "data.augment.cutmix=2"], "cutmix=2 is no probability"),
    "recipe inside": (["train", "recipe=awp", "recipe.of=trads"], "did you mean 'trades'?"),
    "l1 in training": (["train", "recipe=fgsm_rs", "threat=l1_12"], "not defined for l1"),
    "compile": (["train", "trainer.compile=fast"], "no trainer.compile 'fast'; there is: default"),
    "devices": (["train", *CPU, "trainer.devices=9999"], "devices=9999 on a CPU is a number"),
    "devices of eval": (["eval", "run=good", *CPU, "trainer.devices=0"], "devices=0 on a CPU"),
    "nodes": (["train", "trainer.num_nodes=2"], "num_nodes=2 needs a launcher"),
    "seed": (["train", "seed=99999999999999999999"], "take a whole number below 2**63"),
    "norm of a training": (["train", "threat.norm=l2"], "give threat.eps=... as well"),
    "dir of a training": (["eval", "run=good", "hydra.run.dir=good"], "holds a training run"),
    "negative epochs": (["train", "trainer.epochs=-1"], "trainer.epochs=-1 is not at least 1"),
    "no folder to write": (["report", "--html", "no/page.html"], "in a directory that exists"),
    "nothing to export": (["export", "good"], "give the directory of an evaluation"),
    "doctor": (["doctor", "--jsn"], "unrecognized arguments: --jsn (advbench doctor --help)"),
}  # fmt: skip


def test_every_mistake_is_tried() -> None:
    assert len(MISTAKES) == 111


def complain(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path for path in Path.cwd().rglob("*") if path.is_dir()}
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.removeprefix("[0] ")  # of a sweep
    assert expected in error
    assert error.startswith("advbench: ") and error.count("\n") == 1, error
    assert "Traceback" not in error
    assert {path for path in Path.cwd().rglob("*") if path.is_dir()} == before, "left something"


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_line(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = MISTAKES[name]
    given: Any = arguments() if callable(arguments) else arguments
    complain(given, expected, capsys)


def test_weights_that_do_not_match_or_would_run_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict(), "few.pt")
    complain([*OWN, "weights=few.pt"], "2 missing: '3.weight', '3.bias'", capsys)
    torch.save({"0.weight": Evil()}, "evil.pt")
    complain([*OWN, "weights=evil.pt"], "'evil.pt' is refused", capsys)
    assert not Path("ran").exists()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    state = model.state_dict()
    state["3.bias"][0] = torch.nan
    torch.save(state, "nan.pt")
    complain([*OWN, "weights=nan.pt"], "not finite: '3.bias'", capsys)


def test_nothing_to_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    complain(["eval"], "there is no finished training run in outputs/train", capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_cannot_bring_its_own_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("good/config.yaml").read_text()
    bad = Path("bad")
    bad.mkdir()
    for name in ("model.safetensors", "summary.json"):
        (bad / name).write_bytes((Path("good") / name).read_bytes())
    for target in ("os.system", "advbench.files.write_text", "advbench.defenses.base.dataclass"):
        (bad / "config.yaml").write_text(text.replace("advbench.defenses.base.Defense", target))
        complain(["eval", "run=bad"], f"'{target}'", capsys)


def test_a_directory_with_another_run_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complain(
        ["train", "hydra.run.dir=good", *FAST, "seed=5"], "another config (it differs in: seed",
        capsys,
    )  # fmt: skip
    complain(["train", "hydra.run.dir=conf_of_mine", "resume=conf"], "is not the directory", capsys)


def test_a_training_is_the_same_wherever_its_data_are(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And however it is said, saved and logged; its data are then where they were last."""
    Path("there").mkdir()
    Path("there/moved.npz").write_bytes(Path("ok.npz").read_bytes())
    random = np.random.default_rng(1)
    save("other.npz", x_train=random.integers(0, 256, (64, 8, 8, 3), np.uint8))
    fast = ["recipe=standard", "trainer.epochs=1", "trainer.batch_size=16"]
    command = ["train", "data=npz", *fast, "seed=14"]
    capsys.readouterr()
    assert main([*command, "data.path=ok.npz"]) == 0
    assert "note: threat=linf_015 is made for digits" in capsys.readouterr().out
    (folder,) = place.glob("outputs/train/npz-*-s14-*")
    moved = [*command, "data.path=there/moved.npz"]
    around = ["trainer.save_every=0", "trainer.accelerator=cpu", f"hydra.run.dir={folder}"]
    for again in (moved, [*moved, *around]):
        capsys.readouterr()
        assert main(again) == 0
        assert "finished already" in capsys.readouterr().out
    kept = config.read(folder / "config.yaml")
    assert (kept.data.path, kept.trainer.save_every) == ("there/moved.npz", 0)
    assert main([*command, "data.path=other.npz", f"hydra.run.dir={folder}"]) == 2
    assert config.read(folder / "config.yaml") == kept
    assert main([*command, "data.path=other.npz"]) == 0
    assert len(list(place.glob("outputs/train/npz-*-s14-*"))) == 2


def test_what_decides_nothing_is_known() -> None:
    """Of the shipped data and trainers, key by key: all others belong to the run's name."""
    ignored: dict[str, set[str]] = {}
    for name in config.options("data"):
        ignored[name] = _ignored("data", config.plain(config.shipped("data", name)))
    ignored["trainer"] = _ignored("trainer", config.plain(config.shipped("trainer", "default")))
    assert ignored.pop("run")  # of eval
    published = {"root", "download", "extra"}
    assert ignored == {
        "trainer": {"accelerator", "save_every"}, "digits": {"extra"}, "npz": {"path", "extra"},
        "imagefolder": {"workers", "extra"}, "imagenet": {"workers", "extra"},
        **dict.fromkeys(("cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"), published),
    }  # fmt: skip
    assert directory.deciding({"data": {}, "seed": 1, "logger": {}, "plugins": ["a.py"]}) == {
        "data": {}, "seed": 1,
    }  # fmt: skip


def _ignored(group: str, node: dict[str, Any]) -> set[str]:
    same = directory.deciding({group: node})
    return {key for key in node if directory.deciding({group: {**node, key: "another"}}) == same}


def test_a_run_cannot_read_the_environment_or_lead_elsewhere(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = Path("good/config.yaml").read_text()
    bad = Path("leak")
    bad.mkdir()
    for name in ("model.safetensors", "summary.json"):
        (bad / name).write_bytes((Path("good") / name).read_bytes())
    (bad / "config.yaml").write_text(text.replace("split_seed: 0", "split_seed: ${oc.env:SECRET}"))
    complain(["eval", "run=leak"], "has no interpolations", capsys)
    (bad / "config.yaml").write_text(text)
    (bad / "log.txt").symlink_to(place / "m.py")
    complain(["eval", "run=leak"], "'leak/log.txt' is a symbolic link", capsys)


def test_going_on_with_an_evaluation_does_not_run_the_code_it_names(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["data=npz", "data.path=ok.npz", "threat=linf_8", "protocol=clean"]
    assert main(["eval", "model=m.py:build", *given, "hydra.run.dir=named"]) == 0
    complain(["eval", "resume=named"], "advbench eval resume=named model=m.py:build", capsys)
    assert main(["eval", "resume=named", "model=m.py:build"]) == 0


def test_an_edited_model_is_another_model(place: Path) -> None:
    given = ["eval", "model=e.py:build", "data=npz", "data.path=ok.npz", "threat=linf_8"]
    for sign in ("", "-"):
        Path("e.py").write_text(
            "import torch\nfrom torch import nn\n\n\nclass M(nn.Linear):\n"
            f"    def forward(self, x):\n        return {sign}super().forward(x.flatten(1))\n\n\n"
            "def build():\n    torch.manual_seed(0)\n    return M(192, 5)\n"
        )
        sys.modules.pop("e", None)
        assert main([*given, "protocol=clean"]) == 0
    found = [Results.load(f).clean.acc for f in place.glob("outputs/eval/e-clean*/results.json")]
    assert len(found) == 2 and found[0] != found[1]


def test_a_result_may_be_asked_for_again_in_other_words(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["eval", "protocol=fgsm", "n=25", "run=good"]
    assert main(asked) == 0
    for other in (["budget=1h"], ["trainer.accelerator=cpu"], [f"run={place / 'good'}"]):
        assert main([*asked, *other]) == 0
        assert "finished already" in capsys.readouterr().out


def test_strict_wants_a_verdict(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None was computed, or that one: the exit code. The results are written as ever."""
    asked = ["eval", "-q", "protocol=clean", "run=good", "hydra.run.dir=strictly"]
    assert main([*asked, "strict=true"]) == 3
    said = capsys.readouterr().err
    assert said == "advbench: strict=true: no verdict on the reliability was computed\n"
    kept = json.loads(Path("strictly/results.json").read_text())
    assert kept["verdict"]["label"] is None
    assert main(asked) == 0
    for label, status in (("reliable", 0), ("inconclusive", 0), ("unreliable", 3)):
        told = {**kept, "verdict": {"label": label, "indicators": []}}
        Path("strictly/results.json").write_text(json.dumps(told))
        assert (main([*asked, "strict=true"]), main(asked)) == (status, 0)
        assert not capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # of another device, which does not end the first one
    assert hydra_app._strictly(None) == 0 and not capsys.readouterr().err


def test_a_mistake_leaves_the_users_own_directories(place: Path) -> None:
    Path("keep/empty").mkdir(parents=True)
    assert main(["train", "hydra.run.dir=keep/empty", "threat.eps=8"]) == 2
    assert Path("keep/empty").is_dir()


def test_a_sweep_goes_on_after_a_mistake(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-m", "trainer.batch_size=9999,64", "seed=9", *FAST]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("[0 trainer.batch_size=9999] advbench: ")
    assert len(list(place.glob("outputs/train/*-s9-*/summary.json"))) == 1


def run(*arguments: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "advbench", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(place: Path, tmp_path: Path) -> None:
    """Training and evaluation, killed twice each, end as the uninterrupted ones do."""
    training = ["train", "trainer.epochs=4", "recipe.steps=3", "trainer.save_every=0"]
    attack = ["eval", "protocol=pgd", "protocol.steps=200", "protocol.restarts=3",
              "trainer.batch_size=40"]  # fmt: skip
    ends = []
    for name, kills in (("whole", 0), ("cut", 2)):
        folder = tmp_path / name
        folder.mkdir()
        for arguments, final in ((training, "summary.json"), (attack, "results.json")):
            delay = 5.0
            for _ in range(kills):
                with run(*arguments, folder=folder) as process:
                    time.sleep(delay)
                    process.send_signal(signal.SIGKILL)
                delay += 0.7
            with run(*arguments, folder=folder) as process:
                output, _ = process.communicate()
            assert process.returncode == 0, output.decode()
            assert len(list(folder.rglob(final))) == 1, "a killed run must be gone on with"
        (weights,) = folder.rglob("model.safetensors")
        (metrics,) = folder.rglob("metrics.csv")
        (results,) = folder.rglob("results.json")
        content = json.loads(results.read_text())
        times = [line.rsplit(",", 1)[0] for line in metrics.read_text().splitlines()]
        counts = [(s["broken"], s["forwards"], s["backwards"]) for s in content["stages"]]
        ends.append((weights.read_bytes(), times, content["clean"], content["robust"], counts))
    assert ends[0] == ends[1]


def test_completion_knows_verbs_and_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "advbench tr")
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["train"]
    monkeypatch.setenv("COMP_LINE", "advbench train backbone=resnet")
    assert main(["-sc", "query=bash"]) == 0
    offered = capsys.readouterr().out.split()
    assert "backbone=resnet18" in offered and len(offered) == 4


def test_every_shipped_config_says_what_it_is() -> None:
    seen = 0
    for group in options.GROUPS:
        for name, file in options.config.options(group).items():
            command, description = options.header(file.read_text())
            assert command.startswith("advbench "), f"{group}/{name}: {command}"
            assert len(description) > 20, f"{group}/{name}"
            seen += 1
    assert seen >= 40


def test_every_experiment_composes(capsys: pytest.CaptureFixture[str]) -> None:
    names = list(config.options("experiment"))
    for name in names:
        assert main(["train", f"experiment={name}", "--cfg", "job"]) == 0, name
        assert "_target_" in capsys.readouterr().out
    assert len(names) >= 11


def test_a_retrofit_is_swept_and_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "-m", "run=good", "defense=jumprelu", "defense.jump=0,0.5,1.0", "n=30"]
    assert main([*command, "protocol=pgd", "protocol.steps=2", "hydra.sweep.dir=jumps"]) == 0
    found = [Results.load(file) for file in sorted(Path("jumps").rglob("results.json"))]
    assert sorted(results.settings["defense.jump"] for results in found) == [0, 0.5, 1.0]
    assert len({results.clean.acc for results in found}) > 1
    capsys.readouterr()
    assert main(["report", "jumps"]) == 0
    table = capsys.readouterr().out
    assert "defense.jump" in table and table.index("0.5") < table.index("1.0")


def test_a_model_of_your_own_takes_a_retrofit(place: Path) -> None:
    command = [*OWN, "defense=jumprelu", "defense.jump=0.1", "protocol=paper/jumprelu"]
    assert main([*command, "hydra.run.dir=own-jump", "threat.eps=0.1"]) == 0
    plan = json.loads(Path("own-jump/plan.json").read_text())
    assert [stage["name"] for stage in plan["stages"]] == ["ifgsm", "gray-box"]
    assert plan["identity"]["traits"]["gradient"] == "discontinuous"
    results = Results.load(Path("own-jump/results.json"))
    assert (results.run, results.settings["defense.jump"]) == ("m+jumprelu", 0.1)


def test_a_chain_is_trained_set_and_transferred_to(place: Path) -> None:
    chain = ["train", "defense=chain", "defense.members=[{jumprelu: {jump: 0.1}}, mfdv_snn]"]
    assert main([*chain, "recipe=standard", "trainer.epochs=1", "hydra.run.dir=chain"]) == 0
    command = ["eval", "run=chain", "defense.draws=3", "defense.jump=0.2", "protocol=adaptive"]
    more = ["n=20", "budget=0.1s", "transfer=[good]", "hydra.run.dir=chain-adaptive"]
    assert main([*command, *more]) == 0
    results = Results.load(Path("chain-adaptive/results.json"))
    assert results.settings["defense.members"] == "jumprelu+mfdvsnn"
    assert results.settings["defense.mfdvsnn.draws"] == 3
    stages = json.loads(Path("chain-adaptive/plan.json").read_text())["stages"]
    targets = {stage["target"]: stage.get("draws", 1) for stage in stages}
    assert targets["bpda_relu"] == 20 and targets["bpda_relu+mean"] == 1
    assert list(targets)[-1] == "transfer-good"
    command = ["eval", "run=good", "n=20", "protocol=adaptive", "transfer=[chain]", "budget=0.1s"]
    assert main([*command, "hydra.run.dir=good-adaptive"]) == 0


def test_fine_tuning_and_values_of_the_evaluation(place: Path) -> None:
    """A defense on a finished plain run; at evaluation what the weights allow may be changed."""
    tune = ["train", "defense=hpm", "defense.eval_batch=60", "init_from=good", *FAST]
    assert main([*tune, "hydra.run.dir=hpm"]) == 0
    ends = {}
    for name, more in {"batch": [], "context": ["defense.inference=context"]}.items():
        command = ["eval", "run=hpm", "n=60", "protocol=msa", "protocol.square=0", "budget=0.1s"]
        assert main([*command, *more, f"hydra.run.dir=hpm-{name}"]) == 0
        ends[name] = json.loads(Path(f"hpm-{name}/plan.json").read_text())
    assert ends["batch"]["identity"]["traits"]["batch_dependent"]
    assert not ends["context"]["identity"]["traits"]["batch_dependent"]
    targets = {stage["target"] for stage in ends["context"]["stages"]}
    assert targets >= {"model", "fc_head", "static", "soft-1", "frozen_batch", "base"}
    assert any("never change" in reason for reason in ends["batch"]["reasons"])
    assert Path("hpm/base.safetensors").read_bytes() == Path("good/model.safetensors").read_bytes()
    again = ["train", "defense=hpm", "defense.eval_batch=60", "init_from=hpm", *FAST]
    assert main([*again, "hydra.run.dir=hpm-again"]) == 0
    command = ["eval", "run=hpm-again", "n=60", "protocol=msa", "budget=0.1s"]
    assert main([*command, "hydra.run.dir=hpm-again-msa"]) == 0
    plan = json.loads(Path("hpm-again-msa/plan.json").read_text())
    assert "base" not in {stage["target"] for stage in plan["stages"]}


def test_teachers_are_runs(place: Path) -> None:
    command = ["train", "recipe=mtard", "recipe.robust_teacher=good", *FAST]
    assert main([*command, "recipe.standard_teacher=good", "hydra.run.dir=student"]) == 0
    rows = Path("student/metrics.csv").read_text().splitlines()
    assert "loss_kl_adversarial" in rows[0] and len(rows) == 2


def test_what_a_killed_process_left_does_not_stop_the_next(place: Path) -> None:
    folder = Path("left")
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.yaml.999.tmp").write_text("half")
    command = ["train", "hydra.run.dir=left", "seed=7", *FAST]
    assert main(command) == 0
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    attack = ["eval", "run=left", "protocol=fgsm", "n=20", "hydra.run.dir=left-eval"]
    assert main(attack) == 0
    journal = Path("left-eval/journal")
    journal.mkdir()
    (journal / "000-000000.npz").touch()
    assert main(attack) == 0
    assert not journal.exists()


def test_a_shape_may_be_a_list(place: Path) -> None:
    assert main([*OWN[:1], "model=m.py:shaped", *OWN[2:], "protocol=fgsm"]) == 0


def test_own_configs_count_inside_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a member of a chain, and inside AWP, a config of the user's own comes first."""
    assert main(["copy", "defense/sparta", "mine"]) == main(["copy", "recipe/trades", "mine"]) == 0
    sparta, trades = Path("mine/defense/sparta.yaml"), Path("mine/recipe/trades.yaml")
    sparta.write_text(sparta.read_text().replace("share: site", "share: net"))
    trades.write_text(trades.read_text().replace("beta: 6.0", "beta: 2.5"))
    words = ["defense=chain", "defense.members=[sparta,hpm]", "recipe=awp", "recipe.of=trades"]
    command = ["train", "--config-dir", "mine", *words, "trainer.val_steps=1", "trainer.epochs=1"]
    assert main([*command, "recipe.of={trades: {steps: 1}}", "hydra.run.dir=mixed"]) == 0
    kept = config.read(Path("mixed/config.yaml"))
    assert kept.defense.members[0].share == "net"
    assert (kept.recipe.of.beta, kept.recipe.of.steps) == (2.5, 1)
    sparta.write_text("defaults: [none]\n" + sparta.read_text())
    capsys.readouterr()
    assert main(command) == 2
    assert "write its values out" in capsys.readouterr().err


def test_several_processes_say_a_mistake_once(place: Path) -> None:
    folder = Path("busy")
    folder.mkdir()
    words = ["run=good", "protocol=fgsm", "hydra.run.dir=busy", *CPU, "trainer.devices=2"]
    command = [sys.executable, "-m", "advbench", "eval", *words]
    with FileLock(folder / ".lock"):
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith(("advbench", "Trace"))]
    assert said == ["advbench: another process is at work in 'busy'"]
    done = subprocess.run([*command, "n=99999"], capture_output=True, text=True)
    assert done.stderr.count("n=99999 but the split has 360 samples") == 1
