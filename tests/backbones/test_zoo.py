"""RobustBench's zoo, through a stand-in for its package that reads weights as it does; and export.

The stand-in has the parts of robustbench 1.1.1 that are used: the table of models, the names of
data and threats, and ``load_model`` with its directories.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import evaluations
import numpy as np
import pytest
import torch
from torch import nn

from advbench.backbones import robustbench
from advbench.backbones.robustbench import Entry
from advbench.cli.main import main
from advbench.errors import UserError
from advbench.experiments import models
from advbench.report.model_info import model_info
from advbench.runs.results import Results

STAND_IN = {
    "__init__.py": "raise ImportError('as it comes from PyPI')\n",
    "model_zoo/enums.py": """
from enum import Enum


class BenchmarkDataset(Enum):
    cifar_10 = "cifar10"
    cifar_100 = "cifar100"
    imagenet = "imagenet"


class ThreatModel(Enum):
    Linf = "Linf"
    L2 = "L2"
""",
    "model_zoo/__init__.py": """
import torch
from torch import nn
from torch.nn import functional as F

from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
        self.conv = nn.Conv2d(3, 6, 3, stride=4)
        self.fc = nn.Linear(6 * 64, 10)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x - self.mu)).flatten(1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Net(), Net()

    def forward(self, x):
        return self.one(x) + self.two(x)


zoo = {"Me2026Net": {"model": Net, "gdrive_id": "1"}, "Me2026Pair": {"model": Pair}}
model_dicts = {
    data: {threat: zoo for threat in ThreatModel} for data in BenchmarkDataset
}
""",
    "utils.py": """
from pathlib import Path

import torch

from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel


def load_model(model_name, model_dir, dataset, threat_model):
    print("Downloading", model_name)
    model = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)][model_name]["model"]()
    path = Path(model_dir) / dataset / threat_model / f"{model_name}.pt"
    if not path.is_file():
        raise OSError("no network")
    model.load_state_dict(torch.load(path, map_location="cpu"), strict=True)
    return model.eval()
