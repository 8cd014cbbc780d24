"""Sparta: its activation by hand, its special cases, and who shares what."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import count_modules
from torch import Tensor, fx, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.backbones.convnet import convnet
from advbench.backbones.lenet import lenet
from advbench.backbones.mobilenet import mobilenet_v2
from advbench.backbones.resnet import resnet18, resnet20, resnet34
from advbench.backbones.wide_resnet import wide_resnet
from advbench.config import build, options, plain, shipped
from advbench.defenses.base import Traits
from advbench.defenses.sparta import (
    ACTIVATIONS,
    SHARES,
    AnchoredGates,
    FilteredReLU,
    Phi,
    Site,
    Sparta,
    SpatialGate,
)
from advbench.errors import UserError
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.base import Recipe
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES
from advbench.runs.fingerprint import model_sha256
from advbench.surgery import count_calls, twin
from advbench.training.checkpoint import save_weights
from advbench.training.step import TrainingStep

THREAT = Threat("linf", 0.1)
SHAPE = [3, 8, 8]
NETS = {"convnet": convnet, "resnet20": resnet20, "mobilenet_v2": mobilenet_v2, "lenet": lenet}
SITES = {"convnet": 4, "resnet20": 19, "mobilenet_v2": 35, "lenet": 4}


def net(name: str = "convnet", **given: Any) -> Classifier:
    torch.manual_seed(0)
    shape = [1, 16, 16] if name == "lenet" else SHAPE
    return NETS[name](**{"num_classes": 3, "input_shape": shape, **given}).build()


def sites(model: nn.Module) -> dict[str, Site]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Site)}


def images(model: Classifier, n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, *model.input_shape, generator=torch.Generator().manual_seed(seed))


def trained(model: Classifier, scale: float = 0.1) -> Classifier:
    """Random phi; each shared one is drawn once."""
    torch.manual_seed(1)
    for phi in (module for module in model.modules() if isinstance(module, Phi)):
        for parameter in phi.parameters():
            parameter.data += scale * torch.randn_like(parameter)
    return model


def same_logits(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-5)


# The activation


def by_hand(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """phi pixel by pixel: sum of the neighbours, each with its tap, and the bias."""
    result = torch.zeros_like(z)
    k, (height, width) = weight.shape[-1] // 2, z.shape[2:]
    for c in range(z.shape[1]):
        own = c % len(bias)  # one for all, or each its own
        for i in range(height):
            for j in range(width):
                total = bias[own].expand(len(z)).clone()
                for di in range(-k, k + 1):
                    for dj in range(-k, k + 1):
                        if 0 <= i + di < height and 0 <= j + dj < width:
                            total += weight[own, 0, k + di, k + dj] * z[:, c, i + di, j + dj]
                result[:, c, i, j] = total
    return result


@pytest.mark.parametrize("channels", [4, 1], ids=["each", "shared"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@torch.no_grad()
def test_the_gate_is_the_sigmoid_of_a_padded_depthwise_convolution(kernel, channels):
    torch.manual_seed(0)
    phi, z = Phi(channels, kernel, 1.0), torch.randn(2, 4, 3, 4)
    assert phi.weight.shape == (channels, 1, kernel, kernel)
    nn.init.normal_(phi.weight)
    nn.init.normal_(phi.bias)
    wanted = by_hand(z, phi.weight, phi.bias)
    torch.testing.assert_close(phi(z), wanted)
    torch.testing.assert_close(
        SpatialGate(phi, vector=False)(z), z / (1 + torch.exp(-wanted)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(FilteredReLU(phi, vector=False)(z), wanted.clamp(min=0))
    torch.testing.assert_close(phi(z.contiguous(memory_format=torch.channels_last)), wanted)


def test_a_kernel_of_one_is_swish():
    z = torch.randn(3, 4, 2, 2, requires_grad=True)
    phi = Phi(4, 1, 1.0)
    b = torch.tensor([0.5, 1.0, 2.0, -3.0])
    phi.weight.data = b.view(4, 1, 1, 1)
    b = b.view(4, 1, 1)
    out = SpatialGate(phi, vector=False)(z)
    torch.testing.assert_close(out, z * torch.sigmoid(b * z))
    s = torch.sigmoid(b * z.detach())
    (slope,) = torch.autograd.grad(out.sum(), z)
    torch.testing.assert_close(slope, s + b * z.detach() * s * (1 - s))


@pytest.mark.parametrize("beta", [10.0, 1e4])
@torch.no_grad()
def test_a_large_beta_is_relu(beta):
    z = torch.linspace(-3, 3, 4001).view(1, 1, 1, -1)
    gap = (SpatialGate(Phi(1, 3, beta), vector=False)(z) - z.relu()).abs()
    assert gap.max() <= 0.27847 / beta
    assert (gap[(beta * z).abs() > 105] == 0).all(), "there float32 knows no difference"
    if beta == 10:
        assert gap.max() > 0.2784 / beta, "the bound is sharp"


@torch.no_grad()
def test_a_vector_is_a_map_of_one_pixel():
    torch.manual_seed(0)
    z, phi = torch.randn(5, 4), Phi(4, 3, 2.0)
    nn.init.normal_(phi.weight)
    nn.init.normal_(phi.bias)
    wanted = z * torch.sigmoid(phi.weight[:, 0, 1, 1] * z + phi.bias)
    torch.testing.assert_close(SpatialGate(phi, vector=True)(z), wanted)


# The net


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NETS)
def test_every_site_is_replaced_and_starts_as_silu(name, share):
    model = Sparta(share=share).apply(net(name)).eval()
    x = images(model)
    calls = count_calls(model, SpatialGate, x)
    assert list(calls.values()) == [1] * SITES[name]
    assert not any(isinstance(module, ACTIVATIONS) for module in model.modules())
    same_logits(model, net(name, activation="silu").eval(), x)
    assert count_calls(Sparta().apply(net(name, activation="silu")), SpatialGate, x) == calls
    assert Sparta().traits(model) == Traits()


@pytest.mark.parametrize("name", NETS)
def test_the_control_starts_as_relu_and_has_as_many_parameters(name):
    model = Sparta(form="relu").apply(net(name)).eval()
    x = images(model)
    assert list(count_calls(model, FilteredReLU, x).values()) == [1] * SITES[name]
    same_logits(model, net(name, activation="relu").eval(), x)
    gated = Sparta().apply(net(name))
    assert [p.shape for p in model.parameters()] == [p.shape for p in gated.parameters()]
    assert Sparta(form="relu").surrogates(model) == {}


def test_a_large_beta_leaves_the_net_as_it_is():
    model = Sparta(beta=1e6).apply(net()).eval()
    same_logits(model, net().eval(), images(model))


@pytest.mark.parametrize(
    ("name", "share", "shapes"),
    [
        ("convnet", "site", [(32, 3), (64, 3), (64, 3), (64, 3)]),
        ("convnet", "stage", [(32, 3), (64, 3)]),
        ("convnet", "net", [(1, 3)]),
        ("resnet20", "stage", [(16, 3), (32, 3), (64, 3)]),
        ("lenet", "site", [(10, 3), (20, 3), (120, 1), (90, 1)]),
        ("lenet", "stage", [(10, 3), (20, 3), (120, 1), (90, 1)]),
        ("lenet", "net", [(1, 3)]),
    ],
)
def test_who_has_a_phi_of_his_own(name, share, shapes):
    plain_net, model = net(name), Sparta(share=share).apply(net(name))
    phis = [module for module in model.modules() if isinstance(module, Phi)]
    assert [phi.weight.shape for phi in phis] == [(c, 1, k, k) for c, k in shapes]
    added = sum(p.numel() for p in model.parameters())
    added -= sum(p.numel() for p in plain_net.parameters())
    assert added == sum(c * (k * k + 1) for c, k in shapes)
    assert count_modules(model, Site) == SITES[name]


@pytest.mark.parametrize("share", SHARES)
def test_copies_share_as_the_model_does(share):
    model = trained(Sparta(share=share).apply(net("resnet20")))
    own = {id(p) for p in model.parameters()}
    other = copy.deepcopy(model)
    assert len(list(other.parameters())) == len(own)
    assert not own & {id(p) for p in other.parameters()}
    assert {id(p) for p in twin(model).parameters()} == own


@pytest.mark.parametrize("share", SHARES)
def test_weights_come_back_from_a_file(tmp_path: Path, share):
    model = trained(Sparta(share=share).apply(net())).eval()
    save_weights(model, tmp_path / "w.safetensors")
    torch.manual_seed(5)
    other = Sparta(share=share).apply(convnet(num_classes=3, input_shape=SHAPE).build()).eval()
    load_weights(other, tmp_path / "w.safetensors")
    assert model_sha256(other) == model_sha256(model)
    assert len(list(other.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("share", SHARES)
def test_torch_fx_traces_it(share):
    for form, name in (("gate", "convnet"), ("relu", "lenet")):
        model = trained(Sparta(share=share, form=form).apply(net(name))).eval()
        x = images(model, 3, seed=1)
        same_logits(fx.symbolic_trace(model), model, x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.act(self.conv(self.act(x))))


class Idle(nn.Sequential):
    """The last module is not called."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.flatten(2)).flatten(1)


