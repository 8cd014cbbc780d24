"""What holds for every defense, on every backbone and under every recipe that it goes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from components import (
    BACKBONES,
    BATCH,
    CLASSES,
    DATA,
    DEFENSES,
    PAIRS,
    REFUSED,
    SHAPE,
    THREAT,
    backbone,
    chosen,
    recipes,
)
from torch import Tensor, nn

from advbench.attacks.base import Clean as CleanImages
from advbench.attacks.base import Oracle, Rows, started
from advbench.attacks.pgd import PGD
from advbench.backbones.base import Classifier
from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation.checks import probe
from advbench.evaluation.samples import Samples, subset
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.standard import Standard
from advbench.runs.fingerprint import model_sha256
from advbench.training.checkpoint import save_weights
from advbench.training.step import TrainingStep


def prepared(defense: str, net: str) -> Classifier:
    """A defended model, prepared, with running statistics that are not the first ones."""
    instance = DEFENSES[defense]
    model = instance.apply(backbone(net)).train()
    with torch.no_grad():  # what starts at zero has moved, and rows differ
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    x, y = DATA.train.fetch(torch.arange(BATCH), torch.device("cpu"))
    step = TrainingStep(model, Standard(THREAT), instance)
    for _ in range(3):
        with torch.no_grad():
            step({"clean": x}, y, 0, 0)
    with torch.no_grad():
        instance.prepare(model.eval(), DATA)
    return model.eval()


@pytest.mark.parametrize(("defense", "net"), PAIRS)
def test_it_trains_two_steps_under_every_recipe(defense: str, net: str) -> None:
    instance, seen = DEFENSES[defense], 0
    for recipe in (recipes()[name] for name in chosen(defense, net)):
        model = instance.apply(backbone(net))
        instance.prepare(model.eval(), DATA)
        step = TrainingStep(model.train(), recipe, instance)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for i in range(2):
            torch.manual_seed(i)
            x, y = DATA.train.fetch(torch.arange(BATCH) + BATCH * i, torch.device("cpu"))
            inputs: dict[Any, Tensor] = {"clean": x}
            if "adversarial" in recipe.parts:
                state = {k: v.clone() for k, v in model.state_dict().items()}
                inputs["adversarial"] = recipe.perturb(model, x, y)
                assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

            def here(given: Any = (inputs, y, 0, i), step: TrainingStep = step) -> Tensor:
                return torch.stack(list(step(*given).values())).sum()

            optimizer.zero_grad()
            with recipe.displaced(model, here, 0):
                loss = here()
                assert loss.isfinite(), recipe
                loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            with torch.no_grad():
                recipe.after_step(model, step.record)
                instance.after_step(model, step.record)
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert len(moved) > len(before) / 2
        with torch.no_grad():
            instance.after_epoch(model.eval(), DATA)
        assert model(x).isfinite().all()
        seen += 1
    assert seen == (8 if net == "convnet" else 1)


def test_all_pairs_were_tried() -> None:
    assert len(PAIRS) == len(DEFENSES) * len(BACKBONES) - len(REFUSED) == 53
    tried = [(*pair, recipe) for pair in PAIRS for recipe in chosen(*pair)]
    assert len({(defense, recipe) for defense, _, recipe in tried}) == len(DEFENSES) * 8
    assert len({(net, recipe) for _, net, recipe in tried}) == len(BACKBONES) * 8


@pytest.mark.parametrize(("defense", "net"), sorted(REFUSED))
def test_it_refuses_what_it_cannot_defend(defense: str, net: str) -> None:
    with pytest.raises(UserError):
        DEFENSES[defense].apply(backbone(net))


@pytest.mark.parametrize(("defense", "net"), [(d, "resnet20") for d in DEFENSES])
def test_weights_come_back_and_traits_hold(defense: str, net: str, tmp_path: Path) -> None:
    instance, model = DEFENSES[defense], prepared(defense, net)
    save_weights(model, tmp_path / "w.safetensors")
    other = instance.apply(BACKBONES[net](num_classes=CLASSES, input_shape=SHAPE).build())
    load_weights(other, tmp_path / "w.safetensors")
    other.eval()
    assert model_sha256(model) == model_sha256(other)
    x, _ = DATA.test.fetch(torch.arange(BATCH), torch.device("cpu"))
    torch.manual_seed(0)
    logits = model(x)
    torch.manual_seed(0)
    assert torch.equal(logits, other(x))

    traits = instance.traits(model)
    samples = Samples(DATA.test, subset(60, None), torch.device("cpu"))
    assert probe(model, samples, traits)[0] == CLASSES  # refuses undeclared noise and dependence
    assert traits.stochastic == (not torch.equal(model(x), model(x)))
    if not traits.stochastic:
        alone = torch.cat([model(row) for row in x.split(1)])
        assert traits.batch_dependent == (not torch.allclose(alone, logits, rtol=1e-3, atol=1e-4))
    if traits.batch_dependent:
        assert traits.batch_size == BATCH


@pytest.mark.parametrize(("defense", "net"), [(d, "resnet20") for d in DEFENSES])
def test_the_declared_gradient_is_the_measured_one(defense: str, net: str) -> None:
    """An exact gradient agrees with finite differences; one that is straight through does not."""
    instance, model = DEFENSES[defense], prepared(defense, net).double()
    traits = instance.traits(model)
    if traits.stochastic or traits.gradient == "discontinuous":
        return  # no derivative to compare; what a jump does stands in its own test
    x, _ = DATA.test.fetch(torch.arange(BATCH), torch.device("cpu"))
    x = (0.8 * x + 0.1).double().requires_grad_()
    weights = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    value = (model(x) * weights).sum()
    gradient = torch.autograd.grad(value, x)[0]
    gaps = []
    for seed in range(12):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            ends = [(model(x + s * 1e-8 * direction) * weights).sum() for s in (1, -1)]
        measured = (ends[0] - ends[1]) / 2e-8
        gaps.append(((gradient * direction).sum() - measured).abs() / (measured.abs() + 1e-3))
    agrees = torch.stack(gaps).median() < 1e-5  # kinks aside
    assert agrees == (traits.gradient == "exact"), (traits.gradient, gaps)


CHANGED = ("awnet", "sparta", "jumprelu")
"""Defenses that change activations inside, whose surrogates then differ with them: ReLU6 too."""


@pytest.mark.parametrize(
    ("defense", "net"),
    [(d, "convnet") for d in DEFENSES] + [(d, "mobilenet_v2") for d in CHANGED],
)
def test_surrogates_are_what_they_claim(defense: str, net: str) -> None:
    if (defense, net) in REFUSED:
        return
    instance, model = DEFENSES[defense], prepared(defense, net)
    before, seen = model_sha256(model), 0
    x, y = DATA.test.fetch(torch.arange(BATCH), torch.device("cpu"))
    shifted = (x + 0.03).clamp(0, 1)
    for name, surrogate in instance.surrogates(model).items():
        assert not any(module.training for module in surrogate.model.modules()), name
        arguments = (shifted, x) if surrogate.needs_clean_input else (shifted,)
        answer = surrogate.model(*arguments)
        assert isinstance(answer, tuple) == surrogate.auxiliary_loss, name
        logits = answer[0] if surrogate.auxiliary_loss else answer
        assert logits.shape == (BATCH, CLASSES) and surrogate.why, name
        if surrogate.exact:
            torch.testing.assert_close(logits, model(shifted), rtol=1e-4, atol=1e-5)
        rows = Rows(**started(CleanImages(torch.arange(BATCH), x, y), shifted, torch.zeros_like(y)))
        found = Oracle(surrogate.model, needs_clean_input=surrogate.needs_clean_input).query(
            PGD(loss_name=surrogate.loss), rows
        )
        assert found.gradient is not None and found.gradient.abs().sum() > 0, name
        own = {id(p) for p in model.parameters()}
        assert any(id(p) in own for p in surrogate.model.parameters()), name
        seen += 1
    assert model_sha256(model) == before
    least = {"none": 0, "sparta-relu": 0, "mfdv_snn": 1, "sparta": 1, "hpm-static": 1}
    assert seen >= least.get(defense, 3), (defense, seen)


def test_traits_are_worth_something() -> None:
    """Each value of each trait is declared by somebody."""
    told = [instance.traits(prepared(name, "convnet")) for name, instance in DEFENSES.items()]
    assert {t.gradient for t in told} == {"exact", "discontinuous", "straight_through"}
    assert {t.stochastic for t in told} == {True, False} == {t.batch_dependent for t in told}
    assert Traits() in told
    assert not any(isinstance(instance, nn.Module) for instance in DEFENSES.values())
