"""The training loop on small nets and data: what it computes, and that nothing interrupts it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.config import options
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Source, Split, Splits
from advbench.defenses.base import Defense, Step
from advbench.errors import UserError
from advbench.models import load_weights
from advbench.recipes.base import Recipe
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.training import loop, schedules
from advbench.training.checkpoint import (
    load_resume,
    remove_leftovers,
    save_resume,
    save_weights,
)
from advbench.training.metrics import write_table
from advbench.training.optimizers import SGD, AdamW, Optimizer
from advbench.training.randomness import deal, derive, permutation
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer
from advbench.training.validation import accuracies

THREAT = Threat("linf", 0.1)
STEPS = 6  # per epoch, at batch size 16


class Stripes(Source):
    """Three classes of noisy 4x4 images; the test part must not be opened."""

    name = "stripes"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 4, 4

    @property
    def classes(self) -> tuple[str, ...]:
        return "top", "left", "even"

    def open(self, part: str) -> Split:
        assert part == "train", "training opened the test split"
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(126) % 3
        patterns = torch.zeros(3, 4, 4)
        patterns[0, :2], patterns[1, :, :2], patterns[2] = 1, 1, 0.5
        x = 0.6 * patterns[y] + 0.4 * torch.rand(126, 4, 4, generator=generator)
        return ArraySplit(x[:, None], y)


def splits(augment: Augment | None = None) -> Splits:
    """102 images to train on, 24 to validate."""
    augment = Augment(crop=1, flip=True) if augment is None else augment
    return Splits(Stripes(), val=24, split_seed=0, mean=[0.5], std=[0.3], augment=augment)


def net(*, plain: bool = False) -> Classifier:
    """A small net with batch norm and dropout, or without both."""
    torch.manual_seed(1)
    inside = [] if plain else [nn.BatchNorm2d(4), nn.Dropout(0.2)]
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), *inside, nn.ReLU(), nn.Flatten())
    return Classifier(
        trunk, num_features=16, num_classes=3, input_shape=(1, 4, 4), mean=[0.5], std=[0.3]
    )


def fit(
    folder: Path,
    trainer: Trainer | None = None,
    *,
    model: Classifier | None = None,
    recipe: Recipe | None = None,
    defense: Defense | None = None,
    optimizer: Optimizer | None = None,
    threat: Threat | None = THREAT,
    seed: int = 0,
    identity: Mapping[str, object] | None = None,
    **report,
) -> Summary:
    folder.mkdir(exist_ok=True)
    return (trainer or Trainer(epochs=3, batch_size=16, val_steps=2)).fit(
        net() if model is None else model,
        splits(),
        PGDAT(threat=THREAT, steps=2) if recipe is None else recipe,
        Defense() if defense is None else defense,
        SGD() if optimizer is None else optimizer,
        threat=threat,
        seed=seed,
        folder=folder,
        identity=identity or {"run": "a"},
        **report,
    )


def table(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the column that differs between equal runs."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    return rows


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    model = net()
    load_weights(model, path)
    return model.state_dict()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    values = other.state_dict()
    assert values.keys() == one.state_dict().keys()
    assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


def assert_same_result(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert table(one) == table(other)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        assert summary.pop("seconds") > 0
    assert summaries[0] == summaries[1]


# Schedules and optimizers


def test_schedules_in_closed_form():
    args = (100, [50, 75], 0.1)
    assert [schedules.constant(s, *args) for s in (0, 99)] == [1, 1]
    for step, factor in ((0, 1.0), (50, 0.5), (25, 0.5 + math.sqrt(0.5) / 2), (100, 0.0)):
        assert schedules.cosine(step, *args) == pytest.approx(factor)
    for step, factor in ((0, 1), (49, 1), (50, 0.1), (74, 0.1), (75, 0.01), (99, 0.01)):
        assert schedules.multistep(step, *args) == pytest.approx(factor)
    for step, factor in ((0, 0), (25, 0.5), (50, 1), (75, 0.5), (100, 0)):
        assert schedules.cyclic(step, *args) == pytest.approx(factor)
    assert [schedules.warmup(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedules.warmup(0, 0) == 1
    assert len(schedules.SCHEDULES) == 4


def test_learning_rate_counts_milestones_and_warmup_in_epochs():
    optimizer = SGD(lr=0.2, schedule="multistep", milestones=[2], gamma=0.5, warmup=0.5)
    rates = [optimizer.lr_at(step, epochs=4, steps_per_epoch=4) for step in range(16)]
    assert rates == pytest.approx([0.1, *[0.2] * 7, *[0.1] * 8])
    cosine = AdamW(lr=1.0, warmup=1.0)
    assert cosine.lr_at(1, 2, 4) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 8)))


def test_optimizers_take_their_values():
    weight = nn.Parameter(torch.zeros(2))
    sgd = SGD(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1).build([weight])
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1
    }  # fmt: skip
    adamw = AdamW(lr=0.3, beta1=0.5, beta2=0.6, weight_decay=0.1).build([weight])
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.5, 0.6) and adamw.defaults["weight_decay"] == 0.1


# The order of samples, and randomness


def test_dealing_gives_every_rank_its_share_of_every_batch():
    order = permutation(23, seed=5, epoch=1)
    assert sorted(order.tolist()) == list(range(23))
    shares = [deal(order, 6, rank, 3).view(3, 2) for rank in range(3)]
    assert torch.equal(torch.cat(shares, 1).flatten(), order[:18])
    assert torch.equal(deal(order, 6, 0, 1), order[:18])


def test_order_and_seeds_are_functions_of_their_position():
    assert torch.equal(permutation(50, 0, 3), permutation(50, 0, 3))
    orders = [permutation(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    seeds = {derive(seed, name, i) for seed in (0, 1) for name in "ab" for i in range(5)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)


# What a training leaves


def test_a_training_learns_and_leaves_its_files(tmp_path):
    model = net()
    summary = fit(tmp_path, Trainer(epochs=8, batch_size=16, val_steps=2), model=model)
    rows = table(tmp_path)
    assert list(rows[0]) == [
        "epoch", "step", "lr", "loss", "loss_ce", "train_adversarial", "val_clean", "val_robust"
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 9)]
    assert [row["step"] for row in rows] == [str(STEPS * epoch) for epoch in range(1, 9)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(
        [0.1 * schedules.cosine(STEPS * e - 1, STEPS * 8, [], 0.1) for e in range(1, 9)], rel=1e-5
    )
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert float(rows[-1]["train_adversarial"]) > float(rows[0]["train_adversarial"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors", "last.safetensors", "metrics.csv", "summary.json"
    }  # fmt: skip
    last = net()
    load_weights(last, tmp_path / "last.safetensors")
    assert_same_weights(last, model)

    with (tmp_path / "metrics.csv").open() as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    assert 0.5 * summary.seconds < seconds < 1.01 * summary.seconds
    best = rows[summary.best_epoch - 1]
    assert Summary.load(tmp_path / "summary.json") == summary
    assert summary.selected_by == "robust validation accuracy"
    assert summary.val["n"] == 24 and summary.val["attack"] == "PGD-2, linf 0.1"
    assert summary.val["robust"] == pytest.approx(float(best["val_robust"]), abs=1e-5)
    assert summary.val["clean"] > 0.6
    assert (summary.epochs, summary.steps, summary.devices) == (8, 48, 1)
    assert summary.parameters == sum(p.numel() for p in model.parameters())


def test_equal_runs_are_equal_and_seeds_differ(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, seed=seed)
    assert_same_result(tmp_path / "a", tmp_path / "b")
    first, other = (tmp_path / name / "last.safetensors" for name in "ac")
    assert first.read_bytes() != other.read_bytes()


def test_without_a_threat_only_clean_accuracy_is_measured(tmp_path):
    summary = fit(tmp_path / "none", recipe=Standard(), threat=None)
    assert list(table(tmp_path / "none")[0])[-2:] == ["train_clean", "val_clean"]
    assert summary.selected_by == "clean validation accuracy"
    assert summary.val["robust"] is None and summary.val["attack"] is None
    l1 = fit(tmp_path / "l1", recipe=Standard(), threat=Threat("l1", 1.0))
    assert l1.val == summary.val


ACCURACIES = [(0.9, 0.1), (0.8, 0.5), (0.7, 0.5), (0.8, 0.5), (0.9, 0.2)]


@pytest.mark.parametrize(
    ("recipe", "best"), [(PGDAT(threat=THREAT, steps=1), 4), (Standard(threat=THREAT), 5)]
)
def test_the_best_epoch_is_kept(tmp_path, monkeypatch, recipe, best):
    model, seen, planted = net(), [], iter(ACCURACIES)
    monkeypatch.setattr(loop, "accuracies", lambda *_, **__: next(planted))

    class Weights:
        def note(self, text: str) -> None: ...
        def progress(self, done: int, total: int, text: str) -> None: ...
        def epoch(self, row: Mapping[str, float]) -> None:
            seen.append(state(model))

    trainer = Trainer(epochs=5, batch_size=16)
    summary = fit(tmp_path, trainer, model=model, recipe=recipe, report=Weights())
    assert summary.best_epoch == best and len(seen) == 5
    clean, robust = ACCURACIES[best - 1]
    assert (summary.val["clean"], summary.val["robust"]) == (clean, robust)
    kept = read_weights(tmp_path / "model.safetensors")
    same = [all(torch.equal(kept[name], epoch[name]) for name in kept) for epoch in seen]
    assert [index + 1 for index, equal in enumerate(same) if equal] == [best]


@dataclass(frozen=True)
class Recorder(Defense):
    """Keeps the weights after each step."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def after_step(self, model: Classifier, step: Step) -> None:
        assert not torch.is_grad_enabled()
        self.weights.append(state(model))


