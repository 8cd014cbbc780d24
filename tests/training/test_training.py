"""The training loop on small nets and data: what it computes and what it leaves."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from small import (
    STEPS,
    THREAT,
    Planted,
    assert_same_result,
    assert_same_weights,
    fit,
    net,
    read_weights,
    state,
    table,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.config import options
from advbench.data.base import ArraySplit
from advbench.defenses.base import Defense, Step
from advbench.errors import UserError
from advbench.experiments.checkpoints import load_weights
from advbench.progress import NullProgress
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.training import loop, schedules, settings
from advbench.training import trainer as trainer_module
from advbench.training.averaging import Average
from advbench.training.guards import Divergence
from advbench.training.learner import Learner
from advbench.training.metrics import Means
from advbench.training.optimizers import SGD, AdamW
from advbench.training.randomness import deal, derive, permutation
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer
from advbench.training.validation import accuracies

CPU = torch.device("cpu")

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

    class Weights(NullProgress):
        def epoch(self, row: Mapping[str, float]) -> None:
            seen.append(state(model))

    trainer = Trainer(epochs=5, batch_size=16)
    summary = fit(tmp_path, trainer, model=model, recipe=recipe, progress=Weights())
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
    trainer = Trainer(epochs=1, batch_size=16, ema=0.3, val_steps=1)
    model = net()
    start = state(model)
    parameters = {name for name, _ in model.named_parameters()}
    fit(tmp_path, trainer, model=model, defense=recorder)
    assert len(recorder.weights) == STEPS
    average = start
    for t, weights in enumerate(recorder.weights):
        decay = min(0.3, (1 + t) / (10 + t))
        for name in parameters:
            average[name] = decay * average[name] + (1 - decay) * weights[name]
    kept = read_weights(tmp_path / "last.safetensors")
    copied = kept.keys() - parameters
    assert "trunk.1.running_mean" in copied and (len(parameters), len(copied)) == (6, 3)
    for name in parameters:
        torch.testing.assert_close(kept[name], average[name])
        assert not torch.equal(kept[name], recorder.weights[-1][name])
    for name in copied:
        assert torch.equal(kept[name], recorder.weights[-1][name])
    best = (tmp_path / "model.safetensors").read_bytes()
    assert best == (tmp_path / "last.safetensors").read_bytes()


def test_what_modules_share_is_averaged_once():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(2, 2))
    average = Average(model, 0.5)
    start = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update(model, 50)
    kept: Any = average.module
    assert len(start) == 3 and kept[0] is kept[2]
    for now, before in zip(kept.parameters(), start, strict=True):
        torch.testing.assert_close(now, before + 0.5)


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


def test_terms_of_the_defense_are_added_and_logged(tmp_path):
    fit(tmp_path, defense=Planted())
    for epoch, row in enumerate(table(tmp_path)):
        planted = float(row["loss_planted"])
        assert planted == pytest.approx(2 + STEPS * epoch + 2.5)
        assert float(row["loss"]) == pytest.approx(float(row["loss_ce"]) + planted, rel=1e-5)


def test_two_terms_of_one_name_raise(tmp_path):
    with pytest.raises(ValueError, match="PGDAT and Planted both have a loss term 'ce'"):
        fit(tmp_path, defense=Planted(name="ce"))


def test_nothing_in_a_step_waits_for_the_device(tmp_path, monkeypatch):
    """Reading a value, or a shape that depends on one, would make a GPU's host wait."""
    waits, calls = [], Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(
                name in str(func) for name in ("_local_scalar", "nonzero", "equal", "masked_se")
            ):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    def watch(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def watched(*args):
            calls[name] += 1
            with Watch():
                return method(*args)

        monkeypatch.setattr(kind, name, watched)

    # All that the loop does from one step to the next.
    for kind, name in ((Learner, "step"), (Divergence, "watch"), (Means, "add")):
        watch(kind, name)
    trainer = Trainer(epochs=1, batch_size=16, clip_grad=1.0, val_steps=1, ema=0.9)
    fit(tmp_path, trainer, defense=Planted())
    assert calls == {"step": STEPS, "watch": STEPS, "add": STEPS} and waits == []
    with Watch():
        float(torch.ones(1))
    assert waits, "the watch sees such a read"


def test_bfloat16_is_for_training_and_its_attack_only(tmp_path, monkeypatch, bfloat16):
    seen: list[tuple[str, bool]] = []

    class Watched(PGDAT):
        def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            seen.append(("attack", torch.is_autocast_enabled("cpu")))
            point = super().perturb(model, x, y)
            assert point.dtype == torch.float32 and THREAT.contains(point, x).all()
            assert point.min() >= 0 and point.max() <= 1
            return point

        def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
            assert step.adversarial is not None and step.adversarial.x.dtype == torch.float32
            seen.append(("loss", step.adversarial.logits.dtype == torch.bfloat16))
            return super().loss_terms(model, step)

    def validated(*args, **kwargs):
        seen.append(("validation", torch.is_autocast_enabled("cpu")))
        return accuracies(*args, **kwargs)

    monkeypatch.setattr(loop, "accuracies", validated)
    trainer = Trainer(epochs=3, batch_size=16, precision="bf16-mixed", val_steps=1)
    summary = fit(tmp_path, trainer, recipe=Watched(threat=THREAT, steps=1))
    assert set(seen) == {("attack", True), ("loss", True), ("validation", False)}
    assert summary.val["clean"] > 0.4
    assert all(value.dtype != torch.bfloat16 for value in read_weights(
        tmp_path / "last.safetensors").values())  # fmt: skip


def test_bfloat16_is_refused_where_it_is_only_emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "emulates_bf16", lambda device: True)
    with pytest.raises(UserError, match=r"this cpu, which only emulates .*: take .*=32-true$"):
        fit(tmp_path, Trainer(epochs=1, precision="bf16-mixed"))
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(UserError, match=r"batch_size=1 is one image, and the model has batch norm"):
        fit(tmp_path, Trainer(batch_size=1))
    fit(tmp_path / "plain", Trainer(epochs=1, batch_size=1, val_steps=1), model=net(plain=True))
    for trainer in (Trainer(accelerator="abacus"), Trainer(devices="many")):
        with pytest.raises(UserError, match=r"is not available here: \S+"):
            fit(tmp_path, trainer)
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        fit(tmp_path, model=net().requires_grad_(False))


