"""What stops a training that has gone wrong, and what is left then."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import STEPS, THREAT, Planted, fit, net, read_weights, table
from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.cli.main import main
from advbench.data.sources import digits
from advbench.defenses.base import Defense, Step
from advbench.errors import UserError
from advbench.progress import NullProgress
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.training import loop
from advbench.training.guards import catastrophic_overfitting, clearly_less, robust_overfitting
from advbench.training.optimizers import SGD, AdamW
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer

TRAINER = Trainer(epochs=3, batch_size=16, val_steps=1)
WEIGHTS = ("model.safetensors", "last.safetensors")


@dataclass(frozen=True)
class Breaks(Defense):
    """A value for the loss, or for a weight or a statistic, at one step at the full rate alone."""

    step: int = 8
    loss: float = 0.0
    weight: float = 0.0
    variance: float = 0.0
    stop_at: int = -1
    rates: list[float] = field(default_factory=list)

    def loss_terms(self, model: Classifier, step: Step) -> dict[str, Tensor]:
        value = self.loss if self.due(step) else 0.0
        return {"planted": next(iter(step.parts.values())).logits.sum() * 0 + value}

    def after_step(self, model: Classifier, step: Step) -> None:
        if self.due(step) and self.weight:
            model.head.weight[0, 0] = self.weight  # pyright: ignore[reportIndexIssue, reportArgumentType]
        if self.due(step) and self.variance:
            model.get_buffer("trunk.1.running_var")[0] = self.variance
        if step.step == self.stop_at:
            raise KeyboardInterrupt

    def due(self, step: Step) -> bool:
        # The weights before the step are those of the full rate the first time alone.
        return step.step == self.step and not self.rates


class Notes(NullProgress):
    """Keeps the lines, and tells the defense that the rate was lowered."""

    def __init__(self, rates: list[float]) -> None:
        self.rates, self.lines = rates, list[str]()

    def note(self, text: str) -> None:
        self.lines.append(text)
        if "back to the start" in text:
            self.rates.append(0.1)


def finite(path: Path) -> bool:
    return all(value.isfinite().all() for value in read_weights(path).values())


CASES = [
    (Breaks(loss=math.inf), "the loss is not a finite number at epoch 2, step 3 of 6"),
    (Breaks(loss=math.nan), "the loss is not a finite number at epoch 2, step 3 of 6"),
    (
        Breaks(loss=2000.0),
        "the loss is 2e+03, over 1000 times that of a guess, at epoch 2, step 3 of 6",
    ),
    (Breaks(step=11, weight=math.nan), "the weights are not finite numbers after epoch 2"),
    (Breaks(step=11, variance=math.inf), "the weights are not finite numbers after epoch 2"),
]


@pytest.mark.parametrize(("defense", "why"), CASES)
def test_a_training_that_diverges_goes_back_and_on_at_a_lower_rate(tmp_path, defense, why):
    assert len(CASES) == 5
    defense.rates.clear()
    notes = Notes(defense.rates)
    summary = fit(tmp_path, TRAINER, defense=defense, progress=notes)
    assert notes.lines == [f"{why}: back to the start of epoch 2, at 0.1 of the rate"]
    assert summary.guards == {"diverged": {"epoch": 2, "why": why, "rate": 0.1}}
    assert (summary.epochs, summary.steps) == (3, 3 * STEPS)
    rates = [float(row["lr"]) for row in table(tmp_path)]
    schedule = [SGD().lr_at(STEPS * epoch - 1, 3, STEPS) for epoch in (1, 2, 3)]
    assert rates == pytest.approx([schedule[0], 0.1 * schedule[1], 0.1 * schedule[2]], rel=1e-4)
    assert all(finite(tmp_path / name) for name in WEIGHTS)


def test_going_back_repeats_the_epoch_as_if_it_had_begun_at_the_lower_rate(tmp_path):
    """Up to the divergence nothing is left of the first attempt: not even momentum."""

    @dataclass(frozen=True)
    class Slow(SGD):
        def lr_at(self, step: int, epochs: int, steps_per_epoch: int) -> float:
            return super().lr_at(step, epochs, steps_per_epoch) * (0.1 if step >= STEPS else 1)

    defense = Breaks(loss=math.inf)
    fit(tmp_path / "a", TRAINER, defense=defense, progress=Notes(defense.rates))
    fit(tmp_path / "b", TRAINER, defense=Breaks(step=-1), optimizer=Slow())
    for name in WEIGHTS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert table(tmp_path / "a") == table(tmp_path / "b")


def test_a_training_that_diverges_twice_ends_with_its_last_good_weights(tmp_path):
    for bad_from, epoch, kept in ((8, 2, "epoch 1 are"), (2, 1, "the start are")):
        folder, fresh = tmp_path / str(bad_from), net()
        start = {name: value.clone() for name, value in fresh.state_dict().items()}
        for _ in range(2):  # the same command again says the same
            with pytest.raises(UserError) as caught:
                fit(folder, TRAINER, model=net(), defense=Planted(bad_from=bad_from))
            place = f"the loss is not a finite number at epoch {epoch}, step 3 of 6"
            assert str(caught.value) == (
                f"the training diverged twice: {place}, and then, at 0.1 of the rate, {place}; "
                f"the weights of {kept} kept in {folder / 'last.safetensors'}; "
                "try a lower optimizer.lr"
            )
        assert not (folder / "summary.json").exists()
        weights = read_weights(folder / "last.safetensors")
        same = all(torch.equal(weights[name], value) for name, value in start.items())
        assert same == (epoch == 1)
        assert (folder / WEIGHTS[0]).read_bytes() == (folder / WEIGHTS[1]).read_bytes()
        assert finite(folder / "last.safetensors")


@dataclass(frozen=True)
class Leap(SGD):
    """A single step, of the second epoch, that is far too long, and at a tenth just bearable."""

    def lr_at(self, step: int, epochs: int, steps_per_epoch: int) -> float:
        return 300.0 if step == 8 else 0.05


@pytest.mark.parametrize("stops", [(1, 7, 9, 13), (8, 8, 10, 17)])
def test_an_interrupted_training_that_diverges_ends_the_same(tmp_path, stops):
    """Whatever was saved when: the epoch begins again, and is slower from its start."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = Trainer(epochs=4, batch_size=16, val_steps=1, save_every=0, ema=0.9, clip_grad=1.0)

    def run(folder: Path, stop_at: int = -1) -> None:
        defense = Breaks(step=-1, stop_at=stop_at)
        fit(folder, trainer, model=net(plain=True), optimizer=Leap(), defense=defense)

    run(whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["guards"]["diverged"]["epoch"] == 2
    for stop_at in stops:
        with pytest.raises(KeyboardInterrupt):
            run(parts, stop_at)
    run(parts)
    for name in WEIGHTS:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert table(whole) == table(parts)


def test_a_far_too_high_rate_is_one_line_and_exit_code_two(tmp_path, capfd):
    folder = tmp_path / "run"
    command = ["train", "optimizer.lr=1000", "recipe.steps=1", f"hydra.run.dir={folder}"]
    assert main(command) == 2
    out, error = capfd.readouterr()
    assert error.startswith("advbench: the training diverged twice: the loss is ")
    assert error.endswith("try a lower optimizer.lr\n") and error.count("\n") == 1
    assert "back to the start of epoch 1, at 0.1 of the rate" in out
    assert "back to the start" in (folder / "log.txt").read_text()
    for name in WEIGHTS:
        assert all(value.isfinite().all() for value in load_file(folder / name).values())


# Overfitting


def rows(*values: tuple[float, float, float]) -> list[dict[str, float]]:
    names = ("train_adversarial", "val_clean", "val_robust")
    return [{"epoch": i + 1, **dict(zip(names, row, strict=True))} for i, row in enumerate(values)]


COURSES = [
    # From the literature, in rounded numbers: own attack on training images, clean, PGD.
    ("fgsm collapses", True, [(0.45, 0.7, 0.42), (0.9, 0.85, 0.0), (0.95, 0.85, 0.01)]),
    ("clean accuracy as well", True, [(0.45, 0.8, 0.42), (0.9, 0.7, 0.02), (0.9, 0.7, 0.0)]),
    ("pgd_at, overfitting", False, [(0.55, 0.82, 0.53), (0.9, 0.84, 0.46), (0.95, 0.85, 0.44)]),
    ("a bad epoch", False, [(0.55, 0.8, 0.5), (0.6, 0.8, 0.1), (0.6, 0.8, 0.4)]),
    ("clean falls alike", False, [(0.55, 0.8, 0.5), (0.56, 0.1, 0.05), (0.6, 0.1, 0.06)]),
    ("its own attack works", False, [(0.55, 0.8, 0.5), (0.45, 0.8, 0.0), (0.45, 0.8, 0.0)]),
    ("it trains", False, [(0.3, 0.5, 0.3), (0.5, 0.8, 0.5), (0.6, 0.8, 0.5)]),
    ("too few to say", False, [(0.3, 0.5, 0.02), (0.5, 0.8, 0.0), (0.5, 0.8, 0.0)]),
    ("never robust", False, [(0.9, 0.8, 0.0), (0.9, 0.8, 0.0), (0.9, 0.8, 0.0)]),
]


@pytest.mark.parametrize(("name", "collapsed", "course"), COURSES)
def test_catastrophic_overfitting_is_told_from_bad_luck(name, collapsed, course):
    assert len(COURSES) == 9
    found = catastrophic_overfitting(rows(*course), n=200)
    assert (found is not None) == collapsed, name
    assert catastrophic_overfitting(rows(*course[:2]), n=200) is None, "a single epoch"
    if found is not None:
        assert (found["epoch"], found["best_epoch"]) == (2, 1)
        assert found["best_val_robust"] == 0.42


@dataclass(frozen=True)
class Weakening(PGDAT):
    """PGD-AT whose attack finds nothing any more after so many batches."""

    batches: int = 0
    seen: list[int] = field(default_factory=list)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x.clone() if len(self.seen) > self.batches else super().perturb(model, x, y)


def collapsing(folder: Path, batches: int, epochs: int) -> tuple[Summary, list[str]]:
    """PGD-AT of an MLP on digits, 35 batches an epoch, whose attack works for so many."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    )
    model = Classifier(trunk, num_features=128, num_classes=10, input_shape=(1, 8, 8))
    threat = Threat("linf", 0.2)
    notes = Notes([])
    summary = fit(
        folder,
        Trainer(epochs=epochs, batch_size=32, val_steps=5),
        model=model,
        data=digits(val=0.2).build(),
        recipe=Weakening(threat=threat, steps=3, batches=batches),
        optimizer=AdamW(lr=2e-3, weight_decay=0.0, schedule="constant"),
        threat=threat,
        progress=notes,
    )
    return summary, notes.lines


def test_training_collapses_with_its_attack_and_is_stopped(tmp_path):
    """Whether a real single-step training collapses depends on rounding; this one always does."""
    summary, lines = collapsing(tmp_path, batches=3 * 35, epochs=40)
    found = summary.guards["catastrophic_overfitting"]
    course = table(tmp_path)
    assert 5 <= summary.epochs == len(course) == found["epoch"] + 1 < 40
    now, best = course[-1], course[found["best_epoch"] - 1]
    assert float(now["val_robust"]) < 0.5 * float(best["val_robust"])
    assert float(now["train_adversarial"]) > 2 * float(best["val_robust"])
    assert (
        summary.best_epoch <= 4
        and course[summary.best_epoch - 1]["val_robust"] == best["val_robust"]
    )
    assert lines[0].startswith(f"catastrophic overfitting at epoch {found['epoch']}: ")
    assert json.loads((tmp_path / "summary.json").read_text())["guards"] == summary.guards


def test_training_whose_attack_works_does_not_collapse(tmp_path):
    summary, lines = collapsing(tmp_path, batches=6 * 35, epochs=6)
    assert summary.epochs == 6 and lines == []
    assert summary.guards == {}


def test_without_own_adversarial_images_nothing_is_catastrophic():
    course = rows((0.45, 0.7, 0.42), (0.9, 0.85, 0.0), (0.9, 0.85, 0.0))
    assert catastrophic_overfitting(course, n=200)
    for row in course:
        del row["train_adversarial"]
    assert catastrophic_overfitting(course, n=200) is None


def test_clearly_less_counts_standard_errors():
    # sqrt(2 * 0.25 / 200) = 0.05
    assert clearly_less(0.449, 0.551, 200, errors=2)
    assert not clearly_less(0.451, 0.549, 200, errors=2)
    assert robust_overfitting(0.551, 0.449, 200)
    assert not robust_overfitting(0.449, 0.551, 200)


@pytest.mark.parametrize(
    ("recipe", "overfits"),
    [(PGDAT(threat=THREAT, steps=1), True), (Standard(threat=THREAT), False)],
)
def test_the_last_epoch_is_held_against_the_best(tmp_path, monkeypatch, recipe, overfits):
    planted = iter([(0.8, 0.9), (0.9, 0.5)])
    monkeypatch.setattr(loop, "accuracies", lambda *_, **__: next(planted))
    notes = Notes([])
    trainer = Trainer(epochs=2, batch_size=16, val_steps=7)
    summary = fit(tmp_path, trainer, recipe=recipe, progress=notes)
    assert summary.last == {"n": 24, "clean": 0.9, "robust": 0.5, "attack": "PGD-7, linf 0.1"}
    assert summary.val["robust"] == (0.9 if overfits else 0.5)
    if overfits:
        assert summary.guards == {"robust_overfitting": {"best": 0.9, "last": 0.5}}
        assert notes.lines == [
            "robust overfitting: 90.0 % under PGD at epoch 1 and 50.0 % at the last; "
            "model.safetensors is the former"
        ]
    else:
        assert summary.guards == {} and notes.lines == []