def test_average_of_the_weights_by_hand(tmp_path):
    recorder = Recorder()
    trainer = Trainer(epochs=1, batch_size=16, ema=0.8, val_steps=1)
    fit(tmp_path, trainer, defense=recorder)
    assert len(recorder.weights) == STEPS
    average = dict(recorder.weights[0])
    for weights in recorder.weights[1:]:
        for name, value in weights.items():
            if value.is_floating_point():
                average[name] = 0.8 * average[name] + 0.2 * value
    kept = read_weights(tmp_path / "last.safetensors")
    floats = [name for name, value in kept.items() if value.is_floating_point()]
    assert "trunk.1.running_mean" in floats and len(floats) == 8
    for name in floats:
        torch.testing.assert_close(kept[name], average[name])
        assert not torch.equal(kept[name], recorder.weights[-1][name])
    best = (tmp_path / "model.safetensors").read_bytes()
    assert best == (tmp_path / "last.safetensors").read_bytes()


def test_every_step_has_its_learning_rate_and_a_clipped_gradient(tmp_path):
    recorder = Recorder()
    model = net(plain=True)
    weights = [state(model)]
    trainer = Trainer(epochs=1, batch_size=16, clip_grad=1e-3, val_steps=1)
    optimizer = SGD(lr=1.0, momentum=0, weight_decay=0, schedule="cyclic")
    fit(tmp_path, trainer, model=model, defense=recorder, optimizer=optimizer)
    weights += recorder.weights
    lengths = [
        torch.cat([(new[name] - old[name]).flatten() for name in old]).norm().item()
        for old, new in itertools.pairwise(weights)
    ]
    rates = [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]
    assert lengths == pytest.approx([1e-3 * rate for rate in rates], rel=1e-2)