""",
}
# By its distribution: torchattacks 3.3 brings a folder of that name without what it imports.
REAL = any(importlib.metadata.distributions(name="robustbench"))
DATA = ["data=npz", "data.path=d.npz"]
FGSM = ["protocol=fgsm", "n=8"]


@pytest.fixture
def place(
    start_in: Callable[[str, Callable[[], None]], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A directory with data, weights and an evaluation, ``seen``; the stand-in is on the path."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name[:11] == "robustbench"}

    def make() -> None:
        for name, text in STAND_IN.items():
            file = Path("stand_in/robustbench", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        random = np.random.default_rng(0)
        arrays = {
            "x_train": random.integers(0, 256, (32, 32, 32, 3), np.uint8),
            "y_train": np.arange(32) % 10,
            "x_test": random.integers(0, 256, (12, 32, 32, 3), np.uint8),
            "y_test": np.arange(12) % 10,
        }
        np.savez("d.npz", **arrays)  # pyright: ignore
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path("stand_in").absolute())
            for name in ("Me2026Net", "Me2026Pair"):
                torch.manual_seed(7)
                model = robustbench.load(Entry("cifar10", "Linf", name), pretrained=False)
                file = Path(f"models/cifar10/Linf/{name}.pt")
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), file)
            command = ["eval", "model=robustbench:cifar10/Linf/Me2026Net", *DATA, *FGSM]
            assert main([*command, "hydra.run.dir=seen"]) == 0
        forget()

    def forget() -> None:
        for name in [name for name in sys.modules if name[:11] == "robustbench"]:
            del sys.modules[name]

    folder = start_in("zoo", make)
    monkeypatch.syspath_prepend(folder / "stand_in")
    yield folder
    forget()
    sys.modules.update(kept)


@pytest.fixture
def seen(place: Path) -> Path:
    """The evaluation of a zoo model."""
    return place / "seen"


def test_names() -> None:
    assert Entry.of("robustbench:Carmon2019Unlabeled") == Entry(
        "cifar10", "Linf", "Carmon2019Unlabeled"
    )
    assert Entry.of("robustbench:cifar10/L2/A").budget == 0.5
    assert not robustbench.is_named("my_model.py:build") and not robustbench.is_named(None)
    for spec, told in (
        ("robustbench:cifar10/Linf", "is not robustbench:DATA/THREAT/NAME"),
        ("robustbench:", "is not robustbench:DATA/THREAT/NAME"),
        ("robustbench:cifar10/corruptions/A", "RobustBench has no 'cifar10/corruptions'"),
        ("robustbench:cifar10/linf/A", "did you mean 'cifar10/Linf'"),
    ):
        with pytest.raises(UserError, match=told):
            Entry.of(spec)


def test_the_leaderboard_decides_data_and_threat() -> None:
    source = models.origin("robustbench:cifar100/Linf/A")
    assert source is not None
    assert source.data._target_ == "advbench.data.sources.cifar100"
    assert (source.threat.norm, source.threat.eps) == ("linf", 8 / 255)
    assert models.origin("my_model.py:build") is None


def test_a_zoo_model_is_evaluated_as_it_is(seen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results.load(seen / "results.json")
    assert results.run == "Me2026Net" and results.threat == {"norm": "linf", "eps": 8 / 255}
    # The same weights in a model of one's own, which may import what advbench has, are the same.
    robustbench.load(Entry("cifar10", "Linf", "Me2026Net"), pretrained=False)
    Path("own.py").write_text(
        "import torch\nfrom robustbench.model_zoo import Net\n\n\ndef build():\n"
        "    model = Net()\n"
        "    model.load_state_dict(torch.load('models/cifar10/Linf/Me2026Net.pt'))\n"
        "    return model\n"
    )
    own = ["eval", "model=own.py:build", *DATA, *FGSM, "threat=linf_8", "hydra.run.dir=own"]
    assert main(own) == 0
    other = Results.load(Path("own/results.json"))
    assert (results.clean, results.robust) == (other.clean, other.robust)
    command = ["eval", "model=robustbench:cifar10/Linf/Me2026Net", *DATA, *FGSM]
    assert main([*command, "threat.eps=2/255", "hydra.run.dir=less"]) == 0
    said = capsys.readouterr()
    assert "Downloading" in said.err and "Downloading" not in said.out
    assert Results.load(Path("less/results.json")).threat["eps"] == 2 / 255
    assert main(["eval", "resume=seen", "model=robustbench:cifar10/Linf/Me2026Net"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_mistakes_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, more, told in (
        ("cifar10/Linf/Me2026Nett", [], "has no 'Me2026Nett' in cifar10/Linf; did you mean 'Me"),
        ("cifar10/L2/Me2026Net", [], "are not at 'models/cifar10/L2/Me2026Net.pt': fetch them with "
         "data=cifar10 data.download=true once, or put the file there"),
        ("cifar10/Linf/Me2026Net", ["weights=w.pt"], "comes with its weights: leave weights=w.pt"),
        ("cifar10", ["hydra.run.dir=x"], "has no 'cifar10' in cifar10/Linf"),
    ):  # fmt: skip
        assert main(["eval", f"model=robustbench:{model}", *DATA, *FGSM, *more]) == 2
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error, error
    assert not Path("x").exists()
    assert main(["eval", "model=robustbench:Me2026Net", *FGSM]) == 2
    assert "cifar10 is not under 'data'" in capsys.readouterr().err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'advbench\[zoo\]'"):
        robustbench.load(Entry("cifar10", "Linf", "Me2026Net"))


def test_a_zoo_model_is_fine_tuned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its head is the last linear layer, and before training it is the zoo's function."""
    torch.manual_seed(0)
    entry = Entry("cifar10", "Linf", "Me2026Net")
    x = torch.rand(5, 3, 32, 32)
    shape = {"num_classes": 10, "input_shape": [3, 32, 32]}
    classifier = robustbench.zoo(name="Me2026Net", **shape).build()
    with torch.no_grad():
        assert torch.allclose(classifier.eval()(x), robustbench.load(entry)(x), atol=1e-6)
    assert isinstance(classifier.head, nn.Linear) and classifier.num_features == 384
    assert sum(isinstance(module, nn.ReLU) for module in classifier.modules()) == 1
    few = robustbench.zoo(name="Me2026Net", num_classes=3, input_shape=[3, 32, 32]).build()
    assert few(x).shape == (5, 3)
    train = ["train", *DATA, "backbone=robustbench", "threat=linf_8", "recipe=standard"]
    train += ["trainer.epochs=1", "trainer.batch_size=8"]
    assert main([*train, "backbone.name=Me2026Net", "hydra.run.dir=tuned"]) == 0
    assert main(["eval", "run=tuned", *FGSM, "hydra.run.dir=tuned-seen"]) == 0
    capsys.readouterr()
    elsewhere = ["backbone.name=Me2026Net", "backbone.folder=elsewhere"]
    assert main([*train, *elsewhere]) == 2
    assert "fetch them with data=cifar10 data.download=true once" in capsys.readouterr().err
    assert main([*train, "backbone.name=Me2026Pair"]) == 2
    assert (
        "so it can't be trained here; to evaluate it as it is: advbench eval"
        in capsys.readouterr().err
    )


