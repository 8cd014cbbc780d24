"""JumpReLU by hand, its surrogates' gradients, the automatic jump, and the authors' attack."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import THREAT as STRIPES
from small import assert_same_result, count_modules, fit
from small import net as small_net
from small import splits as small_splits
from torch import Tensor, fx, nn

from advbench.attacks.base import Clean, Oracle, craft
from advbench.attacks.ifgsm import IFGSM
from advbench.attacks.random import TorchRandom
from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.backbones.convnet import convnet
from advbench.backbones.external import torchvision
from advbench.backbones.lenet import lenet
from advbench.backbones.mobilenet import mobilenet_v2
from advbench.backbones.resnet import resnet20
from advbench.cli.main import main
from advbench.config import build, options, plain, shipped
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Source, Split, Splits
from advbench.defenses.base import Traits
from advbench.defenses.jumprelu import GRID, Jump, JumpReLU, jump_of
from advbench.errors import UserError
from advbench.experiments.checkpoints import load_weights
from advbench.experiments.models import from_run
from advbench.recipes.base import Recipe
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.runs.directory import find
from advbench.runs.fingerprint import model_sha256
from advbench.runs.results import Results
from advbench.surgery import count_calls
from advbench.training import loop
from advbench.training.checkpoint import save_weights
from advbench.training.step import TrainingStep
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer
from advbench.training.validation import accuracies

THREAT = Threat("linf", 0.1)
NETS = {"convnet": convnet, "resnet20": resnet20, "mobilenet_v2": mobilenet_v2, "lenet": lenet}
SITES = {"convnet": 4, "resnet20": 19, "mobilenet_v2": 35, "lenet": 4}


def net(name: str = "convnet", seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    shape = [1, 16, 16] if name == "lenet" else [3, 8, 8]
    return NETS[name](num_classes=3, input_shape=shape).build()


def images(model: Any, n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, *model.input_shape, generator=torch.Generator().manual_seed(seed))


# The activation

POINTS = [-3.0, -0.5, 0.0, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0, 5.0, 6.5, 9.0]
NAN = float("nan")


def answer(site: Jump, points: list[float]) -> tuple[Tensor, Tensor]:
    """Values and slopes."""
    z = torch.tensor(points, requires_grad=True)
    value = site(z)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("cap", [None, 6.0])
@pytest.mark.parametrize("jump", [0.0, 0.5, 1.5])
def test_values_and_slopes(jump, cap):
    value, slope = answer(Jump(jump, cap=cap), POINTS)
    highest = math.inf if cap is None else cap
    assert value.tolist() == pytest.approx([min(z, highest) if z > jump else 0 for z in POINTS])
    assert slope.tolist() == [float(jump < z < highest) for z in POINTS]


@pytest.mark.parametrize(("cap", "function"), [(None, F.relu), (6.0, F.relu6)])
def test_a_jump_of_zero_is_relu(cap, function):
    z = torch.tensor([*POINTS, NAN], requires_grad=True)
    value, slope = answer(Jump(0.0, cap=cap), [*POINTS, NAN])
    torch.testing.assert_close(value, function(z).detach(), rtol=0, atol=0, equal_nan=True)
    (wanted,) = torch.autograd.grad(function(z).sum(), z)
    assert torch.equal(slope[:-1], wanted[:-1])


def test_half_precision_stays_what_it_is():
    z = torch.tensor([0.25, 0.5], dtype=torch.bfloat16)
    value = Jump(0.3)(z)
    assert value.dtype == torch.bfloat16 and value.tolist() == [0.0, 0.5]
    assert z.tolist() == [0.25, 0.5], "the input is left alone"


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


SLOPES = {
    "bpda_relu": lambda z, jump: float(z > 0),
    "bpda_half": lambda z, jump: float(z > jump / 2),
    "bpda_sigmoid-quarter": lambda z, jump: sigmoid((z - jump) / (jump / 4)),
    "bpda_sigmoid-full": lambda z, jump: sigmoid((z - jump) / jump),
}
FACTORS = {"base": 0.0, "half": 0.5, "double": 2.0}


class Pixels(nn.Module):
    """One activation alone, for points laid out as images (1, 1, D)."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.flatten = nn.Flatten()
        self.input_shape = (1, 1, len(POINTS))

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.act(x))