def test_every_epoch_has_its_order(tmp_path, monkeypatch):
    orders: list[Tensor] = []
    batches = ArraySplit.batches

    def recorded(self, order: Tensor, batch_size: int, device, seed: int | None = None):
        orders.append(order)
        return batches(self, order, batch_size, device, seed)

    monkeypatch.setattr(ArraySplit, "batches", recorded)
    fit(tmp_path, Trainer(epochs=2, batch_size=16, val_steps=1), seed=3)
    assert len(orders) == 4
    for epoch, order in enumerate(orders[::2]):
        assert torch.equal(order, permutation(102, 3, epoch)[:96])
    assert all(torch.equal(order, torch.arange(24)) for order in orders[1::2])


@dataclass(frozen=True)
class Planted(Defense):
    """A loss term of its own, not a number from one step on; raises after another."""

    name: str = "planted"
    bad_from: int = 10**9
    stop_at: int = -1
    prepared: list[bool] = field(default_factory=list)

    def prepare(self, model: Classifier, data: Splits) -> None:
        self.prepared.append(model.training)

    def loss_terms(self, model: Classifier, step: Step) -> dict[str, Tensor]:
        value = math.inf if step.step >= self.bad_from else 2.0 + step.step
        return {self.name: next(iter(step.parts.values())).logits.sum() * 0 + value}

    def after_step(self, model: Classifier, step: Step) -> None:
        assert not any(part.features.requires_grad for part in step.parts.values())
        if step.step == self.stop_at:
            raise KeyboardInterrupt


