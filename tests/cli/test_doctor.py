"""The doctor: closed forms that its self-tests rest on, what it finds, and that it finds faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from advbench.attacks.threat import Threat
from advbench.cli import doctor
from advbench.cli.doctor import Finding
from advbench.cli.main import main
from advbench.runs.results import Results

THREATS = [Threat("linf", 0.05), Threat("l2", 0.25)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_closed_form_is_what_the_best_step_does(threat: Threat) -> None:
    """The optimal perturbation, written down by hand, leaves as many samples as promised."""
    model, x, y, truth = doctor.problem(threat)
    weight = (model.layer.weight[1] - model.layer.weight[0]).detach()
    direction = weight.sign() if threat.norm == "linf" else weight / weight.norm()
    sign = (2 * y - 1).float()[:, None]
    worst = x.flatten(1) - threat.radius * sign * direction
    assert worst.min() >= 0 and worst.max() <= 1
    with torch.no_grad():
        assert (model(x).argmax(1) == y).all()
        left = int((model(worst.view_as(x)).argmax(1) == y).sum())
    assert left == truth == 100


def test_it_is_well_here() -> None:
    findings = list(doctor.self_tests())
    assert [finding.ok for finding in findings] == [True] * 5, findings
    assert doctor.healthy(findings)


def test_a_wrong_attack_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that does not go to the border, one that raises, and a training that climbs."""
    evaluate = doctor.api.evaluate

    def timid(*arguments: Any, threat: Threat, **more: Any) -> Results:
        return evaluate(*arguments, threat=Threat(threat.norm, 0.7 * threat.radius), **more)

    monkeypatch.setattr(doctor.api, "evaluate", timid)
    ok, value = doctor.TESTS["pgd, linf"]()
    assert ok is False and value.endswith("of 200 hold, 100 by the closed form")

    def broken() -> tuple[bool, str]:
        raise ZeroDivisionError("nothing here")

    monkeypatch.setattr(doctor, "TESTS", {"broken": broken})
    (finding,) = doctor.self_tests()
    assert finding.ok is False and finding.value.startswith("ZeroDivisionError: nothing here")
    climb = torch.optim.SGD.step

    def wrong_way(self: torch.optim.SGD) -> None:
        for group in self.param_groups:
            group["lr"] = -1.0
        climb(self)

    monkeypatch.setattr(torch.optim.SGD, "step", wrong_way)
    assert doctor._trained()[0] is False


def test_data_sets_are_found_and_how_to_get_the_others() -> None:
    Path("sets/cifar-10-batches-py").mkdir(parents=True)
    for part in ("train", "test"):
        Path(f"sets/{part}_32x32.mat").touch()
    found = {finding.name: finding.value for finding in doctor.data_sets(Path("sets"))}
    assert set(found) == {
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagenet",
    }  # fmt: skip
    assert found["cifar10"] == "at sets/cifar-10-batches-py"
    assert found["svhn"] == "at sets/train_32x32.mat, sets/test_32x32.mat"
    Path("sets/test_32x32.mat").unlink()
    again = {finding.name: finding.value for finding in doctor.data_sets(Path("sets"))}
    command = "advbench train data=svhn data.root=sets data.download=true"
    assert again["svhn"] == f"no sets/test_32x32.mat: {command}"
    usual = {finding.name: finding.value for finding in doctor.data_sets(Path("data"))}
    assert usual["mnist"] == "no data/MNIST: advbench train data=mnist data.download=true"


def test_extras_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch", 'timm>=1.0; extra == "zoo"', "robustbench; extra == 'zoo'"]
    lines.append('wandb; (python_version >= "3.10") and extra == "track"')
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    have = {"timm": "1.2"}
    monkeypatch.setattr(doctor, "_version", have.get)
    found = {finding.name: finding.value for finding in doctor.extras()}
    assert found == {
        "zoo": "timm 1.2; pip install 'advbench[zoo]' for robustbench",
        "track": "pip install 'advbench[track]' for wandb",
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Self-tests that answer at once."""
    answers = {"first": True, "second": True}
    tests = {name: (lambda name=name: (answers[name], "so it is")) for name in answers}
    monkeypatch.setattr(doctor, "TESTS", tests)
    yield answers


def test_the_verb(quick: dict[str, bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "machine", "disk", "data", "extras", "self-test", "all self-tests"):
        assert word in text, word
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    sections = {finding["section"] for finding in told["findings"]}
    assert sections == {"versions", "machine", "disk", "data", "extras", "self-test"}
    quick["second"] = False
    assert main(["doctor"]) == 1
    assert "not well: second" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert not list(Path.cwd().iterdir()), "it leaves nothing behind"


def test_what_is_neither_right_nor_wrong_is_healthy() -> None:
    assert doctor.healthy([Finding("data", "mnist", "not here")])
    assert not doctor.healthy([Finding("self-test", "pgd", "no", False)])
