"""AWP by the authors' proxy, by hand, and around every recipe and defense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from components import BATCH, DATA, DEFENSES, backbone, recipes
from omegaconf import OmegaConf
from problems import LINF, linear, record
from processes import run_script
from small import THREAT, assert_same_result, fit, net, read_weights, state
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.config import build_recipe, shipped, spelled_out
from advbench.defenses.base import Defense, Step
from advbench.errors import UserError
from advbench.recipes import awp
from advbench.recipes.awp import AWP
from advbench.recipes.base import Recipe
from advbench.recipes.fgsm_rs import FGSMRS
from advbench.recipes.mart import MART
from advbench.recipes.mixed import Mixed
from advbench.recipes.mtard import MTARD
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES
from advbench.training.optimizers import SGD
from advbench.training.step import TrainingStep
from advbench.training.trainer import Trainer


def inputs(model: Classifier, recipe: Recipe) -> tuple[dict[Any, Tensor], Tensor]:
    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    parts: dict[Any, Tensor] = {"clean": x}
    if "adversarial" in recipe.parts:
        parts["adversarial"] = recipe.perturb(model, x, y)
    return parts, y


def loss_of(model: Classifier, recipe: Recipe) -> Callable[[], Tensor]:
    """The loss of a step on a fixed batch."""
    step = TrainingStep(model, recipe, Defense()).train()
    given = inputs(model, recipe)
    return lambda: torch.stack(list(step(*given, 0, 0).values())).sum()


# Where the weights go


def test_a_linear_model_by_hand():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, generator=generator)
    model, x, y = linear(weight.clone()), torch.rand(8, 1, 1, 6, generator=generator), torch.ones(8)
    recipe = AWP(of=PGDAT(threat=LINF), gamma=0.2)

    def loss() -> Tensor:
        terms = recipe.loss_terms(model, record(model, y.long(), adversarial=x))
        return terms["ce"]

    p = (x.flatten(1) @ weight.T).softmax(1)
    p[:, 1] -= 1
    gradient = p.T @ x.flatten(1) / 8
    with recipe.displaced(model, loss, 0):
        moved = next(model.head.parameters()).detach() - weight
    torch.testing.assert_close(moved, 0.2 * weight.norm() * gradient / gradient.norm())
    torch.testing.assert_close(moved.norm(), 0.2 * weight.norm())
    assert torch.equal(next(model.head.parameters()), weight)


@pytest.mark.parametrize("kind", [PGDAT, TRADES, MART])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_they_go_where_the_authors_proxy_goes(kind, rate):
    """Their ``calc_awp``: an SGD step of a copy along minus the loss; whatever its rate."""
    model = net(plain=True)
    recipe = AWP(of=kind(threat=THREAT, steps=2), gamma=0.05)
    loss = loss_of(model, recipe)
    proxy = copy.deepcopy(model)
    step = TrainingStep(proxy, recipe, Defense())
    optimizer = torch.optim.SGD(proxy.parameters(), lr=rate)
    torch.manual_seed(0)
    given = inputs(model, recipe)
    (-torch.stack(list(step(*given, 0, 0).values())).sum()).backward()
    optimizer.step()

    torch.manual_seed(0)
    loss = loss_of(model, recipe)
    before, wanted = state(model), 0
    with recipe.displaced(model, loss, 0):
        for name, old in before.items():
            moved = model.state_dict()[name] - old
            if "weight" in name and old.dim() > 1:
                step_ = proxy.state_dict()[name] - old
                theirs = 0.05 * old.norm() / (step_.norm() + 1e-20) * step_
                torch.testing.assert_close(moved, theirs, rtol=1e-3, atol=1e-5)
                assert moved.any()
                wanted += 1
            else:
                assert not moved.any()
    assert wanted == 2


def test_the_loss_rises_by_what_the_gradient_says():
    model = net(plain=True)
    recipe = AWP(of=Standard(), gamma=1e-3)
    loss = loss_of(model, recipe)
    here = float(loss().detach())
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    gradients = torch.autograd.grad(loss(), weights)
    slope = sum(
        float(w.detach().norm() * g.norm()) for w, g in zip(weights, gradients, strict=True)
    )
    with recipe.displaced(model, loss, 0):
        there = float(loss().detach())
    assert there - here == pytest.approx(1e-3 * slope, rel=0.05)


def test_a_step_of_the_optimizer_by_hand(tmp_path):
    """One step: the gradient of the displaced weights, weight decay of those in their place."""
    model = net(plain=True)
    batches: list[tuple[Tensor, Tensor]] = []

    class Seen(Defense):
        def after_step(self, model: Any, step: Step) -> None:
            assert step.adversarial is not None
            batches.append((step.adversarial.x.clone(), step.y.clone()))

    start = state(model)
    recipe = AWP(of=PGDAT(threat=THREAT, steps=1), gamma=0.3)
    optimizer = SGD(lr=0.5, momentum=0.0, weight_decay=0.1, schedule="constant")
    fit(tmp_path, Trainer(epochs=1, batch_size=96, val_steps=1), model=model, recipe=recipe,
        optimizer=optimizer, defense=Seen())  # fmt: skip
    ((x, y),) = batches
    other = net(plain=True)
    parameters = dict(other.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(other(x), y), list(parameters.values()))
    with torch.no_grad():
        for (name, w), g in zip(parameters.items(), gradients, strict=True):
            if w.dim() > 1:
                w += 0.3 * start[name].norm() / g.norm() * g
    gradients = torch.autograd.grad(F.cross_entropy(other(x), y), list(parameters.values()))
    for (name, _), g in zip(parameters.items(), gradients, strict=True):
        wanted = start[name] - 0.5 * (g + 0.1 * start[name])
        torch.testing.assert_close(state(model)[name], wanted, rtol=1e-4, atol=1e-6)


def test_a_loss_without_a_slope_displaces_nothing():
    model = net(plain=True)
    before = state(model)
    recipe = AWP(of=Standard(), gamma=0.1)
    with recipe.displaced(model, lambda: 0 * model(torch.rand(4, 1, 4, 4)).sum(), 0):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_weights_and_those_that_the_loss_does_not_see_stay():
    model = net(plain=True)
    dict(model.named_parameters())["trunk.0.weight"].requires_grad_(False)
    model.spare = nn.Linear(3, 3)
    before = state(model)
    recipe = AWP(of=Standard(), gamma=0.1)
    with recipe.displaced(model, loss_of(model, recipe), 0):
        now = model.state_dict()
        moved = [name for name, value in before.items() if not torch.equal(value, now[name])]
    assert moved == ["head.weight"]


# No trace


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", ["not", "inside", "in the loss"])
def test_it_leaves_no_trace(fails):
    model = net().train()  # batch norm and dropout
    recipe = AWP(of=PGDAT(threat=THREAT, steps=1), gamma=0.1)
    loss = loss_of(model, recipe)
    kept = next(model.head.parameters())
    kept.grad = torch.full_like(kept, 7.0)
    before, seen = state(model), False
    torch.manual_seed(3)
    generator = torch.get_rng_state()

    def failing() -> Tensor:
        loss()
        raise Stop

    try:
        with recipe.displaced(model, failing if fails == "in the loss" else loss, 0):
            now = model.state_dict()
            for name, value in before.items():
                is_moved = name in ("trunk.0.weight", "head.weight")
                assert torch.equal(value, now[name]) != is_moved, name
            assert torch.equal(torch.get_rng_state(), generator)
            seen = True
            if fails == "inside":
                raise Stop
    except Stop:
        assert fails != "not"
    assert seen == (fails != "in the loss")
    after = model.state_dict()
    assert len(before) == 9 and "trunk.1.num_batches_tracked" in before
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(kept.grad, torch.full_like(kept, 7.0))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_the_second_pass_draws_the_same_noise():
    model = net().train()
    recipe = AWP(of=Standard(), gamma=0.0)
    loss, values = loss_of(model, recipe), []

    def noted() -> Tensor:
        values.append(loss())
        return values[-1]

    with recipe.displaced(model, noted, 0):
        noted()
    assert float(values[0].detach()) == float(values[1].detach())
    assert float(noted().detach()) != float(values[0].detach()), "dropout draws"


def one_epoch(defense: Defense, recipe: Recipe) -> Classifier:
    """Two steps of training as the loop makes them."""
    torch.manual_seed(1)
    model = defense.apply(backbone("convnet"))
    defense.prepare(model.eval(), DATA)
    step = TrainingStep(model.train(), recipe, defense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for i in range(2):
        torch.manual_seed(i)
        x, y = DATA.train.fetch(torch.arange(BATCH) + BATCH * i, torch.device("cpu"))
        parts: dict[Any, Tensor] = {"clean": x}
        if "adversarial" in recipe.parts:
            parts["adversarial"] = recipe.perturb(model, x, y)

        def here(given: Any = (parts, y, 0, i)) -> Tensor:
            return torch.stack(list(step(*given).values())).sum()

        optimizer.zero_grad()
        with recipe.displaced(model, here, 0):
            here().backward()
        optimizer.step()
        with torch.no_grad():
            recipe.after_step(model, step.record)
            defense.after_step(model, step.record)
    return model


@pytest.mark.parametrize("name", DEFENSES)
def test_it_fits_every_defense(name):
    """Of size zero it is the other recipe bit for bit; else the weights end elsewhere."""
    inside = TRADES(THREAT, steps=1)
    plain, zero, real = (
        one_epoch(DEFENSES[name], recipe).state_dict()
        for recipe in (inside, AWP(of=inside, gamma=0.0), AWP(of=inside))
    )
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert all(value.isfinite().all() for value in real.values())
    weights = [key for key in plain if "weight" in key and plain[key].dim() > 1]
    assert weights and not any(torch.equal(plain[key], real[key]) for key in weights)


def test_it_fits_every_recipe():
    seen = 0
    for name, inside in recipes().items():
        if isinstance(inside, AWP):
            continue
        recipe, zero = AWP(of=inside), AWP(of=inside, gamma=0.0)
        assert recipe.parts == inside.parts and recipe.threat == inside.threat
        plain, nothing, real = (
            one_epoch(Defense(), r).state_dict() for r in (inside, zero, recipe)
        )
        assert all(torch.equal(plain[key], nothing[key]) for key in plain), name
        assert not torch.equal(plain["head.weight"], real["head.weight"]), name
        seen += 1
    assert seen == 7


# Epochs, processes, interruptions


def test_it_begins_after_the_warmup():
    model = net(plain=True)
    recipe = AWP(of=Standard(), gamma=0.1, warmup=2)
    loss, weight, moved = loss_of(model, recipe), next(model.head.parameters()), []
    before = weight.detach().clone()
    for epoch in range(4):
        with recipe.displaced(model, loss, epoch):
            moved.append(not torch.equal(weight, before))
    assert moved == [False, False, True, True]


def test_the_loop_tells_the_epoch(tmp_path):
    epochs = []

    class Told(AWP):
        def displaced(self, model: Any, loss: Any, epoch: int) -> Any:
            epochs.append(epoch)
            return super().displaced(model, loss, epoch)

    inside = PGDAT(threat=THREAT, steps=1)
    trainer = Trainer(epochs=2, batch_size=48, val_steps=1)
    whole = fit(tmp_path / "a", trainer, recipe=Told(of=inside, warmup=2))
    assert epochs == [0, 0, 1, 1]
    same = fit(tmp_path / "b", trainer, recipe=inside)
    assert whole.val == same.val
    last = [read_weights(tmp_path / x / "last.safetensors") for x in "ab"]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def test_all_processes_displace_by_the_mean_gradient(monkeypatch):
    model = net(plain=True)
    recipe = AWP(of=Standard(), gamma=0.1)
    loss = loss_of(model, recipe)
    weights = {n: p for n, p in model.named_parameters() if "weight" in n}
    own = torch.autograd.grad(loss(), list(weights.values()))
    other = [torch.randn(g.shape, generator=torch.Generator().manual_seed(1)) for g in own]
    flat = torch.cat([g.flatten() for g in other])
    monkeypatch.setattr(awp.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(awp.distributed, "all_reduce", lambda value: value.add_(flat))
    before = state(model)
    with recipe.displaced(model, loss, 0):
        for (name, weight), mine, theirs in zip(weights.items(), own, other, strict=True):
            mean = (mine + theirs) / 2
            wanted = before[name] + 0.1 * before[name].norm() * mean / mean.norm()
            torch.testing.assert_close(weight.detach(), wanted)


DEVICES = """
import sys
from pathlib import Path