@pytest.mark.parametrize("capped", [False, True], ids=["relu", "relu6"])
@pytest.mark.parametrize("jump", [0.5, 2.0])
def test_surrogates_by_hand(jump, capped):
    defense = JumpReLU(jump=jump)
    model = defense.apply(Pixels(nn.ReLU6() if capped else nn.ReLU())).eval()
    before = model_sha256(model)
    surrogates = defense.surrogates(model)
    assert surrogates.keys() == SLOPES.keys() | FACTORS.keys() and len(surrogates) == 7
    highest = 6.0 if capped else math.inf
    points = torch.tensor(POINTS).view(1, 1, 1, -1)
    for name, surrogate in surrogates.items():
        x = points.clone().requires_grad_()
        value = surrogate.model(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        threshold = jump * FACTORS.get(name, 1.0)
        assert surrogate.exact == (name in SLOPES) and not surrogate.needs_clean_input
        torch.testing.assert_close(
            value.flatten(), torch.tensor([min(z, highest) if z > threshold else 0 for z in POINTS])
        )
        if name in SLOPES:
            assert torch.equal(value, model(points))
            wanted = [SLOPES[name](z, jump) * (z < highest) for z in POINTS]
        else:
            wanted = [float(threshold < z < highest) for z in POINTS]
        assert slope.flatten().tolist() == pytest.approx(wanted, abs=1e-6), name
    assert model_sha256(model) == before and jump_of(model) == jump


def test_surrogates_of_a_net_leave_it_alone_and_share_its_weights():
    defense = JumpReLU(jump=0.2)
    model = defense.apply(net("resnet20")).eval()
    x, before = images(model), model_sha256(model)
    surrogates = defense.surrogates(model)
    assert model_sha256(model) == before
    hashes = {name: model_sha256(surrogate.model) for name, surrogate in surrogates.items()}
    assert len({before, *hashes.values()}) == 8, "the engine tells them apart"
    jumps = {name: jump_of(surrogate.model) for name, surrogate in surrogates.items()}
    assert jumps == pytest.approx(
        {**dict.fromkeys(SLOPES, 0.2), "base": 0.0, "half": 0.1, "double": 0.4}
    )
    seen = 0
    with torch.no_grad():
        for name, surrogate in surrogates.items():
            assert not any(module.training for module in surrogate.model.modules())
            assert torch.allclose(surrogate.model(x), model(x), atol=1e-6) == surrogate.exact, name
            seen += 1
        torch.testing.assert_close(surrogates["base"].model(x), net("resnet20").eval()(x))
    assert seen == 7
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in surrogates["base"].model.parameters()} == shared


def test_without_a_jump_there_is_nothing_to_smooth():
    for defense in (JumpReLU(jump=0), JumpReLU()):
        model = defense.apply(net())
        assert defense.traits(model) == Traits(retrofit=True)
        assert defense.surrogates(model.eval()) == {}
    model = JumpReLU(jump=0.1).apply(net())
    assert JumpReLU(jump=0.1).traits(model) == Traits(gradient="discontinuous", retrofit=True)


# The net


@pytest.mark.parametrize("name", NETS)
def test_every_site_is_replaced(name):
    model = JumpReLU(jump=0).apply(net(name)).eval()
    x = images(model)
    assert list(count_calls(model, Jump, x).values()) == [1] * SITES[name]
    assert count_modules(model, (nn.ReLU, nn.ReLU6)) == 0
    caps = {module.cap for module in model.modules() if isinstance(module, Jump)}
    assert caps == ({6.0} if name == "mobilenet_v2" else {None})
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits, wanted = model(ours), net(name).eval()(theirs)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    gradients = torch.autograd.grad(logits[:, 0].sum(), ours)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted[:, 0].sum(), theirs))


