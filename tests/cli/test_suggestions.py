"""What a person types first: the answer is what to type instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from advbench.cli import list_runs
from advbench.cli.main import main
from advbench.experiments.views import EvaluationView

SUGGESTIONS = {
    "train epochs=3": "did you mean 'trainer.epochs'?",
    "train epoch=3": "did you mean 'trainer.epochs'?",
    "train lr=0.1": "did you mean 'optimizer.lr'?",
    "train trainer.lr=0.1": "did you mean 'optimizer.lr'?",
    "train eps=0.1": "did you mean 'threat.eps'?",
    "train steps=7": "did you mean 'recipe.steps'?",
    "train batch_size=64": "did you mean 'trainer.batch_size'?",
    "eval batch_size=64": "did you mean 'traits.batch_size' or 'trainer.batch_size'?",
    "eval quiet=true": "did you mean '--quiet'?",
    "eval device=cpu": "did you mean 'trainer.accelerator'?",
    "eval attack=pgd": "did you mean 'protocol'?",
    "train attack=pgd": "did you mean 'recipe'?",
    "eval arch=resnet18": "did you mean 'model'?",
    "train output_dir=x": "did you mean 'hydra.run.dir'?",
    "eval n_ex=100": "did you mean 'n'?",
    "train path=x.npz": "data.path is a key of 'data=npz'",
    "train data.path=x.npz": "data.path is a key of 'data=npz'",
    "train trainer.qqq=1": "there is: accelerator, batch_size",
    "eval outputs/train/x": "a run is given with run=outputs/train/x",
    "eval x.npz": "data of your own are given with data=npz data.path=x.npz",
    "eval m.py": "a model of your own is given with model=m.py:FACTORY",
    "eval w.pt": "weights are given with weights=w.pt",
    "train recipe=TRADES": "did you mean 'trades'?",
    "eval protocol=PGD": "did you mean 'pgd'?",
    "eval protocol=AutoAtack": "did you mean 'autoattack'?",
    "eval n=all": "leave n out for all samples",
    "eval experiment=hpm_quick": "experiment=hpm_quick is for train: leave it out",
    "train protocol=pgd": "a training has no protocol: give it to advbench eval",
    "list protocol/papr": "did you mean 'paper'?",
    "list data --config-dir nowhere": "there is no directory 'nowhere'",
    "train seed=${nope}": "advbench: seed: Interpolation key 'nope' not found",
    "train seed=${oc.env:NOPE}": "advbench: seed: KeyError raised while resolving",
    "train ~data=true": "that is not an option: give GROUP=NAME",
}


@pytest.mark.parametrize("typed", list(SUGGESTIONS))
def test_a_suggestion(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("outputs/train/x")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("recipe: {}\n")
    for name in ("x.npz", "m.py", "w.pt"):
        Path(name).touch()
    assert main(typed.split()) == 2
    said = capsys.readouterr().err
    assert SUGGESTIONS[typed] in said
    assert said.startswith("advbench: ") and said.count("\n") == 1


def test_lists_of_a_folder_and_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "backbone/mine").mkdir(parents=True)
    (tmp_path / "backbone/mine/net.yaml").write_text("# advbench train\n# Four layers.\na: 1\n")
    assert main(["list", "protocol/paper"]) == 0
    said = capsys.readouterr().out
    assert "paper/hpm" in said and "autoattack" not in said
    assert main(["list", "backbones", "--config-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "mine/net" in said and "Four layers." in said and "resnet18" in said


def test_runs_of_a_sweep_are_told_apart_and_the_stage_is_the_current_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        cfg = {
            "choices": {"data": "digits", "protocol": "autoattack"},
            "run": "x", "protocol": {"_target_": "a.b", "steps": 5}, "seed": seed,
            "data": {"path": seed}, "trainer": {"batch_size": 10 * seed},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
        stamp = "2026-01-01 00:00:00 "
        lines = [
            "[1/4] apgd-ce: 9 samples",
            "  after apgd-ce: 10 %",
            "[2/4] apgd-t: 5 samples",
            "x",
        ]
        (folder / "log.txt").write_text("".join(f"{stamp}{line}\n" for line in lines))
    one, other = sorted(list_runs.find([tmp_path]), key=lambda run: run.folder)
    assert one.where == "in stage apgd-t, 2 of 4"
    assert one.what.endswith("seed=1 data.path=1 trainer.batch_size=10")
    assert other.what.endswith("seed=2 data.path=2 trainer.batch_size=20")
    shutil.rmtree(other.folder)
    (alone,) = list_runs.find([tmp_path])
    assert "seed" not in alone.what


class Shown:
    """Stands for the bar and the screen: keeps what they are told."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.at = (0, 0)

    def begin(self, title: str) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def update(self, done: int, total: int, parts: list[str]) -> None:
        self.at, self.parts = (done, total), parts


def test_progress_says_of_what_the_time_is_left() -> None:
    shown = Shown()
    view = EvaluationView(shown, shown, ["a"])  # pyright: ignore
    view.stage("a", 20)
    view.update(0, "37 % of the search", correct=18, samples=20, seconds_left=90.0)
    assert "90 s left of this stage" in shown.parts and "37 % of the search" in shown.parts
    view.stage("a", 12)  # the next group
    view.update(3)
    assert shown.at == (23, 32)