import small
from advbench.data.augment import Augment
from advbench.recipes.awp import AWP
from advbench.recipes.pgd_at import PGDAT
from advbench.training.trainer import Trainer
from small import THREAT, fit, net

whole = small.splits
small.splits = lambda: whole(Augment())
recipe = AWP(of=PGDAT(threat=THREAT, steps=1, random_start=False), gamma=0.1)
devices = int(sys.argv[1])
trainer = Trainer(epochs=1, batch_size=32, devices=devices, accelerator="cpu", val_steps=1)
fit(Path(sys.argv[2]), trainer, model=net(plain=True), recipe=recipe)
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    from advbench.experiments.checkpoints import load_weights

    ends = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        run_script(DEVICES, str(devices), str(folder), folder=tmp_path, processes=devices)
        model = net(plain=True)
        load_weights(model, folder / "last.safetensors")
        ends.append(state(model))
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) == 4
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_bfloat16_displaces_float32_weights(tmp_path, bfloat16):
    trainer = Trainer(epochs=1, batch_size=32, val_steps=1, precision="bf16-mixed")
    model = net(plain=True)
    start = state(model)
    fit(tmp_path, trainer, model=model, recipe=AWP(of=MART(threat=THREAT, steps=1)))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert not torch.equal(start["head.weight"], model.state_dict()["head.weight"])