class Users(nn.Module):
    """A user's own net: one ReLU for two calls, and a function for the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.layers[0](x.flatten(1)))
        z = self.relu(self.layers[1](z))
        return self.layers[3](F.relu(self.layers[2](z)))


class Box(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.input_shape = (3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_a_users_own_net_is_split_first():
    reference = Users()
    model = JumpReLU(jump=0.1).apply(Box(Users())).eval()
    x = images(model)
    assert list(count_calls(model, Jump, x).values()) == [1, 1, 1]
    z = x.flatten(1)
    for layer in reference.layers[:3]:
        z = layer(z)
        z = z * (z > 0.1)
    torch.testing.assert_close(model(x), reference.layers[3](z))


def test_torchvision_nets_have_a_jump_per_call():
    model = torchvision(name="resnet18", num_classes=3, input_shape=[3, 32, 32]).build()
    defense = JumpReLU(jump=0.05)
    assert count_modules(defense.apply(model), Jump) == 17
    assert list(count_calls(model, Jump, images(model, 2)).values()) == [1] * 17


def test_a_net_without_relus_is_refused():
    model = convnet(num_classes=3, input_shape=[3, 8, 8], activation="silu").build()
    with pytest.raises(UserError, match="no ReLU or ReLU6 module"):
        JumpReLU(jump=1).apply(model)


@pytest.mark.parametrize("name", ["convnet", "mobilenet_v2"])
def test_torch_fx_traces_the_model_and_its_surrogates(name):
    defense = JumpReLU(jump=0.1)
    model = defense.apply(net(name)).eval()
    x = images(model, 2, seed=1)
    traced = [model, *(surrogate.model for surrogate in defense.surrogates(model).values())]
    for whole in traced:
        gradients = []
        for function in (whole, fx.symbolic_trace(whole)):
            point = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(function(point)[:, 0].sum(), point)[0])
        torch.testing.assert_close(*gradients)
    assert len(traced) == 8


def test_weights_come_back_from_a_file(tmp_path: Path):
    """A jump that was found is in the file; a given one is the config's, as any other number."""
    model = JumpReLU(max_drop=100.0).apply(net()).eval()
    JumpReLU(max_drop=100.0, grid=[0.3]).finish(model, labelled(model))
    save_weights(model, tmp_path / "found.safetensors")
    other = JumpReLU().apply(net(seed=4)).eval()
    load_weights(other, tmp_path / "found.safetensors")
    assert jump_of(other) == pytest.approx(0.3)
    assert model_sha256(other) == model_sha256(model) == model_sha256(copy.deepcopy(model))

    model = JumpReLU(jump=0.3).apply(net()).eval()
    assert model.state_dict().keys() == net().state_dict().keys()
    save_weights(model, tmp_path / "given.safetensors")
    for jump in (0.3, 0.5):
        other = JumpReLU(jump=jump).apply(net(seed=4)).eval()
        load_weights(other, tmp_path / "given.safetensors")
        assert jump_of(other) == pytest.approx(jump)
        assert (model_sha256(other) == model_sha256(model)) == (jump == 0.3)


@pytest.mark.parametrize("recipe", [Standard(), PGDAT(threat=THREAT, steps=2)])
def test_two_steps_with_a_number(recipe: Recipe):
    defense = JumpReLU(jump=0.1)
    model = defense.apply(net()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainingStep(model, recipe, defense)
    x, y = images(model, 9), torch.arange(9) % 3
    for number in range(2):
        part: Literal["clean", "adversarial"] = recipe.parts[0]
        inputs = {part: x if part == "clean" else recipe.perturb(model, x, y)}
        loss = torch.stack(list(step(inputs, y, 0, number).values())).sum()
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == before.keys() and jump_of(model) == pytest.approx(0.1)


# The automatic jump


class Held(Source):
    name = "held"

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> tuple[str, ...]:
        return "a", "b", "c"

    def open(self, part: str) -> Split:
        assert part == "train", "the jump was chosen on the test split"
        return ArraySplit(self.x, self.y)


def labelled(model: Classifier, n: int = 600, val: int = 300) -> Splits:
    """Images that the model without a jump classifies right, but for every tenth."""
    x = images(model, n, seed=3)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::10] = (y[::10] + 1) % 3
    return Splits(Held(x, y), val=val, split_seed=0, mean=None, std=None, augment=Augment())