MISFITS = [
    (nn.Flatten(), "no ReLU or ReLU6 or SiLU"),
    (Shared(), "'trunk.act' serves 2 calls"),
    (Idle(nn.Flatten(), nn.ReLU(), nn.ReLU()), "does not call 'trunk.2'"),
    (Tokens(), r"'trunk.act' gets \(2, 3, 64\)"),
]


def test_models_that_it_does_not_fit():
    for trunk, message in MISFITS:
        model = Classifier(trunk, num_features=192, num_classes=3, input_shape=SHAPE)
        if isinstance(trunk, Shared):
            trunk.conv = nn.Conv2d(3, 3, 1)
        with pytest.raises(UserError, match=message):
            Sparta().apply(model)
    assert len(MISFITS) == 4


# Training


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "recipe",
    [Standard(), PGDAT(threat=THREAT, steps=2), TRADES(threat=THREAT, steps=2)],
    ids=["standard", "pgd_at", "trades"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["learn", "freeze"])
def test_two_steps(recipe: Recipe, share, freeze):
    defense = Sparta(share=share, freeze=freeze)
    model = trained(defense.apply(net())).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, weight_decay=5e-4)
    step = TrainingStep(model, recipe, defense)
    x, y = images(model, 9), torch.arange(9) % 3
    for number in range(2):
        inputs = {"clean": x}
        if "adversarial" in recipe.parts:
            inputs["adversarial"] = recipe.perturb(model, x, y)
        loss = torch.stack(list(step(inputs, y, 0, number).values())).sum()
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    phis = {name for name in before if ".phi." in name}
    assert len(phis) == 2 * {"site": 4, "stage": 2, "net": 1}[share]
    assert moved == set(before) - (phis if freeze else set())