class Cut(Defense):
    """Stops the training after a step."""

    def after_step(self, model: Any, step: Step) -> None:
        if step.step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("inner", ["pgd_at", "mtard"])
def test_an_interrupted_training_goes_on(tmp_path, inner):
    trainer = Trainer(epochs=3, batch_size=32, val_steps=1, save_every=0)

    def recipe() -> AWP:
        if inner == "pgd_at":
            return AWP(of=PGDAT(threat=THREAT, steps=1), gamma=0.1, warmup=1)
        torch.manual_seed(5)
        teachers: dict[str, Any] = {"robust_teacher": net(), "standard_teacher": net(plain=True)}
        return AWP(of=MTARD(threat=THREAT, steps=1, **teachers), warmup=1)

    fit(tmp_path / "whole", trainer, recipe=recipe())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", trainer, recipe=recipe(), defense=Cut())
    fit(tmp_path / "parts", trainer, recipe=recipe())
    assert_same_result(tmp_path / "whole", tmp_path / "parts")


# Values and configs


def test_gamma_is_the_authors_unless_given():
    table = [
        (PGDAT(threat=LINF), 0.01),
        (FGSMRS(threat=LINF), 0.01),
        (TRADES(threat=LINF), 0.005),
        (MART(threat=LINF), 0.005),
        (Mixed(threat=LINF), 0.005),
    ]
    for inside, reach in table:
        assert AWP(of=inside).reach == reach
        assert AWP(of=inside, gamma=0.3).reach == 0.3
    assert len(table) == 5