@dataclass
class Parts:
    """As much of a data set as is counted."""

    train: Sized
    val: Sized


def test_what_does_not_fit_several_devices_is_a_user_error():
    data: Any = Parts(range(100), range(3))
    Trainer(batch_size=6).check(net(), data, CPU, 3)
    for trainer, devices, message in (
        (Trainer(batch_size=7), 3, "over 3 devices; take 6"),
        (Trainer(batch_size=8), 4, "split holds 3 for 4 devices, which need one each"),
        (
            Trainer(batch_size=3), 3,
            r"batch_size=3 is one image for each device.*batch_size=6 or more.*sync_batchnorm=true",
        ),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            trainer.check(net(), data, CPU, devices)
    Trainer(batch_size=3, sync_batchnorm=True).check(net(), data, CPU, 3)
    Trainer(batch_size=3).check(net(plain=True), data, CPU, 3)


@dataclass(frozen=True)
class Failing(Recorder):
    """Raises in the first step."""

    error: str = "CUDA out of memory. Tried to allocate 20.00 GiB"

    def after_step(self, model: Classifier, step: Step) -> None:
        raise RuntimeError(self.error)


def test_out_of_memory_says_what_takes_less(tmp_path, monkeypatch, bfloat16):
    cpu = torch.device("cpu")
    for trainer, take in (
        (Trainer(batch_size=48), "trainer.batch_size=24 or trainer.precision=bf16-mixed$"),
        (Trainer(batch_size=7, precision="bf16-mixed"), "trainer.batch_size=3$"),
    ):
        with pytest.raises(UserError, match=f"^out of memory: take {take}"):
            fit(tmp_path / str(trainer.batch_size), trainer, defense=Failing())
    for devices, batch_size, half in ((4, 24, 12), (4, 12, 4), (3, 15, 6)):
        with (
            pytest.raises(UserError, match=f"trainer.batch_size={half} or"),
            Trainer(batch_size=batch_size)._enough_memory(cpu, devices),
        ):
            raise torch.OutOfMemoryError
    for precision, take in (("32-true", "trainer.precision"), ("bf16-mixed", "a smaller backbone")):
        with (
            pytest.raises(UserError, match=f"take {take}"),
            Trainer(batch_size=4, precision=precision)._enough_memory(cpu, 4),
        ):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(trainer_module, "emulates_bf16", lambda device: True)
    with pytest.raises(UserError, match=r"take trainer.batch_size=2$"):
        fit(tmp_path / "emulated", Trainer(batch_size=4), defense=Failing())
    with pytest.raises(RuntimeError, match="a bug of ours"):
        fit(tmp_path / "bug", defense=Failing(error="a bug of ours"))


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