def test_bf16_autocast():
    model = trained(Sparta(share="net").apply(net())).eval()
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    torch.testing.assert_close(half.float(), model(x), rtol=0.1, atol=0.05)


# Phi of another run


def weights_of(model: Classifier) -> dict[str, Tensor]:
    """What a run's file gives back: each name with a tensor of its own."""
    return {name: value.clone() for name, value in trained(model).state_dict().items()}


def small(make: Any, **given: Any) -> Classifier:
    torch.manual_seed(3)
    return make(num_classes=5, input_shape=[3, 16, 16], **given).build()


@pytest.mark.parametrize(
    ("share", "source", "target"),
    [
        ("net", lambda: net("resnet20"), lambda: small(mobilenet_v2)),
        ("net", lambda: net("convnet"), lambda: small(lenet)),
        ("stage", lambda: small(resnet18), lambda: small(resnet34)),  # the paper's own
        ("stage", lambda: net("resnet20"), lambda: small(wide_resnet, depth=10, width=1)),
        ("site", lambda: net("resnet20"), lambda: small(resnet20)),  # other images and classes
    ],
    ids=["net", "net_to_vectors", "deeper", "other_kind", "same"],
)
def test_adopt_takes_phi_and_nothing_else(share, source, target):
    given = weights_of(Sparta(share=share).apply(source()))
    defense = Sparta(share=share, weights="runs/other", freeze=True)
    model = defense.apply(target())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    defense.adopt(model, given)

    by_width = {len(v): v for k, v in given.items() if k.endswith("phi.weight")}
    seen = 0
    for name, site in sites(model).items():
        weight = by_width[len(site.phi.weight)]
        if share == "site":
            weight = given[f"{name}.phi.weight"]
            torch.testing.assert_close(site.phi.bias, given[f"{name}.phi.bias"], rtol=0, atol=0)
        assert torch.equal(site.phi.weight, weight) and site.phi.weight.abs().sum() > 0
        assert not site.phi.weight.requires_grad and not site.phi.bias.requires_grad
        seen += 1
    assert seen == count_modules(model, Site) > 0
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if ".phi." in k}


STRANGERS = [
    ("site", lambda: net(), "convnet", {}, "has no phi: name a run of defense=sparta"),
    ("net", lambda: Sparta().apply(net()), "convnet", {}, "not trained with defense.share=net"),
    ("stage", lambda: Sparta().apply(net()), "convnet", {}, "with defense.share=stage"),
    ("site", lambda: Sparta(share="net").apply(net()), "convnet", {}, "defense.share=site"),
    ("stage", lambda: Sparta(share="stage").apply(net()), "resnet20", {}, "no phi of width 16: "),
    ("site", lambda: Sparta().apply(net()), "resnet20", {}, "no phi at trunk.act, trunk.stage1.0"),
    (
        "net",
        lambda: Sparta(share="net").apply(net()),
        "resnet20",
        {"kernel": 5},
        "3x3x1 in .*5x5x1",
    ),
    ("site", lambda: Sparta(kernel=1).apply(net()), "convnet", {}, "1x1x32 in .* trunk.act1"),
]