def node(of: Any) -> Any:
    given = shipped("recipe", "awp")
    given.of = of
    return given


def test_a_config_names_the_other_recipe_or_spells_it_out():
    wanted = AWP(of=TRADES(threat=LINF, beta=3.0))
    spelled = {"_target_": "advbench.recipes.trades.TRADES", "beta": 3}
    cases = [{"trades": {"beta": 3}}, spelled]
    for of in cases:
        full = spelled_out(node(of), "recipe")
        assert spelled_out(full, "recipe") == full, "once is enough"
        assert build_recipe(full, threat=LINF, teachers={}) == wanted
    named = spelled_out(node("trades"), "recipe")
    assert OmegaConf.to_container(named.of) == OmegaConf.to_container(shipped("recipe", "trades"))
    assert build_recipe(named, threat=LINF, teachers={}) == AWP(of=TRADES(threat=LINF))
    shipped_one = spelled_out(shipped("recipe", "awp"), "recipe")
    assert build_recipe(shipped_one, threat=LINF, teachers={}) == AWP(of=PGDAT(threat=LINF))
    assert spelled_out(shipped("recipe", "trades"), "recipe") == shipped("recipe", "trades")


def test_teachers_reach_the_recipe_inside():
    teachers = {"robust_teacher": net(), "standard_teacher": net()}
    full = spelled_out(node({"mtard": {"robust_teacher": "a", "standard_teacher": "b"}}), "recipe")
    built = build_recipe(full, threat=LINF, teachers=teachers)
    assert built.of.robust_teacher is teachers["robust_teacher"]
    assert built.of.standard_teacher is teachers["standard_teacher"]
    assert isinstance(built.memory(), type(built.of.memory()))


def of_node(of: Any) -> Any:
    return build_recipe(spelled_out(node(of), "recipe"), threat=LINF, teachers={})


INSIDE = PGDAT(threat=LINF)
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: AWP(), "give recipe.of=pgd_at"),
    (lambda: AWP(of="pgd_at"), "give recipe.of=pgd_at"),
    (lambda: AWP(of=AWP(of=INSIDE)), "works on another recipe"),
    (lambda: AWP(of=INSIDE, gamma=-0.1), "recipe.gamma=-0.1 "),
    (lambda: AWP(of=INSIDE, gamma=float("nan")), "recipe.gamma=nan "),
    (lambda: AWP(of=INSIDE, warmup=-1), "recipe.warmup=-1 "),
    (lambda: AWP(of=INSIDE, label_smoothing=0.1), r"'recipe.of=\{pgd_at: \{label_smoothing"),
    (lambda: of_node("trads"), "did you mean 'trades'"),
    (lambda: of_node({"trades": {"bta": 1}}), "did you mean 'beta'"),
    (lambda: of_node({"trades": 3}), "is no recipe: give NAME or"),
    (lambda: of_node(["trades"]), "is no recipe"),
    (lambda: of_node({"trades": {"beta": -1}}), "recipe.beta=-1 "),
    (lambda: of_node("mtard"), "needs two teachers"),
    (lambda: of_node({"_target_": "os.system", "command": "x"}), "may not be 'os.system'"),
    (lambda: AWP(of=PGDAT(threat=Threat("l1", 12))), "not defined for l1"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 15