def test_terms_of_the_defense_are_added_and_logged(tmp_path):
    fit(tmp_path, defense=Planted())
    for epoch, row in enumerate(table(tmp_path)):
        planted = float(row["loss_planted"])
        assert planted == pytest.approx(2 + STEPS * epoch + 2.5)
        assert float(row["loss"]) == pytest.approx(float(row["loss_ce"]) + planted, rel=1e-5)


def test_two_terms_of_one_name_raise(tmp_path):
    with pytest.raises(ValueError, match="PGDAT and Planted both have a loss term 'ce'"):
        fit(tmp_path, defense=Planted(name="ce"))


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    for bad_from, place, save_every, kept in (
        (8, "epoch 2, step 3 of 6", 60, (1, 0)),
        (2, "epoch 1, step 3 of 6", 0, (0, 2)),
    ):
        folder = tmp_path / str(bad_from)
        trainer = Trainer(epochs=3, batch_size=16, val_steps=1, save_every=save_every)
        with pytest.raises(UserError, match=rf"{place}.*lower optimizer\.lr") as caught:
            fit(folder, trainer, defense=Planted(bad_from=bad_from))
        assert "\n" not in str(caught.value)
        assert not (folder / "summary.json").exists()
        saved = load_resume(folder / "resume.pt", {"run": "a"})
        assert saved is not None, "what was saved before is kept"
        assert (saved["position"]["epoch"], saved["position"]["batch"]) == kept


def test_nothing_in_a_step_waits_for_the_device(tmp_path, monkeypatch):
    """Reading a value, or a shape that depends on one, would make a GPU's host wait."""
    waits, steps = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(
                name in str(func) for name in ("_local_scalar", "nonzero", "equal", "masked_se")
            ):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    step = loop.Fit._train_step

    def watched(self, x: Tensor, y: Tensor) -> None:
        steps.append(self.step)
        with Watch():
            step(self, x, y)

    monkeypatch.setattr(loop.Fit, "_train_step", watched)
    trainer = Trainer(epochs=1, batch_size=16, clip_grad=1.0, val_steps=1)
    fit(tmp_path, trainer, defense=Planted())
    assert len(steps) == STEPS and waits == []
    with Watch():
        float(torch.ones(1))
    assert waits, "the watch sees such a read"