def test_adopt_refuses_what_does_not_fit():
    for share, source, target, given, message in STRANGERS:
        weights = weights_of(source())
        defense = Sparta(share=share, weights="runs/other", **given)
        model = defense.apply(net(target))
        before = model_sha256(model)
        with pytest.raises(UserError, match=message) as caught:
            defense.adopt(model, weights)
        assert "runs/other" in str(caught.value)
        assert model_sha256(model) == before
    assert len(STRANGERS) == 8


# The attacker's view


def test_detached_gates_are_constants_of_the_clean_image():
    trunk = nn.Sequential(nn.ReLU(), nn.Flatten())
    model = Classifier(trunk, num_features=4, num_classes=2, input_shape=(1, 2, 2))
    model = Sparta().apply(model).eval()
    trained(model, scale=1.0)
    site = sites(model)["trunk.0"]
    weight, bias = model.head.parameters()
    clean = images(model, 3)
    x = images(model, 3, seed=7).requires_grad_()
    before = model_sha256(model)
    surrogate = Sparta().surrogates(model)["gate_detached"]
    assert (surrogate.needs_clean_input, surrogate.exact) == (True, False)

    gate = torch.sigmoid(by_hand(clean, site.phi.weight.detach(), site.phi.bias.detach()))
    logits = surrogate.model(x, clean)
    torch.testing.assert_close(logits, F.linear((x * gate).flatten(1), weight, bias))
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
    torch.testing.assert_close(slope, gate * weight[0].view(1, 1, 2, 2))
    (own,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    assert not torch.allclose(own, slope)
    traced = fx.symbolic_trace(surrogate.model)  # it forgets no_grad, not detach
    (slope_traced,) = torch.autograd.grad(traced(x, x)[:, 0].sum(), x)
    gate = torch.sigmoid(by_hand(x.detach(), site.phi.weight.detach(), site.phi.bias.detach()))
    torch.testing.assert_close(slope_traced, gate * weight[0].view(1, 1, 2, 2))
    assert model_sha256(model) == before


def test_detached_gates_leave_nothing_behind():
    model = trained(Sparta(share="stage").apply(net("resnet20"))).eval()
    clean, x = images(model), images(model, seed=1)
    surrogate = Sparta(share="stage").surrogates(model)["gate_detached"].model
    assert isinstance(surrogate, AnchoredGates) and not any(m.training for m in surrogate.modules())
    before = model_sha256(surrogate)
    with torch.no_grad():
        torch.testing.assert_close(surrogate(clean, clean), model(clean))
        first = surrogate(x, clean)
        assert not torch.allclose(first, model(x), atol=1e-4)
        assert torch.equal(surrogate(x, clean), first)
        torch.testing.assert_close(surrogate(x[:2], clean[:2]), first[:2], rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError):
            surrogate(x[..., :4], clean)  # fails on the second pass
        torch.testing.assert_close(surrogate(x, x), model(x))
    assert model_sha256(surrogate) == before
    assert [id(p) for p in surrogate.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(m) for m in surrogate.modules()} & {id(m) for m in model.modules()}


# Configs

MISTAKES = [
    ({"share": "stages"}, "no defense.share 'stages'; did you mean 'stage'"),
    ({"form": "silu"}, "no defense.form 'silu'"),
    ({"kernel": 2}, "defense.kernel=2 is not"),
    ({"kernel": -1}, "defense.kernel=-1 is not"),
    ({"beta": 0.0}, "defense.beta=0 is not"),
    ({"beta": float("inf")}, "defense.beta=inf is not"),
    ({"beta": float("nan")}, "defense.beta=nan is not"),
]


def test_mistakes_are_user_errors():
    for given, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            Sparta(**given)
    assert len(MISTAKES) == 7


def test_shipped_configs_write_out_every_field():
    for name, form in (("sparta", "gate"), ("sparta_relu", "relu")):
        assert name in options("defense")
        node = shipped("defense", name)
        assert set(plain(node)) - {"_target_"} == {field.name for field in fields(Sparta)}
        assert build(node, "defense") == Sparta(form=form)
