"""AW-Net against the backbone that it starts as, and against filters scaled by hand."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from small import THREAT, fit
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.attacks.base import Clean
from advbench.backbones.base import Backbone, Classifier
from advbench.backbones.convnet import convnet
from advbench.backbones.external import timm, torchvision
from advbench.backbones.lenet import lenet
from advbench.backbones.mobilenet import mobilenet_v2
from advbench.backbones.preact_resnet import preact_resnet18
from advbench.backbones.resnet import resnet18, resnet20, resnet34, resnet50
from advbench.backbones.wide_resnet import wide_resnet
from advbench.config import options
from advbench.defenses import awnet
from advbench.defenses.awnet import AWNet, MixBN, ModulatedConv, RoutedTrunk
from advbench.defenses.base import Part, PartName, Step, Traits
from advbench.errors import UserError
from advbench.evaluation.fast_model import FastModel, FastModelOptions, ask, fast_copy
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES
from advbench.runs.fingerprint import model_sha256
from advbench.surgery import count_calls
from advbench.training.checkpoint import save_weights
from advbench.training.trainer import Trainer

PARTS: tuple[PartName, ...] = ("clean", "adversarial")


def backbone(size: int = 8) -> Classifier:
    torch.manual_seed(0)
    return convnet(num_classes=3, input_shape=[1, size, size], mean=[0.4], std=[0.3]).build()


def images(n: int = 6, size: int = 8) -> Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(1))


def shake(model: nn.Module) -> None:
    """Makes every parameter and statistic another one, and so every image's signals."""
    generator = torch.Generator().manual_seed(2)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value += 0.3 * noise if "running_var" in name else 0.4 * (noise - 0.5)


def center(model: Classifier) -> None:
    """Spreads p over both sides of 1/2."""
    score = routed(model).router.score
    with torch.no_grad():
        score.weight *= 8.0
        score.bias -= routed(model).router((images() - model.mean) / model.std)[1].mean()


def defended(*, shaken: bool = True, **values) -> tuple[AWNet, Classifier]:
    defense = AWNet(**values)
    model = defense.apply(backbone())
    if shaken:
        with torch.no_grad():
            shake(model)
        center(model.eval())
    return defense, model.eval()


def routed(model: Classifier) -> RoutedTrunk:
    assert isinstance(model.trunk, RoutedTrunk)
    return model.trunk


def mixed(model: nn.Module) -> list[MixBN]:
    return [module for module in model.modules() if isinstance(module, MixBN)]