def test_bfloat16_is_for_training_and_its_attack_only(tmp_path, monkeypatch):
    seen: list[tuple[str, bool]] = []

    class Watched(PGDAT):
        def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            seen.append(("attack", torch.is_autocast_enabled("cpu")))
            return super().perturb(model, x, y)

        def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
            assert step.adversarial is not None and step.adversarial.x.dtype == torch.float32
            seen.append(("loss", step.adversarial.logits.dtype == torch.bfloat16))
            return super().loss_terms(model, step)

    def validation(*args, **kwargs):
        seen.append(("validation", torch.is_autocast_enabled("cpu")))
        return accuracies(*args, **kwargs)

    monkeypatch.setattr(loop, "accuracies", validation)
    trainer = Trainer(epochs=3, batch_size=16, precision="bf16-mixed", val_steps=1)
    summary = fit(tmp_path, trainer, recipe=Watched(threat=THREAT, steps=1))
    assert set(seen) == {("attack", True), ("loss", True), ("validation", False)}
    assert summary.val["clean"] > 0.4
    assert all(value.dtype != torch.bfloat16 for value in read_weights(
        tmp_path / "last.safetensors").values())  # fmt: skip


# Validation


def test_validation_of_a_linear_model_in_closed_form():
    generator = torch.Generator().manual_seed(2)
    x = 0.2 + 0.6 * torch.rand(50, 1, 2, 3, generator=generator)
    weight = torch.randn(6, generator=generator)
    head = nn.Linear(6, 2)
    head.weight.data = torch.stack([weight, -weight]) / 2
    head.bias.data = torch.tensor([-0.5, 0.5]) * (weight.sum() / 2)
    model = Classifier(
        nn.Flatten(), num_features=6, num_classes=2, input_shape=(1, 2, 3), head=head
    )
    margin = (x.flatten(1) - 0.5) @ weight  # of class 0 over class 1
    y = (margin < 0).long()
    y[:5] = 1 - y[:5]
    split = ArraySplit(x, y)
    fabric = Fabric(accelerator="cpu", devices=1)

    def measure(threat: Threat | None, batch_size: int = 16) -> tuple[float, float | None]:
        return accuracies(
            model, split, threat, steps=5, seed=0, batch_size=batch_size, fabric=fabric
        )

    survives = (margin.abs() > 0.1 * weight.abs().sum())[5:].sum().item()
    assert 5 < survives < 40
    torch.manual_seed(0)
    assert measure(THREAT) == pytest.approx((45 / 50, survives / 50))
    torch.manual_seed(1)
    assert measure(THREAT, batch_size=7) == measure(THREAT)
    assert measure(None) == (pytest.approx(0.9), None)
    assert not any(p.grad is not None for p in model.parameters())


def test_validation_attacks_the_same_points_whatever_the_batch_and_the_generator():
    class Spy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return super().forward(x)

    x, y = torch.rand(20, 1, 2, 3), torch.arange(20) % 2
    model = Spy(nn.Flatten(), nn.Linear(6, 2))
    fabric = Fabric(accelerator="cpu", devices=1)
    attacked = []
    for seed, batch_size in ((0, 20), (1, 7)):
        calls: list[Tensor] = []
        torch.manual_seed(seed)
        accuracies(
            model, ArraySplit(x, y), THREAT, steps=1, seed=0, batch_size=batch_size, fabric=fabric
        )
        clean, _, final = (torch.cat(calls[first::3]) for first in range(3))
        assert torch.equal(clean, x) and not torch.equal(final, x)
        attacked.append(final)
    torch.testing.assert_close(*attacked)


def test_what_is_wrong_from_the_start_is_not_robust():
    class OffGrid(nn.Module):
        """Class 1 exactly on the grey image."""

        def forward(self, x: Tensor) -> Tensor:
            grey = (x.flatten(1) == 0.5).all(1)
            return torch.stack([~grey, grey], 1) + 0 * x.sum()

    split = ArraySplit(torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64))
    fabric = Fabric(accelerator="cpu", devices=1)
    result = accuracies(OffGrid(), split, THREAT, steps=1, seed=0, batch_size=4, fabric=fabric)
    assert result == (0, 0)


