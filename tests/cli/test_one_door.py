"""A run is found and read once, and what identifies an evaluation is computed once."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import advbench
from advbench import config
from advbench.cli.main import main
from advbench.config import nodes
from advbench.data.base import ArraySplit
from advbench.defenses.jumprelu import JumpReLU
from advbench.errors import UserError
from advbench.evaluation import evaluation
from advbench.evaluation.evaluation import Evaluation
from advbench.runs import directory
from advbench.runs.results import Results


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each door is passed, by its name and what it was passed for."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str, label: Any) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            found[label(arguments[0])] += 1
            return real(*arguments, **more)

        monkeypatch.setattr(owner, name, call)

    counted(directory, "find", lambda folder: f"find {folder}")
    for owner in (config, nodes):
        counted(owner, "read", lambda path: f"read {path}")
    counted(Evaluation, "identity", lambda _: "identity")
    counted(evaluation, "model_sha256", lambda _: "model")
    counted(ArraySplit, "sha256", lambda _: "data")
    return found


ONCE = {"find good": 1, "read good/config.yaml": 1, "identity": 1, "model": 1, "data": 1}
SHORT = ("protocol.steps=2", "protocol.restarts=1", "n=10")


def test_a_run(place: Path, counts: Counter[str]) -> None:
    assert main(["eval", "run=good", "protocol=pgd", *SHORT]) == 0
    assert counts == ONCE


def test_the_newest_run(place: Path, counts: Counter[str]) -> None:
    Path("outputs/train").mkdir(parents=True)
    shutil.copytree("good", "outputs/train/newest")
    assert main(["eval", "protocol=pgd", *SHORT]) == 0
    assert counts["find outputs/train/newest"] == 1
    assert counts["read outputs/train/newest/config.yaml"] == 1


def test_a_retrofit(place: Path, counts: Counter[str]) -> None:
    given = ["defense=jumprelu", "defense.jump=0.1", "protocol=pgd"]
    assert main(["eval", "run=good", *given, *SHORT]) == 0
    assert counts == ONCE


def test_runs_that_transfer(place: Path, counts: Counter[str]) -> None:
    shutil.copytree("good", "twin")
    given = ["protocol=adaptive", "n=4", "budget=0.1s"]
    assert main(["eval", "run=good", "transfer=[twin]", *given]) == 0
    # Each victim is hashed; a surrogate is one.
    assert counts == {**ONCE, "model": 2, "find twin": 1, "read twin/config.yaml": 1}


def test_python_passes_the_same_doors(place: Path, counts: Counter[str]) -> None:
    results = advbench.evaluate("good", protocol="pgd", n=10)
    assert counts == ONCE
    (file,) = [*place.glob("outputs/eval/*/results.json")] or [None]
    assert file is None and results.run == "good" and results.settings["backbone"] == "convnet"


def test_python_can_do_what_the_command_line_can(place: Path) -> None:
    shutil.copytree("good", "twin")
    assert main(["eval", "run=good", "defense=jumprelu", "defense.jump=0.1", "protocol=pgd",
                 "n=20", "adversarial=true", "hydra.run.dir=cli"]) == 0  # fmt: skip
    given: dict[str, Any] = {"protocol": "pgd", "n": 20, "adversarial": True, "folder": "api"}
    typed = advbench.evaluate("good", defense=JumpReLU(jump=0.1), **given)
    shown = Results.load(Path("cli/results.json"))
    assert (typed.robust, typed.run, typed.data) == (shown.robust, shown.run, shown.data)
    assert Path("api/samples.parquet").read_bytes() == Path("cli/samples.parquet").read_bytes()
    assert Path("api/adversarial.safetensors").is_file()
    given = {"protocol": "adaptive", "n": 4, "budget": "0.1s"}
    results = advbench.evaluate("good", transfer=["twin"], **given)
    assert "apgd-ce@transfer-twin" in [stage.name for stage in results.stages]


def test_a_module_takes_a_retrofit_that_needs_no_training_images(place: Path) -> None:
    model, x = advbench.load("good"), torch.rand(12, 1, 8, 8)
    given: dict[str, Any] = {"threat": "linf_8", "protocol": "fgsm"}
    results = advbench.evaluate(model, x, model(x).argmax(1), defense=JumpReLU(jump=0.1), **given)
    assert results.run == "model+jumprelu"
    with pytest.raises(UserError, match="looks at the val images"):
        advbench.evaluate(model, x, model(x).argmax(1), defense=JumpReLU(), **given)
    with pytest.raises(UserError, match="needs its threat"):
        advbench.evaluate(model, x, model(x).argmax(1))
