import copy

import pytest
import torch
import torch.nn.functional as F
from small import count_modules
from torch import Tensor, nn
from torchvision import models as zoo

from advbench.errors import UserError
from advbench.surgery import (
    check_sites,
    count_calls,
    input_shapes,
    replace_modules,
    split_sites,
)


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """One ReLU for two calls, as in torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        z = self.relu(self.first(x))
        if scale is not None:
            z = z * scale
        return self.relu(self.second(z) + x)


class Functional(nn.Module):
    """Four activations that no module stands for, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.linear(x), inplace=True)
        z = torch.relu(input=z - 0.1)
        z = (self.scale * z - 0.1).relu()
        return F.relu(z - 0.1)


class Listed(nn.Module):
    """A shared module inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.acts = nn.ModuleList([nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = self.acts[0](linear(x))
        return x


class Idle(Shared):
    """A child that is not called: torch.fx would lose its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(6, 6)


class Blind(nn.Module):
    """Function by function, to see that each alone is found."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branching(Shared):
    """A forward that depends on the values of x."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return self.relu(self.relu(x) - 0.1) if x.abs().sum() > 0 else x


class TwoFaced(Shared):
    """A forward that is another one in training."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return super().forward(x) + (1.0 if self.training else 0.0)


class Statement(nn.Module):
    """An activation in place, whose result nobody takes."""

    def forward(self, x: Tensor) -> Tensor:
        z = x - 0.5
        z.relu_()
        return z


# --- replace_modules ---------------------------------------------------------------------------


def test_replaces_every_module_and_names_it(x):
    model = nn.Sequential(net(nn.ReLU()), nn.ReLU(), nn.SiLU())
    seen = []

    def make(old: nn.Module, name: str) -> nn.Module:
        seen.append((type(old), name))
        return nn.Tanh()

    assert replace_modules(model, nn.ReLU, make) == ["0.1", "1"]
    assert seen == [(nn.ReLU, "0.1"), (nn.ReLU, "1")]
    assert (count_modules(model, nn.ReLU), count_modules(model, nn.Tanh)) == (0, 2)
    assert model(x[:, :4]).shape == (5, 3)


def test_replaces_several_kinds_at_once():
    model = net(nn.ReLU(), nn.SiLU(), nn.ReLU6())
    assert len(replace_modules(model, (nn.ReLU, nn.SiLU), lambda old, name: nn.Tanh())) == 2
    assert count_modules(model, nn.ReLU6) == 1


def test_a_new_module_may_wrap_the_old_one(x):
    model = net(nn.ReLU())
    before = model(x)
    assert replace_modules(model, nn.ReLU, lambda old, name: nn.Sequential(old)) == ["1"]
    assert torch.equal(model(x), before)
    assert replace_modules(model, nn.Sequential, lambda old, name: old) == ["1"]


def test_modules_inside_a_replaced_one_are_left_alone():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())))
    assert replace_modules(model, nn.Sequential, lambda old, name: nn.Identity()) == ["0"]


@pytest.mark.parametrize("training", [True, False])
def test_the_new_module_has_the_old_ones_mode(training):
    model = net(nn.ReLU()).train(training)
    model[0].train(not training)
    replace_modules(model, nn.ReLU, lambda old, name: nn.Dropout())
    assert model[1].training is training


def test_nothing_to_replace_is_an_error():
    with pytest.raises(UserError, match="Sequential has no ReLU or SiLU module"):
        replace_modules(net(nn.Tanh()), (nn.ReLU, nn.SiLU), lambda old, name: old)


def test_one_module_under_two_names_is_refused_and_nothing_is_touched():
    relu = nn.ReLU()
    model = net(nn.ReLU(), relu, relu)
    with pytest.raises(UserError, match="'2' and '3' are one ReLU module"):
        replace_modules(model, nn.ReLU, lambda old, name: nn.Tanh())
    assert count_modules(model, nn.Tanh) == 0


# --- counting ----------------------------------------------------------------------------------


def test_calls_are_counted_by_name(x):
    model = net(nn.ReLU(), Shared())
    model[2].add_module("unused", nn.ReLU())
    assert count_calls(model, nn.ReLU, x) == {"1": 1, "2.relu": 2, "2.unused": 0}
    assert count_modules(model, nn.ReLU) == 3


def test_what_modules_are_called_with(x):
    model = nn.Sequential(net(nn.ReLU()), nn.Unflatten(1, (1, 3)), nn.ReLU(), nn.Flatten())
    shapes = {"0.1": (5, 6), "2": (5, 1, 3)}
    assert input_shapes(model.train(), nn.ReLU, x) == shapes
    assert input_shapes(net(Idle()), nn.Linear, x).keys() == {"0", "1.first", "1.second", "2"}
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_counting_leaves_no_trace(x):
    model = net(nn.BatchNorm1d(6), nn.ReLU())
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    count_calls(model, nn.ReLU, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_and_modes_are_put_back_after_an_error():
    model = net(nn.ReLU())
    with pytest.raises(RuntimeError):
        count_calls(model, nn.ReLU, torch.zeros(1, 99))
    assert model.training and model[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_torchvision_shares_its_activations():
    model = zoo.resnet18()
    calls = count_calls(model, nn.ReLU, torch.rand(1, 3, 32, 32))
    assert (count_modules(model, nn.ReLU), sum(calls.values())) == (9, 17)


# --- check_sites -------------------------------------------------------------------------------


def test_honest_sites_pass(x):
    check_sites(net(nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.SiLU()), (nn.ReLU, nn.SiLU), x)


def test_a_shared_module_is_found(x):
    with pytest.raises(UserError, match=r"'1\.relu' serves 2 calls"):
        check_sites(net(Shared()), nn.ReLU, x)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (F.relu, nn.ReLU),
        (lambda x: F.relu(x, inplace=True), nn.ReLU),
        (torch.relu, nn.ReLU),
        (torch.relu_, nn.ReLU),
        (lambda x: x.relu(), nn.ReLU),
        (lambda x: x.relu_(), nn.ReLU),
        (F.relu6, nn.ReLU6),
        (F.silu, nn.SiLU),
    ],
)
def test_a_functional_activation_is_found(function, kind, x):
    model = net(Blind(function))
    with pytest.raises(UserError, match=r"'1' calls (relu|silu)"):
        check_sites(model, kind, x)
    check_sites(model, nn.Tanh, x)


def test_the_activation_modules_own_call_is_no_functional_one(x):
    check_sites(net(nn.ReLU(), nn.ReLU6(), nn.SiLU()), (nn.ReLU, nn.ReLU6, nn.SiLU), x)


# --- split_sites -------------------------------------------------------------------------------


def splittable() -> list[tuple[nn.Module, int]]:
    relu = nn.ReLU()
    return [
        (net(nn.ReLU()), 1),
        (net(Shared()), 2),
        (net(Functional()), 4),
        (net(Listed()), 2),
        (net(relu, nn.Linear(6, 6), relu), 2),
        (net(Shared(), nn.Sequential(Functional(), Shared())), 8),
        (nn.Sequential(nn.Linear(4, 6), net_of_nested()), 4),
    ]


def net_of_nested() -> nn.Module:
    """A module that calls a function itself and holds others that share."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Shared()
            self.last = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.last(self.inner(x)) - 0.1)

    return Outer()