def sized(seed: int = 0) -> Classifier:
    """A net whose classes all come up, and whose accuracy falls slowly with the jump."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
    return Classifier(
        trunk, num_features=40, num_classes=3, input_shape=(3, 2, 2), mean=[0.5], std=[0.1]
    ).eval()


def accuracy(jump: float, split: Split, seed: int = 0) -> float:
    """In points, with a jump written out by hand."""
    model = sized(seed)
    x, y = split.fetch(torch.arange(len(split)), "cpu")
    first, second = (m for m in model.trunk.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        z = first((x.flatten(1) - 0.5) / 0.1)
        z = second(z * (z > jump))
        right = model.head(z * (z > jump)).argmax(1) == y
    return 100 * right.sum().item() / len(y)


@pytest.mark.parametrize("seed", [0, 4, 7])
@pytest.mark.parametrize("max_drop", [0.0, 1.0, 5.0, 100.0])
def test_auto_takes_what_a_search_by_hand_takes(max_drop, seed):
    data = labelled(sized(seed))
    drops = {jump: accuracy(0, data.val, seed) - accuracy(jump, data.val, seed) for jump in GRID}
    allowed = [jump for jump, drop in drops.items() if drop <= max_drop + 1e-9]
    defense = JumpReLU(max_drop=max_drop)
    model = defense.apply(sized(seed)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("jump")}
    for _ in range(2):  # what was chosen before is no part of the choice
        defense.finish(model, data)
        assert jump_of(model) == pytest.approx(max(allowed, default=0.0))
    assert {float(m.jump) for m in model.modules() if isinstance(m, Jump)} == {jump_of(model)}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    if max_drop == 1.0:
        assert drops[max(allowed)] == pytest.approx(1.0), "at most, not less than"
        falls_back = any(jump < max(allowed) for jump in set(GRID) - set(allowed))
        assert falls_back == (seed == 4), "the largest, though a smaller one costs too much"
    if max_drop == 100.0:
        assert jump_of(model) == max(GRID)


def test_auto_takes_no_jump_where_all_cost_too_much():
    model = JumpReLU(max_drop=0.0, grid=[1.0, 0.8]).apply(sized()).eval()
    JumpReLU(max_drop=0.0, grid=[1.0, 0.8]).finish(model, labelled(sized()))
    assert jump_of(model) == 0


def test_a_number_is_not_changed_by_the_data():
    defense = JumpReLU(jump=0.7)
    model = defense.apply(sized()).eval()
    defense.finish(model, labelled(sized()))
    assert jump_of(model) == pytest.approx(0.7)


def test_a_number_takes_the_place_of_the_jump_that_a_run_chose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["recipe=standard", "trainer.epochs=1", "trainer.val_steps=1", "-q"]
    assert main(["train", "defense=jumprelu", "hydra.run.dir=chosen", *small]) == 0
    look = ["eval", "run=chosen", "defense.jump=30", "protocol=clean", "n=100", "-q"]
    assert main([*look, "hydra.run.dir=given"]) == 0
    results = Results.load(Path("given/results.json"))
    assert results.settings["defense.jump"] == 30 and results.clean.acc < 0.3
    model, _ = from_run(find("chosen"))
    held = load_file("chosen/model.safetensors")
    assert jump_of(model) == max(float(v) for k, v in held.items() if k.endswith(".jump"))
    assert 0 < jump_of(model) < 30


def test_auto_needs_validation_data():
    class Empty(Splits):
        @property
        def val(self) -> Split:
            return self.train.subset([])

    data = labelled(sized())
    data.__class__ = Empty
    defense = JumpReLU()
    with pytest.raises(UserError, match=r"give defense\.jump=NUMBER"):
        defense.finish(defense.apply(sized()), data)


def trained(folder: Path, monkeypatch: Any, killed: str | None = None, **settings: Any) -> Summary:
    """A training with an automatic jump of which epoch 2 of 3 is the best.

    killed: the file whose writing at the end is interrupted; the training then goes on.
    """
    defense = JumpReLU(**settings)

    def plain_until_the_end(*arguments: Any, **options: Any) -> tuple[float, float | None]:
        # The clean accuracy is real where the jump acts, and planted before.
        measured = accuracies(*arguments, **options)
        return measured if jump_of(arguments[0]) else next(planted)

    def save(weights: nn.Module | dict[str, Tensor], path: Path) -> None:
        save_weights(weights, path)
        # At the end the model itself is saved, with its jump.
        if isinstance(weights, nn.Module) and jump_of(weights) and path.name == killed:
            raise KeyboardInterrupt

    def once() -> Summary:
        trainer = Trainer(epochs=3, batch_size=16, val_steps=1)
        model, recipe = JumpReLU().apply(small_net()), Standard(threat=STRIPES)
        return fit(folder, trainer, model=model, defense=defense, recipe=recipe)

    planted = iter([(0.8, 0.1), (0.9, 0.1), (0.7, 0.1)])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accuracies", plain_until_the_end)
        if killed is not None:
            patch.setattr(loop, "save_weights", save)
            with pytest.raises(KeyboardInterrupt):
                once()
            patch.setattr(loop, "save_weights", save_weights)
        return once()


@pytest.mark.parametrize("killed", ["last.safetensors", "model.safetensors"])
def test_auto_trains_the_plain_net_and_chooses_at_the_end(tmp_path, monkeypatch, killed):
    settings = {"max_drop": 20.0, "grid": [0.05, 0.1, 0.2]}
    summary = trained(tmp_path / "whole", monkeypatch, **settings)
    assert summary.best_epoch == 2 and summary.chosen["jump"] in settings["grid"]
    plain = small_net()
    fit(tmp_path / "plain", Trainer(epochs=3, batch_size=16, val_steps=1), model=plain,
        recipe=Standard(threat=STRIPES))  # fmt: skip
    for name in ("last.safetensors", "model.safetensors"):
        model = JumpReLU().apply(small_net()).eval()
        load_weights(model, tmp_path / "whole" / name)
        jump = jump_of(model)
        assert jump > 0 and JumpReLU(**settings).finish(model, small_splits())["jump"] == (
            pytest.approx(jump)
        )
        x, y = small_splits().val.fetch(torch.arange(24), "cpu")
        right = (model(x).argmax(1) == y).float().mean().item()
        measured = summary.last if name.startswith("last") else summary.val
        assert measured["clean"] == pytest.approx(right), "of the model that is in the file"
    assert jump == pytest.approx(summary.chosen["jump"])
    undefended = load_file(tmp_path / "plain" / "last.safetensors")
    defended = load_file(tmp_path / "whole" / "last.safetensors")
    assert all(torch.equal(defended[name], value) for name, value in undefended.items())

    assert trained(tmp_path / "parts", monkeypatch, killed, **settings).chosen == summary.chosen
    assert_same_result(tmp_path / "whole", tmp_path / "parts")


def test_training_goes_on_without_the_jump_that_its_weights_came_with(tmp_path):
    defense = JumpReLU(max_drop=100.0, grid=[0.3])
    seen: list[float] = []

    @dataclass(frozen=True)
    class Spy(JumpReLU):
        def loss_terms(self, model: Any, step: Any) -> dict[str, Tensor]:
            seen.append(jump_of(model))
            return {}

    model = defense.apply(small_net())
    defense.finish(model.eval(), small_splits())
    assert jump_of(model) == pytest.approx(0.3)
    spy = Spy(max_drop=100.0, grid=[0.2])
    trainer = Trainer(epochs=1, batch_size=48, val_steps=1)
    summary = fit(
        tmp_path, trainer, model=model, defense=spy, recipe=Standard(threat=STRIPES), prepared=True
    )
    assert seen == [0.0, 0.0] and summary.chosen == {"jump": 0.2}
    assert jump_of(model) == pytest.approx(0.2)


# The authors' attack


def linear(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(nn.Flatten(), num_features=6, num_classes=2, input_shape=(1, 2, 3))


def direction(model: Classifier, y: Tensor) -> Tensor:
    """The sign of the gradient of a linear model of two classes: (N, 1, 2, 3)."""
    weight = next(model.head.parameters()).detach()
    return (weight[1 - y] - weight[y]).sign().view(-1, 1, 2, 3)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_ifgsm_walks_in_signs_and_is_kept_in_the_image_alone(steps):
    model, y = linear(), torch.tensor([0, 1, 0, 1])
    x = 0.3 + 0.4 * images(model, 4)
    clean = Clean(torch.arange(4), x, y)
    point = craft(IFGSM(steps=steps, step_size=0.02), model, clean, Threat("linf", 0.1), NO_DRAWS)
    wanted = (x + steps * 0.02 * direction(model, y)).clamp(0, 1)
    torch.testing.assert_close(point, wanted)
    inside = Threat("linf", 0.1).contains(point, x).all()
    assert inside == (steps * 0.02 <= 0.1) == IFGSM(steps, 0.02).stays_inside(Threat("linf", 0.1))


class Forbidden(TorchRandom):
    def uniform(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("IFGSM draws nothing")

    normal = uniform


NO_DRAWS = Forbidden()


def test_ifgsm_asks_once_per_step_for_each_row_alone():
    model, attack = linear(), IFGSM(steps=5, step_size="2/255")
    x, y = images(model, 4), torch.tensor([0, 1, 0, 1])
    oracle, ids = Oracle(model), torch.arange(4)
    threat = Threat("linf", 0.01)
    rows = attack.start(oracle, Clean(ids, x, y), threat, NO_DRAWS, torch.zeros_like(ids))
    assert torch.equal(rows.point, x) and (attack.starts, attack.queries) == (1, 5)
    for _ in range(attack.queries):
        attack.advance(rows, attack.ask(oracle, rows, threat), threat, NO_DRAWS)
    assert rows.forwards.tolist() == rows.backwards.tolist() == rows.iteration.tolist() == [5] * 4
    assert (oracle.model.forwards, oracle.model.backwards) == (20, 20)
    for i in range(4):
        alone = Clean(ids[i : i + 1], x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(
            craft(attack, model, alone, threat, NO_DRAWS), rows.point[i : i + 1]
        )


def test_it_stays_inside_where_all_steps_fit():
    cases = [("8/255", 0.01, 3), (0.3, 0.01, 30), (0.35, 0.01, 35), (1, 0.3, 3), (0.005, 0.01, 0)]
    for eps, size, steps in cases:
        threat = Threat("linf", eps)
        assert steps == 0 or IFGSM(steps, size).stays_inside(threat)
        assert not IFGSM(steps + 1, size).stays_inside(threat)
    assert len(cases) == 5
    # Float32 sums of steps are inside for the threat as well.
    x, threat = torch.full((1, 1, 1, 3), 0.31), Threat("linf", 0.35)
    point = x.clone()
    for _ in range(35):
        point = point + 0.01
    assert threat.contains(point, x).all()


# Configs

MISTAKES = [
    (lambda: JumpReLU(jump="much"), "defense.jump=much is not"),
    (lambda: JumpReLU(jump=-0.1), "defense.jump=-0.1 is not"),
    (lambda: JumpReLU(jump=math.inf), "defense.jump=inf is not"),
    (lambda: JumpReLU(jump=math.nan), "defense.jump=nan is not"),
    (lambda: JumpReLU(max_drop=-1.0), "defense.max_drop=-1 is not"),
    (lambda: JumpReLU(grid=[]), r"defense.grid=\[\] has no jump"),
    (lambda: JumpReLU(grid=[0.1, -0.1]), "defense.grid=-0.1 is not"),
    (lambda: IFGSM(steps=0), "steps >= 1"),
    (lambda: IFGSM(step_size=0), "step_size above 0"),
    (lambda: IFGSM(step_size="two"), "step_size='two'"),
    (lambda: IFGSM().check(10, Threat("l2", 0.5)), "threat=linf_8"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 11
    IFGSM().check(10, THREAT)


def test_the_shipped_config_writes_out_every_field():
    assert "jumprelu" in options("defense")
    node = shipped("defense", "jumprelu")
    assert set(plain(node)) - {"_target_"} == {field.name for field in fields(JumpReLU)}
    assert build(node, "defense") == JumpReLU()
    for given in (1, 0.5):
        node["jump"] = given
        assert build(node, "defense").jump == given