# Interruption


@pytest.mark.parametrize(
    ("trainer", "optimizer"),
    [
        (Trainer(epochs=3, batch_size=16, val_steps=1, save_every=0), SGD(warmup=0.5)),
        (
            Trainer(epochs=3, batch_size=16, val_steps=1, save_every=0, ema=0.9, clip_grad=0.5),
            AdamW(lr=0.01),
        ),
    ],
)
def test_an_interrupted_training_goes_on(tmp_path, monkeypatch, trainer, optimizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepared: list[bool] = []
    fit(whole, trainer, optimizer=optimizer, defense=Planted())
    for stop_at in (3, 6, 11, 15):
        with pytest.raises(KeyboardInterrupt):
            defense = Planted(stop_at=stop_at, prepared=prepared)
            fit(parts, trainer, optimizer=optimizer, defense=defense)
        saved = load_resume(parts / "resume.pt", {"run": "a"})
        assert saved is not None
        position = saved["position"]
        assert position["epoch"] * STEPS + position["batch"] == stop_at
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "accuracies", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        fit(parts, trainer, optimizer=optimizer, defense=Planted(prepared=prepared))
    notes: list[str] = []

    class Notes:
        def note(self, text: str) -> None:
            notes.append(text)

        def progress(self, done: int, total: int, text: str) -> None: ...
        def epoch(self, row: Mapping[str, float]) -> None: ...

    defense = Planted(prepared=prepared)
    fit(parts, trainer, optimizer=optimizer, defense=defense, report=Notes())
    assert_same_result(whole, parts)
    assert prepared == [False], "prepared once, in eval mode"
    assert notes == ["going on at epoch 3 of 3, step 6 of 6"]
    assert not (parts / "resume.pt").exists()


def test_a_finished_training_is_not_repeated(tmp_path):
    summary = fit(tmp_path)
    (tmp_path / "resume.pt").write_bytes(b"killed before it was removed")
    assert fit(tmp_path, defense=Planted(bad_from=0)) == summary
    assert not (tmp_path / "resume.pt").exists()
    with pytest.raises(UserError, match=r"another run: take another hydra\.run\.dir"):
        fit(tmp_path, identity={"run": "b"})


def test_another_identity_or_number_of_devices_does_not_go_on(tmp_path):
    trainer = Trainer(epochs=1, batch_size=16, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, trainer, defense=Planted(stop_at=3))
    with pytest.raises(UserError, match="another run"):
        fit(tmp_path, trainer, identity={"run": "b"})
    saved = load_resume(tmp_path / "resume.pt", {"run": "a"})
    assert saved is not None
    save_resume(tmp_path / "resume.pt", {**saved, "devices": 2}, {"run": "a"})
    with pytest.raises(UserError, match=r"trainer\.devices=2"):
        fit(tmp_path, trainer)
    (tmp_path / "resume.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="remove it to start again"):
        fit(tmp_path, trainer)


class Global:
    """What a pickle could smuggle in."""


def test_resume_runs_no_code(tmp_path):
    torch.save({"identity": "{}", "state": {"planted": Global()}}, tmp_path / "resume.pt")
    with pytest.raises(UserError, match="cannot read"):
        load_resume(tmp_path / "resume.pt", {})
    assert load_resume(tmp_path / "missing.pt", {}) is None


HELPERS = Path(__file__).parent

KILLED = """
import os, random, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import torch
from advbench.defenses.base import Defense
from advbench.training.checkpoint import load_resume
from advbench.training.trainer import Trainer
from test_training import fit

@dataclass(frozen=True)
class Slow(Defense):
    def after_step(self, model, step):
        time.sleep(0.01)

def start(folder):
    child = os.fork()  # before the first computation: no threads yet, and nothing to import again
    if child == 0:
        trainer = Trainer(epochs=10, batch_size=16, val_steps=1, save_every=0, ema=0.9)
        fit(folder, trainer, defense=Slow())
        os._exit(0)
    return child

def position(folder):
    saved = load_resume(folder / "resume.pt", {"run": "a"})
    return saved and (saved["position"]["epoch"], saved["position"]["batch"])

whole, parts = (Path(name) for name in sys.argv[1:])
os.waitpid(start(whole), 0)
assert (whole / "summary.json").exists()
moments, inside = random.Random(0), 0
for kills in range(5):
    before, child = position(parts), start(parts)
    while position(parts) == before:
        time.sleep(0.005)
    time.sleep(moments.uniform(0, 0.2))
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    inside += position(parts)[1] > 0
print("inside an epoch:", inside)
os.waitpid(start(parts), 0)
"""


def run_script(script: str, *arguments: str, folder: Path) -> str:
    """Run Python text in a process of its own, which finds this module; returns its output."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    env = {
        **os.environ,
        "PYTHONPATH": f"{HELPERS.parent}{os.pathsep}{HELPERS}",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, str(path), *arguments],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks to save the imports")
def test_a_training_that_is_killed_five_times_ends_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    output = run_script(KILLED, str(whole), str(parts), folder=tmp_path)
    assert int(output.rpartition(":")[2]) >= 2, "some kills were inside an epoch"
    assert_same_result(whole, parts)
    assert len(list(parts.iterdir())) == 4, "no temporary file is left"


DEVICES = """
import sys
from dataclasses import dataclass
from pathlib import Path
import torch
from advbench.defenses.base import Defense
from advbench.recipes.pgd_at import PGDAT
from advbench.training.trainer import Trainer
from test_training import THREAT, fit, net
import test_training
from advbench.data.augment import Augment

@dataclass(frozen=True)
class Seen(Defense):
    def after_step(self, model, step):
        model.seen.copy_(next(iter(step.parts.values())).x.mean())

devices, folder = int(sys.argv[1]), Path(sys.argv[2])
whole = test_training.splits
test_training.splits = lambda: whole(Augment())
model = net(plain=True)
model.register_buffer("seen", torch.zeros(()))
recipe = PGDAT(threat=THREAT, steps=2, random_start=False)
trainer = Trainer(epochs=2, batch_size=16, devices=devices, accelerator="cpu", val_steps=2)
fit(folder, trainer, model=model, recipe=recipe, defense=Seen())
rank = torch.distributed.get_rank() if devices > 1 else 0
(folder / f"seen{rank}").write_text(str(float(model.seen)))
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    tables, weights = [], []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        run_script(DEVICES, str(devices), str(folder), folder=tmp_path)
        tables.append(table(folder))
        model = net(plain=True)
        model.register_buffer("seen", torch.zeros(()))
        load_weights(model, folder / "last.safetensors")
        weights.append(state(model))
        assert Summary.load(folder / "summary.json").devices == devices
    assert len(weights[0]) == 5
    for name in weights[0].keys() - {"seen"}:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)
    for one, two in zip(*tables, strict=True):
        assert {k: float(v) for k, v in one.items()} == pytest.approx(
            {k: float(v) for k, v in two.items()}, rel=1e-3
        )
    seen = [(tmp_path / "2" / f"seen{rank}").read_text() for rank in (0, 1)]
    assert seen[0] == seen[1], "all processes have the buffers of the first"


# Files


def test_what_killed_writers_leave_is_removed(tmp_path):
    for name in (".model.safetensors.12.tmp", ".tmpAb1", "metrics.csv"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_weights_of_another_model_are_refused(tmp_path):
    model = net()
    save_weights(model, tmp_path / "model.safetensors")
    other = net()
    nn.utils.vector_to_parameters(torch.zeros(200), other.parameters())
    load_weights(other, tmp_path / "model.safetensors")
    assert_same_weights(other, model)
    with pytest.raises(UserError, match="do not match the model"):
        load_weights(net(plain=True), tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("broken.safetensors", "is not a safetensors file"),
        ("missing.safetensors", "there are no weights at"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(net(), tmp_path / name)


def test_weights_that_modules_share_and_views_are_saved(tmp_path):
    def tied() -> nn.Sequential:
        first = nn.Linear(3, 3)
        first.bias = nn.Parameter(torch.rand(6)[:3])
        return nn.Sequential(first, nn.ReLU(), first)

    model, other = tied(), tied()
    save_weights(model, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    assert_same_weights(other, model)
    assert other[0] is other[2]


def test_a_table_with_missing_values(tmp_path):
    write_table(tmp_path / "t.csv", [{"a": 1, "b": 0.123456789}, {"a": 2, "c": 1e-9}])
    assert (tmp_path / "t.csv").read_text() == "a,b,c\n1,0.123457,\n2,,1e-09\n"


def test_summaries_of_another_kind_are_refused(tmp_path):
    for name, text in (("a", "{"), ("b", '{"schema": "x"}'), ("c", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}\b"):
            Summary.load(tmp_path / name)


# Mistakes and configs

MISTAKES = [
    (lambda: Trainer(epochs=0), r"trainer\.epochs=0 is not at least 1"),
    (lambda: Trainer(batch_size=0), r"trainer\.batch_size=0"),
    (lambda: Trainer(val_steps=0), r"trainer\.val_steps=0"),
    (lambda: Trainer(num_nodes=0), r"trainer\.num_nodes=0"),
    (lambda: Trainer(save_every=-1), r"trainer\.save_every=-1"),
    (lambda: Trainer(clip_grad=0), r"trainer\.clip_grad=0"),
    (lambda: Trainer(ema=1), r"trainer\.ema=1 is not between"),
    (lambda: Trainer(precision="bf16-mixd"), "did you mean 'bf16-mixed'"),
    (lambda: SGD(schedule="cosin"), r"did you mean 'cosine'.*optimizer\.schedule"),
    (lambda: SGD(schedule="multistep"), r"optimizer\.milestones"),
    (lambda: SGD(lr=0), r"optimizer\.lr=0 is not above 0"),
    (lambda: SGD(weight_decay=-1), r"optimizer\.weight_decay=-1"),
    (lambda: SGD(warmup=-1), r"optimizer\.warmup=-1"),
    (lambda: SGD(momentum=1), r"optimizer\.momentum=1"),
    (lambda: SGD(momentum=0, nesterov=True), r"optimizer\.nesterov"),
    (lambda: AdamW(beta1=1), r"optimizer\.beta1=1"),
    (lambda: AdamW(beta2=-1), r"optimizer\.beta2=-1"),
]


def test_values_out_of_range_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 17


def test_what_does_not_fit_the_data_or_the_machine_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"batch_size=103 is more than the 102 training samples"):
        fit(tmp_path, Trainer(batch_size=103))
    for trainer in (Trainer(accelerator="abacus"), Trainer(devices="many")):
        with pytest.raises(UserError, match=r"cannot be had here: \S+"):
            fit(tmp_path, trainer)
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        fit(tmp_path, model=net().requires_grad_(False))


def test_shipped_configs_write_out_every_field_and_its_default():
    found = []
    for group, names in (("optimizer", ("sgd", "adamw")), ("trainer", ("default",))):
        for name in names:
            text = options(group)[name].read_text()
            node = {str(k): v for k, v in OmegaConf.create(text).items()}
            module, _, attribute = node.pop("_target_").rpartition(".")
            component = getattr(import_module(module), attribute)
            assert node.keys() == {f.name for f in fields(component)}
            assert component(**node) == component(), "the file gives the defaults"
            first, second = text.splitlines()[:2]
            assert first.startswith("# advbench train ") and second.startswith("# ")
            found.append(name)
    assert found == ["sgd", "adamw", "default"]