@pytest.mark.parametrize("case", range(len(splittable())))
def test_splitting_keeps_the_function_and_frees_every_call(case, x):
    torch.manual_seed(0)
    model, sites = splittable()[case]
    original = copy.deepcopy(model)
    x.requires_grad_()
    split = split_sites(model, nn.ReLU, x.detach())

    assert split is model
    calls = count_calls(split, nn.ReLU, x)
    assert len(calls) == sites and set(calls.values()) == {1}
    assert split.state_dict().keys() == original.state_dict().keys()
    assert all(m.training for m in split.modules())
    assert torch.equal(split(x), original(x))
    (grad,) = torch.autograd.grad(split(x).square().sum(), x)
    (expected,) = torch.autograd.grad(original(x).square().sum(), x)
    assert torch.equal(grad, expected)

    assert len(replace_modules(copy.deepcopy(split), nn.ReLU, lambda old, name: nn.Tanh())) == sites


def test_the_cases_of_splitting_are_seven():
    assert len(splittable()) == 7


def test_each_call_can_be_replaced_alone(x):
    block = Shared()
    model = net(block)
    split_sites(model, nn.ReLU, x)
    shifts = {"1.relu": 1.0, "1.relu_2": 10.0}

    class Shift(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    assert replace_modules(model, nn.ReLU, lambda old, name: Shift(shifts[name])) == list(shifts)
    z = model[0](x)
    expected = block.second(block.first(z) + 1.0) + z + 10.0
    assert torch.equal(model(x), model[2](expected))


def test_the_models_own_forward_can_be_split():
    x = torch.randn(5, 6)
    model = Shared()
    split = split_sites(model, nn.ReLU, x)
    assert split is not model
    assert count_calls(split, nn.ReLU, x) == {"relu": 1, "relu_2": 1}
    assert torch.equal(split(x), Shared.forward(model, x))


def test_an_argument_with_a_default_stays_at_it():
    x = torch.randn(5, 6)
    split = split_sites(Shared(), nn.ReLU, x)
    with pytest.raises(AssertionError, match="scale"):
        split(x, 2.0)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Branching(), "can't be split"),
        (TwoFaced(), "differs between training and evaluation"),
        (Statement(), "changes what the model computes"),
        (Idle(), r"changes what the model computes or stores \(in 1\)"),
    ],
)
def test_what_cannot_be_split_is_refused(block, reason, x):
    with pytest.raises(UserError, match=reason):
        split_sites(net(block), nn.ReLU, x)


def test_a_block_that_is_called_twice_is_refused(x):
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with pytest.raises(UserError, match=r"'1\.1' serves 2 calls"):
        split_sites(net(block, block), nn.ReLU, x)


def test_tied_parameters_stay_tied(x):
    prelu = nn.PReLU()
    with pytest.raises(UserError, match="serves 2 calls"):
        split_sites(net(prelu, nn.Linear(6, 6), prelu), nn.PReLU, x)


def test_modes_survive_splitting(x):
    model = net(Shared())
    model[1].eval()
    split_sites(model, nn.ReLU, x)
    assert model.training and not any(module.training for module in model[1].modules())