def route(model: Classifier, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The signals of each convolution, (N, C), and p, (N,)."""
    with torch.no_grad():
        signals, t = routed(model).router((x - model.mean) / model.std)
    return signals, torch.sigmoid(t)


def by_hand(model: Classifier, signals: list[Tensor], p: float, x: Tensor) -> Tensor:
    """Logits of one image: a plain net with the filters scaled and the batch norms mixed."""
    assert len(signals) == 3 and len(x) == 1
    ones = torch.ones(32)
    layers: Any = routed(model).trunk
    z = (x - model.mean) / model.std
    for layer, norm, s, stride in (
        (layers.conv1, layers.norm1, ones, 1),
        (layers.conv2.conv, layers.norm2, signals[0], 2),
        (layers.conv3.conv, layers.norm3, signals[1], 1),
        (layers.conv4.conv, layers.norm4, signals[2], 2),
    ):
        z = F.conv2d(z, s.view(-1, 1, 1, 1) * layer.weight, stride=stride, padding=1)
        z = torch.relu((1 - p) * norm.clean(z) + p * norm.adversarial(z))
    return model.head(z.mean((2, 3)))


# At the start

BACKBONES: dict[str, tuple[Callable[..., Backbone], int, int]] = {
    # modulated convolutions, and batch norms
    "convnet": (convnet, 3, 4),
    "resnet18": (resnet18, 16, 20),
    "resnet20": (resnet20, 18, 19),
    "resnet34": (resnet34, 32, 36),
    "resnet50": (resnet50, 16, 53),
    "preact_resnet18": (preact_resnet18, 16, 17),
    "wrn_10_2": (lambda **sizes: wide_resnet(depth=10, width=2, **sizes), 6, 7),
    "mobilenet_v2": (mobilenet_v2, 17, 52),
    "torchvision": (lambda **sizes: torchvision(name="resnet18", **sizes), 16, 20),
    "timm": (lambda **sizes: timm(name="resnet10t", **sizes), 10, 14),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_at_the_start_it_is_its_backbone(name):
    assert len(BACKBONES) == 10
    make, convs, norms = BACKBONES[name]
    torch.manual_seed(0)
    plain = make(num_classes=3, input_shape=[3, 16, 16]).build()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # pyright: ignore[reportOptionalMemberAccess]
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
    model = AWNet().apply(copy.deepcopy(plain))
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    calls = count_calls(model, (ModulatedConv, MixBN), x)
    assert len(calls) == convs + norms and set(calls.values()) == {1}
    assert sum(isinstance(m, ModulatedConv) for m in model.modules()) == convs
    assert len(routed(model).router.filters) == convs

    plain.eval()
    model.eval()
    with torch.no_grad():
        routed(model).router.score.bias.fill_(0.7)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        for p in (0.0, 1.0):
            routed(model).fixed_p = p
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        plain.train()
        model.train()
        assert not any(m.p != 0 for m in model.modules() if isinstance(m, nn.Dropout))
        state = copy.deepcopy(plain.state_dict())
        for part in PARTS:
            plain.load_state_dict(state)
            AWNet().before_part(model, part)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


# The filters and the batch norms


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
    ],
)
def test_signals_scale_the_filters_of_each_image(layer):
    z, s = torch.randn(5, 4, 7, 7), 2 * torch.rand(5, layer.out_channels)
    modulated = ModulatedConv(layer)
    modulated.signal = s
    rows = [
        F.conv2d(
            z[i : i + 1], s[i].view(-1, 1, 1, 1) * layer.weight, layer.bias,
            layer.stride, layer.padding, groups=layer.groups,  # pyright: ignore[reportArgumentType]
        )
        for i in range(5)
    ]  # fmt: skip
    torch.testing.assert_close(modulated(z), torch.cat(rows))
    modulated.signal = torch.ones_like(s)
    assert torch.equal(modulated(z), layer(z)), "a signal of one changes no bit"


@pytest.mark.parametrize("affine", [True, False])
def test_the_mix_of_two_batch_norms(affine):
    norm = nn.BatchNorm2d(4, eps=0.1, affine=affine)
    mix = MixBN(norm)
    with torch.no_grad():
        shake(mix)
    mix.eval()
    z, p = torch.randn(5, 4, 3, 3), torch.tensor([0.0, 1.0, 0.5, 0.2, 0.9])
    mix.p = p
    out = mix(z)
    clean, adversarial = mix.clean(z), mix.adversarial(z)
    share = p.view(-1, 1, 1, 1)
    torch.testing.assert_close(out, (1 - share) * clean + share * adversarial)
    assert (clean - adversarial).abs().max() > 0.1
    assert mix(z.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(mix(z.bfloat16()).float(), out, rtol=0.02, atol=0.05)


def test_statistics_move_with_their_own_part_alone():
    mix = MixBN(nn.BatchNorm2d(2, momentum=0.25)).train()
    z = {part: torch.randn(8, 2, 3, 3) + i for i, part in enumerate(PARTS, start=1)}
    expected = {part: torch.zeros(2) for part in PARTS}
    for part in ("clean", "adversarial", "adversarial"):
        mix.part = part
        mix(z[part])
        expected[part] = 0.75 * expected[part] + 0.25 * z[part].mean((0, 2, 3))
        torch.testing.assert_close(mix.clean.running_mean, expected["clean"])
        torch.testing.assert_close(mix.adversarial.running_mean, expected["adversarial"])
    mix.part = None  # a pass outside of a training step
    mix(z["clean"])
    torch.testing.assert_close(mix.adversarial.running_mean, expected["adversarial"])
    assert not torch.allclose(mix.clean.running_mean, expected["clean"])  # pyright: ignore
    before = copy.deepcopy(mix.state_dict())
    mix.eval().p = torch.rand(8)
    mix(z["clean"])
    assert all(torch.equal(value, before[name]) for name, value in mix.state_dict().items())


@pytest.mark.parametrize("switch", ["soft", "hard"])
def test_each_image_has_its_own_filters_and_mix(switch):
    _, model = defended(switch=switch)
    x = images()
    signals, p = route(model, x)
    assert all((s > 0).all() and (s < 2).all() for s in signals)
    assert (signals[0][0] - signals[0][1]).abs().max() > 0.01
    assert p.min() < 0.45 and p.max() > 0.55, "both batch norms are needed"
    used = p if switch == "soft" else (p > 0.5).float()
    rows = [
        by_hand(model, [s[i] for s in signals], float(used[i]), x[i : i + 1]) for i in range(len(x))
    ]
    torch.testing.assert_close(model(x), torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert (model(x) - torch.cat(rows).roll(1, 0)).abs().max() > 0.01
    alone = torch.cat([model(row) for row in x.split(1)])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_switch():
    """One batch norm at the end: the features are linear in p, so df/dt = (a - c) p (1 - p)."""
    for switch in ("soft", "hard"):
        trunk = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Flatten()
        )
        model = AWNet(switch=switch).apply(
            Classifier(trunk, num_features=32, num_classes=2, input_shape=(1, 8, 8))
        )
        with torch.no_grad():
            shake(model)
        center(model.eval())
        score, x = routed(model).router.score, images()
        ends = []
        for end in (0.0, 1.0):
            routed(model).fixed_p = end
            ends.append(model.features(x).detach())
        routed(model).fixed_p = None
        _, p = route(model, x)
        assert p.min() < 0.5 < p.max()
        features = model.features(x)
        used = (p if switch == "soft" else (p > 0.5).float())[:, None]
        torch.testing.assert_close(features, (1 - used) * ends[0] + used * ends[1])
        gradient = torch.autograd.grad(features.sum(), score.bias)[0]
        slope = ((ends[1] - ends[0]).sum(1) * p * (1 - p)).sum()
        torch.testing.assert_close(gradient, slope[None])


def test_gradients_go_through_the_router():
    _, model = defended()
    x = images(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: model.double().features(x), (x.double(),), eps=1e-5, atol=1e-4
    )


# Training


def forward(defense: AWNet, model: Classifier, x: dict[PartName, Tensor], borrowed=()) -> Step:
    parts = {}
    for name, batch in x.items():
        defense.before_part(model, name)
        features = model.features(batch)
        parts[name] = Part(batch, features, model.head(features))
    y = torch.arange(len(batch)) % 3
    return Step(
        y, parts.get("clean"), parts.get("adversarial"), epoch=0, step=0, borrowed=tuple(borrowed)
    )


def test_the_terms_by_hand():
    defense, model = defended(router_weight=0.3)
    model.train()
    x: dict[PartName, Tensor] = {"adversarial": images().flip(0) * 0.9, "clean": images()}
    fresh = copy.deepcopy(model)
    step = forward(defense, model, x, borrowed=["clean"])
    terms = defense.loss_terms(model, step)
    assert terms.keys() == {"router", "ce_clean"}
    assert step.clean is not None
    torch.testing.assert_close(terms["ce_clean"], F.cross_entropy(step.clean.logits, step.y))
    p = {name: route(fresh, batch)[1] for name, batch in x.items()}
    wanted = -((1 - p["clean"]).log() + p["adversarial"].log()).mean() / 2
    torch.testing.assert_close(terms["router"], 0.3 * wanted)
    score = routed(model).router.score
    assert torch.autograd.grad(terms["router"], score.weight)[0].abs().max() > 0

    step = forward(defense, model, x)
    assert defense.loss_terms(model, step).keys() == {"router"}
    step = forward(defense, model, {"clean": images()})
    alone = defense.loss_terms(model, step)
    assert alone.keys() == {"router"} and alone["router"] > 0


def test_nothing_of_a_step_stays_in_the_model():
    defense, model = defended()
    before = model_sha256(model)
    model.train()
    kept = copy.deepcopy(model.state_dict())
    step = forward(defense, model, {"clean": images(), "adversarial": images()})
    t = routed(model).kept
    assert t.keys() == {"clean", "adversarial"} and all(v.requires_grad for v in t.values())
    defense.loss_terms(model, step)
    assert routed(model).kept == {} and routed(model).part is None
    assert all(norm.part is None and norm.p is None for norm in mixed(model))
    convs = [m for m in model.modules() if isinstance(m, ModulatedConv)]
    assert len(convs) == 3 and all(conv.signal is None for conv in convs)
    model.load_state_dict(kept)
    assert model_sha256(copy.deepcopy(model).eval()) == before
    model(images())  # a pass in training mode outside of a step
    assert routed(model).kept == {}


def test_an_error_inside_the_trunk_leaves_no_signals():
    _, model = defended()
    routed(model).trunk.get_submodule("act4").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images())
    assert all(norm.p is None for norm in mixed(model))


RECIPES = {
    "pgd_at": (PGDAT(threat=THREAT, steps=1), {"ce", "router", "ce_clean"}),
    "trades": (TRADES(threat=THREAT, steps=1), {"ce", "kl", "router"}),
    "standard": (Standard(threat=THREAT), {"ce", "router"}),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains_under_every_recipe(tmp_path, name, precision, bfloat16):
    assert len(RECIPES) == 3
    recipe, terms = RECIPES[name]
    defense, model = AWNet(), AWNet().apply(convnet(num_classes=3, input_shape=[1, 4, 4]).build())
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(epochs=1, batch_size=51, val_steps=1, precision=precision)  # two steps
    fit(tmp_path, trainer, model=model, recipe=recipe, defense=defense)
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {key for key in row if key.startswith("loss_")} == {f"loss_{term}" for term in terms}
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    for key in ("conv2.conv.weight", "norm2.clean.weight", "norm2.clean.running_mean"):
        assert f"trunk.trunk.{key}" in moved
    assert {"trunk.router.signals.weight", "trunk.router.score.weight"} <= moved
    adversarial = {key for key in moved if ".adversarial." in key}
    expected = 0 if name == "standard" else 4 * len(mixed(model)) + len(mixed(model))
    assert len(adversarial) == expected
    other = AWNet().apply(convnet(num_classes=3, input_shape=[1, 4, 4]).build())
    load_weights(other, tmp_path / "last.safetensors")
    x = images(size=4)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_router_learns_to_tell_the_parts_apart():
    torch.manual_seed(0)
    defense, model = defended(shaken=False, router_weight=1.0)
    model.train()
    x: dict[PartName, Tensor] = {"clean": images(16), "adversarial": images(16).round()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = defense.loss_terms(model, forward(defense, model, x))["router"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.5
    p = {name: route(model.eval(), batch)[1].mean() for name, batch in x.items()}
    assert p["adversarial"] > p["clean"] + 0.2


def test_the_router_reads_each_image_by_itself_in_training_too():
    _, model = defended()
    model.train()
    signals, p = route(model, images())
    for i, image in enumerate(images().split(1)):
        alone, p_alone = route(model, image)
        torch.testing.assert_close(p_alone, p[i : i + 1])
        torch.testing.assert_close(alone, [s[i : i + 1] for s in signals])
    torch.testing.assert_close(route(model.eval(), images()), (signals, p))


def test_several_devices_need_an_adversarial_part(monkeypatch):
    defense, model = defended()
    monkeypatch.setattr(awnet, "in_company", lambda: True)
    defense.loss_terms(model, forward(defense, model, {p: images() for p in PARTS}))
    with pytest.raises(UserError, match=r"trainer\.devices=1"):
        defense.loss_terms(model, forward(defense, model, {"clean": images()}))


def test_a_strict_round_trip(tmp_path):
    _, model = defended()
    save_weights(model, tmp_path / "model.safetensors")
    _, other = defended(shaken=False)
    assert not torch.allclose(other(images()), model(images()))
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other(images()), model(images()))
    assert model_sha256(other) == model_sha256(model)


# What an attacker has


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_search_runs_on_a_traced_copy(precision):
    _, model = defended()
    x = images(8)
    clean = Clean(torch.arange(8), x, torch.arange(8) % 3)
    fast = fast_copy(model, FastModelOptions(precision), clean)
    assert isinstance(fast, FastModel) and isinstance(fast.model, torch.fx.GraphModule)
    (logits, gradient), (fast_logits, fast_gradient) = ask(model, clean), ask(fast, clean)
    close = 1e-4 if precision == "32" else 0.1
    torch.testing.assert_close(fast_logits, logits, rtol=close, atol=close)
    assert F.cosine_similarity(fast_gradient.flatten(), gradient.flatten(), dim=0) > 0.98


def test_traits():
    for switch, gradient in (("soft", "exact"), ("hard", "straight_through")):
        defense, model = defended(switch=switch)
        assert defense.traits(model) == Traits(gradient=gradient)  # pyright: ignore
    assert AWNet().parts == ("clean",)


NAMES = {"frozen_router", "p0", "p1", *(f"router{sign}{c}" for sign in "+-" for c in (0.1, 1, 10))}


@pytest.mark.parametrize("switch", ["soft", "hard"])
def test_surrogates_say_what_they_are(switch):
    defense, model = defended(switch=switch)
    before, logits, x = model_sha256(model), model(images()), images()
    found = defense.surrogates(model)
    assert found.keys() == NAMES | ({"soft"} if switch == "hard" else set())
    for name, surrogate in found.items():
        assert not surrogate.model.training and surrogate.why and "\n" not in surrogate.why
        assert surrogate.needs_clean_input == (name == "frozen_router")
        assert surrogate.auxiliary_loss == surrogate.exact == name.startswith("router")
        assert surrogate.loss == "ce"
        shared = {p.data_ptr() for p in surrogate.model.parameters()}
        assert shared == {p.data_ptr() for p in model.parameters()}
        answer = surrogate.model(x, x) if surrogate.needs_clean_input else surrogate.model(x)
        same = torch.equal(answer[0] if surrogate.auxiliary_loss else answer, logits)
        assert same or not surrogate.exact
        copy.deepcopy(surrogate.model)
    assert model_sha256(model) == before and torch.equal(model(x), logits)


def test_the_surrogates_with_a_fixed_p():
    for switch in ("soft", "hard"):
        defense, model = defended(switch=switch)
        x = images()
        signals, _ = route(model, x)
        for name, p in (("p0", 0.0), ("p1", 1.0)):
            rows = [by_hand(model, [s[i] for s in signals], p, x[i : i + 1]) for i in range(len(x))]
            answer = defense.surrogates(model)[name].model(x)
            torch.testing.assert_close(answer, torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_the_soft_surrogate_is_the_soft_net():
    hard, model = defended(switch="hard")
    _, soft = defended(switch="soft")
    answer = hard.surrogates(model)["soft"].model(images())
    assert torch.equal(answer, soft(images()))
    assert not torch.allclose(answer, model(images()))


def test_the_frozen_router_keeps_to_the_clean_images():
    defense, model = defended()
    frozen = defense.surrogates(model)["frozen_router"].model
    clean = images()
    torch.testing.assert_close(frozen(clean, clean), model(clean))
    x = (clean + 0.2 * torch.randn(clean.shape)).clamp(0, 1)
    assert not torch.allclose(frozen(x, clean), model(x), atol=1e-3)
    signals, p = route(model, clean)
    point = x.clone().requires_grad_()
    anchor = clean.clone().requires_grad_()
    rows = [
        by_hand(model, [s[i] for s in signals], float(p[i]), point[i : i + 1])
        for i in range(len(x))
    ]
    answer = frozen(point, anchor)
    torch.testing.assert_close(answer, torch.cat(rows), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(a.square().sum(), point)[0] for a in (torch.cat(rows), answer)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    (at_anchor,) = torch.autograd.grad(frozen(x, anchor).sum(), anchor, allow_unused=True)
    assert at_anchor is None or not at_anchor.any(), "no gradient through the router"


def test_the_bonus_is_c_log_p():
    for switch in ("soft", "hard"):
        defense, model = defended(switch=switch)
        _, p = route(model, images())
        found, seen = defense.surrogates(model), 0
        for sign in (1, -1):
            for c in (0.1, 1, 10):
                point = images().requires_grad_()
                logits, auxiliary_loss = found[f"router{'+' if sign > 0 else '-'}{c}"].model(point)
                torch.testing.assert_close(auxiliary_loss, sign * c * p.log())
                assert torch.equal(logits, model(images()))
                assert torch.autograd.grad(auxiliary_loss.sum(), point)[0].abs().max() > 0
                seen += 1
        assert seen == 6
        with torch.no_grad():
            routed(model).router.score.bias.fill_(-500.0)  # p is zero in float32
        _, auxiliary_loss = found["router-1"].model(images())
        assert auxiliary_loss.isfinite().all() and (auxiliary_loss > 400).all()


# Mistakes


class Louder(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def small(*layers: nn.Module) -> Classifier:
    trunk = nn.Sequential(*layers, nn.Flatten())
    return Classifier(trunk, num_features=1, num_classes=2, input_shape=(1, 8, 8))


def conv3() -> nn.Conv2d:
    return nn.Conv2d(1, 1, 3)


MISTAKES = [
    (lambda: AWNet(switch="hrad"), r"defense\.switch=hrad.*did you mean 'hard'"),
    (lambda: AWNet(router_weight=-1.0), r"defense\.router_weight=-1 "),
    (lambda: AWNet(router_weight=math.nan), r"defense\.router_weight=nan"),
    (lambda: lenet(num_classes=3, input_shape=[1, 16, 16]).build(), "lacks one or the other"),
    (lambda: small(conv3(), conv3()), "take backbone=convnet"),
    (lambda: small(conv3(), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 5)), "take backbone=convnet"),
    (lambda: small(), "take backbone=convnet"),
    (lambda: small(conv3(), conv3(), Louder(1)), "a Louder does more"),
    (lambda: small(conv3(), conv3(), nn.BatchNorm2d(1, track_running_stats=False)), "keep none"),
    (lambda: AWNet().apply(backbone()), "AW-Net already"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            AWNet().apply(make())  # pyright: ignore[reportArgumentType]
    assert len(MISTAKES) == 10


def test_the_shipped_config_writes_out_every_field():
    text = options("defense")["awnet"].read_text()
    node = {str(key): value for key, value in OmegaConf.create(text).items()}
    assert node.pop("_target_") == "advbench.defenses.awnet.AWNet"
    assert node.keys() == {field.name for field in fields(AWNet)}
    assert AWNet(**node) == AWNet(), "the file gives the defaults"
    assert text.startswith("# advbench train defense=awnet") and text.count("# ours") == 2