@pytest.mark.skipif(not REAL, reason="needs robustbench")
def test_the_names_are_those_of_the_real_package() -> None:
    code = """
from advbench.backbones import robustbench
zoo, enums, utils = robustbench._package()
for data, threat in robustbench.BUDGETS:
    assert zoo.model_dicts[enums.BenchmarkDataset(data)][enums.ThreatModel(threat)]
assert callable(utils.load_model)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skip(reason="fetches 150 MB from Google Drive, and CIFAR-10")
def test_a_real_model() -> None:
    command = ["eval", "model=robustbench:Carmon2019Unlabeled", "data.download=true", "n=200"]
    assert main([*command, "hydra.run.dir=real"]) == 0
    assert abs(Results.load(Path("real/results.json")).robust.acc - 0.5953) < 0.1


# --- advbench export -----------------------------------------------------------------------------


@pytest.fixture
def results(seen: Path) -> Results:
    """A result of CIFAR-10 that is worth an entry."""
    found = Results.load(seen / "results.json")
    return replace(
        found,
        protocol={**found.protocol, "name": "autoattack"},
        data={**found.data, "name": "cifar10", "n": 1000},
        verdict={"label": None, "indicators": []},
        **evaluations.found(1000, 897, {"apgd-ce": 302}),
    )


FIELDS = [
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue"),
    *("architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable"),
]
"""Of the entries in RobustBench's repository, in their order."""


def test_an_entry_has_the_fields_of_robustbench(results: Results) -> None:
    info = model_info(results)
    assert list(info) == FIELDS
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("89.70", "59.50", "8/255")
    assert info["dataset"] == "cifar10" and info["number_forward_passes"] == 1
    assert info["link"] == info["authors"] == info["unreliable"] == ""
    assert "n = 1000" in info["footnote"] and "[56.43, 62.50]" in info["footnote"]
    judged = replace(results, verdict={"label": "unreliable", "indicators": []})
    assert model_info(judged)["unreliable"] is True
    wider = replace(results, protocol={"name": "msa", "version": "1"})
    assert model_info(wider)["external"] == "59.50" and model_info(wider)["autoattack_acc"] == ""
    l2 = replace(results, threat={"norm": "l2", "eps": 0.5})
    assert model_info(l2)["eps"] == "0.5"
    noisy = replace(results, measures={"wra": 0.746, "mean_draw": 0.6, "worst_draw": 0.5})
    assert model_info(noisy)["number_forward_passes"] == ""
    suite = {"name": "autoattack", "version": "1", "suite": "rand", "engine": "fast"}
    assert "autoattack 1, suite rand, n =" in model_info(replace(noisy, protocol=suite))["footnote"]
    short = {"name": "adaptive", "version": "1", "steps": 1, "restarts": 3}
    assert "adaptive 1, steps 1, n =" in model_info(replace(results, protocol=short))["footnote"]


def test_what_has_no_place_there(results: Results) -> None:
    for changes, told in (
        (evaluations.found(1000, 897, {"fab-t": 302}, ["fab-t"]), "unfinished"),
        ({"threat": {"norm": "l1", "eps": 12.0}}, "no leaderboard for l1"),
        ({"protocol": {"name": "pgd", "version": "1"}}, "weaker than what RobustBench reports"),
        ({"protocol": {"name": "autoattack", "version": "1", "suite": "rand"}}, "this one is not"),
        (
            {"protocol": {"name": "autoattack", "version": "1", "attacks": ["square"]}},
            "leaves out members",
        ),
    ):
        with pytest.raises(UserError, match=told):
            model_info(replace(results, **changes))


def test_the_verb(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("board")
    folder.mkdir()
    results.save(folder / "results.json")
    capsys.readouterr()
    assert main(["export", "board"]) == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)) == FIELDS
    assert "model_info/cifar10/Linf/NAME.json" in said.err and "link, name, authors" in said.err
    assert main(["export", "board", "--out", "board/entry.json"]) == 0
    assert json.loads(Path("board/entry.json").read_text()) == json.loads(said.out)
    for command, told in (
        (["export", "board", "--out", "board/entry.json"], "exists already"),
        (["export", "board", "--out", "nowhere/entry.json"], "there is no directory 'nowhere'"),
        (["export", "models"], "'models' holds no results.json"),
    ):
        assert main(command) == 2
        assert told in capsys.readouterr().err
