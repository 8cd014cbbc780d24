"""Forward passes with packed convolutions: the same numbers, and really packed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from advbench.attacks.base import Clean
from advbench.backbones.convnet import convnet
from advbench.backbones.mobilenet import mobilenet_v2
from advbench.backbones.preact_resnet import preact_resnet18
from advbench.backbones.resnet import resnet20, resnet50
from advbench.evaluation.cpu_kernels import (
    FEW,
    FilledLinear,
    PackedConv,
    PackedLinear,
    indifferent,
    packed,
)
from advbench.evaluation.fast_model import FastModel, FastModelOptions, ask, fast_copy

CASES = {  # convolutions; sums and ReLUs that they take in
    "convnet": (convnet, 4, 0, 4),
    "resnet20": (resnet20, 19, 9, 19),
    "resnet50": (resnet50, 53, 16, 49),
    "preact_resnet18": (preact_resnet18, 20, 8, 8),
    "mobilenet_v2": (mobilenet_v2, 52, 10, 0),
}


def images(n: int = 3, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """How far each row is off, as a share of its norm: (N,)."""
    gap = (found.double() - truth).flatten(1).norm(dim=1)
    return gap / truth.flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", CASES)
def test_backbones_are_packed_and_unchanged(name: str) -> None:
    factory, convolutions, sums, relus = CASES[name]
    torch.manual_seed(0)
    backbone = factory(num_classes=5, input_shape=[3, 16, 16], mean=[0.4] * 3, std=[0.3] * 3)
    model = backbone.build().eval()
    clean = Clean(torch.arange(8), images(8), torch.arange(8) % 5)
    fast = fast_copy(model, FastModelOptions(), clean)
    assert isinstance(fast, FastModel) and isinstance(fast.model, fx.GraphModule)
    own = [module for module in fast.model.modules() if isinstance(module, PackedConv)]
    calls = [len(node.args) for node in fast.model.graph.nodes if "packed" in str(node.target)]
    assert len(own) == convolutions and calls.count(2) == sums
    assert sum(conv.relu for conv in own) == relus

    logits, gradient = ask(copy.deepcopy(model).double(), clean._replace(x=clean.x.double()))
    logits_fast, gradient_fast = ask(fast, clean)
    with torch.no_grad():
        for found in (logits_fast, fast(clean.x), fast(clean.x[:1])):
            assert errors(found, logits[: len(found)].double()).max() < 1e-4
    # Rounding moves a ReLU's input across zero now and then, which shows in that row's gradient.
    gaps = errors(gradient_fast, gradient).sort().values
    assert gaps[3] < 1e-4 and gaps[-1] < 0.1


class Shared(nn.Module):
    """What may not be taken in: sums of other shapes, a value with two users, odd paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding="same")
        self.c = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.d = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = torch.relu(self.b(torch.relu(a)) + a)
        c = torch.nn.functional.relu(self.c(b))
        wide = self.d(c) + c  # (N, 1, H, W) and (N, 4, H, W)
        return (wide + 1.0).flatten(1)


def test_what_does_not_fit_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Shared().eval().requires_grad_(False)
    x = images(size=6)
    quick = packed(fx.symbolic_trace(model), x)
    own = [module for module in quick.modules() if isinstance(module, PackedConv)]
    assert [conv.relu for conv in own] == [False, False]  # a and d, without what follows
    with torch.no_grad():
        torch.testing.assert_close(quick(x), model(x))
    slopes = []
    for net in (quick, model):
        point = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(net(point).square().sum(), point)[0])
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("how", "turned"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": (1, 3), "padding": (0, 2)}, True),
        ({"kernel_size": 5, "padding": 1, "dilation": 2}, True),
        ({"kernel_size": 1, "padding": 1}, False),  # it would cut the image
        ({"kernel_size": 3, "padding": 1, "stride": (1, 2)}, False),
        ({"kernel_size": 4, "padding": 1, "stride": 2, "in_channels": 1}, True),
        ({"kernel_size": (3, 2), "padding": (2, 0), "stride": 2, "in_channels": 1}, True),
        ({"kernel_size": 7, "padding": 3, "stride": 2, "in_channels": 1}, True),
        ({"kernel_size": 2, "stride": 3, "in_channels": 1, "out_channels": 9}, True),
        ({"kernel_size": 4, "padding": 1, "stride": 2}, False),  # 16 channels from 6: dearer
        ({"kernel_size": 3, "padding": 2, "groups": 2}, False),
    ],
)
def test_gradients_of_all_kinds_of_convolutions(how: dict, turned: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, **how}).requires_grad_(False)
    x = torch.randn(3, conv.in_channels, 11, 9)
    quick = packed(fx.symbolic_trace(nn.Sequential(conv)), x)
    (own,) = (module for module in quick.modules() if isinstance(module, PackedConv))
    assert (own.turned is not None) is turned
    slopes = []
    for net in (quick, conv):
        point = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(net(point).square().sum(), point)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


class Counting(nn.Linear):
    """Rounds by the number of rows, always or only where they are few, and by nothing else."""

    always = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        out = (x[..., None, :] * self.weight).sum(-1) + self.bias
        return out * (1 + 1e-6 * rows * (self.always or rows < FEW))


@pytest.mark.parametrize("always", [False, True])
def test_rows_of_a_linear_layer_do_not_depend_on_their_number(always: bool) -> None:
    torch.manual_seed(0)
    layer = Counting(12, 7).requires_grad_(False)
    layer.always = always
    form = indifferent(layer)
    assert isinstance(form, PackedLinear if always else FilledLinear)
    x = torch.randn(40, 12)
    whole = form(x)
    for shape in ((1,), (2,), (7,), (FEW,), (40,), (3, 4)):
        rows = torch.Size(shape).numel()
        some = x[:rows].reshape(*shape, 12).requires_grad_()
        out = form(some)
        assert out.shape == (*shape, 7)
        assert always or torch.equal(out.reshape(rows, 7), whole[:rows])
        torch.testing.assert_close(out.reshape(rows, 7), whole[:rows])
        (slope,) = torch.autograd.grad(out.sum(), some)
        torch.testing.assert_close(slope, layer.weight.sum(0).expand(*shape, 12))
    torch.testing.assert_close(whole, nn.functional.linear(x, layer.weight, layer.bias))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) if x.sum() > 0 else x.flatten(1) + 1)


def test_linear_layers_of_untraced_models_too() -> None:
    clean = Clean(torch.arange(3), images(size=2), torch.arange(3))
    model = Untraceable().eval()
    fast = fast_copy(model, FastModelOptions(), clean)
    assert isinstance(fast, FastModel) and not isinstance(fast.model.head, nn.Linear)
    assert isinstance(model.head, nn.Linear)
    torch.testing.assert_close(fast(clean.x), model(clean.x))
    model.register_forward_hook(lambda *_: None)
    fast = fast_copy(model, FastModelOptions(), clean)
    assert isinstance(fast, FastModel) and isinstance(fast.model.head, nn.Linear)
