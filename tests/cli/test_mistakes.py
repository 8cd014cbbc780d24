"""Every mistake on the command line is one line, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CPU, FAST, OWN, arrays, complain, save, without_checksums
from filelock import FileLock
from processes import Process, main_of
from torch import nn

from advbench.cli.main import main


def save_test(name: str, y: np.ndarray) -> str:
    np.savez(name, x_test=arrays()["x_test"], y_test=y)
    return f"data.path={name}"


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


NPZ = ["train", "data=npz", *FAST]
MISTAKES: dict[str, tuple[Any, str]] = {
    "budget": (
        [*OWN, "budget=soon"],
        "budget=soon is no time and no number of passes: write 90s, 10min, 2h or 2e6passes",
    ),
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
    "unfinished": (["eval", "run=cut"], "finish; resume it with: advbench train resume=cut"),
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
    "transfer": (["eval", "run=good", "protocol=pgd", "transfer=[good]"], "use protocol=adaptive"),
    "no transfer": (
        ["eval", "run=good", "protocol=adaptive", "transfer=[no]"], "there is no run 'no'"
    ),
    "traits of a run": (["eval", "run=good", "traits.stochastic=true"], "declares its own"),
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
    "null": (["train", "data=null"], "that is not an option: give GROUP=NAME"),
    "list of options": (["eval", "run=good", "threat=[1]"], "choose one with threat=NAME"),
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
    "cutmix": (["train", "data.augment.cutmix=2"], "cutmix=2 is not a probability"),
    "recipe inside": (["train", "recipe=awp", "recipe.of=trads"], "did you mean 'trades'?"),
    "l1 in training": (["train", "recipe=fgsm_rs", "threat=l1_12"], "not defined for l1"),
    "compile": (["train", "trainer.compile=fast"], "no trainer.compile 'fast'; there is: default"),
    "devices": (["train", *CPU, "trainer.devices=9999"], "devices=9999 on a CPU must be a number"),
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
    without_checksums("bad")  # as who forges a run would leave it
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


def test_a_mistake_leaves_the_users_own_directories(place: Path) -> None:
    Path("keep/empty").mkdir(parents=True)
    assert main(["train", "hydra.run.dir=keep/empty", "threat.eps=8"]) == 2
    assert Path("keep/empty").is_dir()


def test_several_processes_say_a_mistake_once(place: Path) -> None:
    folder = Path("busy")
    folder.mkdir()
    words = ["run=good", "protocol=fgsm", "hydra.run.dir=busy", *CPU, "trainer.devices=2"]
    with FileLock(folder / ".lock"):
        process = Process(main_of, ["eval", *words], folder=place)
        assert process.wait() == 2
    lines = process.output.splitlines()
    said = [line for line in lines if line.startswith(("advbench", "Trace"))]
    assert said == ["advbench: another process is at work in 'busy'"]
    process = Process(main_of, ["eval", *words, "n=99999"], folder=place)
    assert process.wait() == 2
    assert process.output.count("n=99999 but the split has 360 samples") == 1
