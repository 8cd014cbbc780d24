"""The copy that a search runs: the same function, or it is not used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from made_up_searches import Parts, changed, evaluation, net, samples
from torch import Tensor, nn

from advbench.attacks.base import Clean
from advbench.attacks.fab import FAB
from advbench.evaluation.cpu_kernels import PackedConv
from advbench.evaluation.engine import Engine
from advbench.evaluation.fast_model import FastModel, FastModelOptions, ask, fast_copy
from advbench.evaluation.job import CLEAN
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.store import Store, read_samples

# --- what is searched, and what is scored -------------------------------------------------------


def test_the_search_copy_is_the_model_folded() -> None:
    model = net()
    clean = samples(model).fetch(torch.arange(8))
    fast = fast_copy(model, FastModelOptions(), clean)
    assert isinstance(fast, FastModel)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    for a, b in zip(ask(model, clean), ask(fast, clean), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters())


class Shy(nn.Module):
    """Hides its gradient in a way that a traced copy would not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.inner(x)
        return hidden + 1e-3 * x.flatten(1)[:, :5]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


class Singleton(nn.Module):
    """Can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot copy a lock")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("make", [Shy, Branching, Singleton])
def test_a_copy_that_is_another_function_is_not_used(make: type[nn.Module]) -> None:
    model = make()
    clean = samples(net()).fetch(torch.arange(8))
    fast = fast_copy(model, FastModelOptions(), clean)
    assert (fast is model) == (make is Singleton)
    for a, b in zip(ask(model, clean), ask(fast, clean), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


class Strict(nn.Module):
    """Has another branch for what is no tensor, which a trace takes and which can't run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits if isinstance(x, Tensor) else logits + torch.zeros(4)


def test_a_trace_that_cannot_run_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = Strict()
    fast_copy(model, FastModelOptions(), samples(model).fetch(torch.arange(8)))
    assert capfd.readouterr() == ("", "")


def test_a_search_in_bf16_is_confirmed_in_float32(whole: Path) -> None:
    case = changed(evaluation(), fast_model=FastModelOptions("bf16"))
    store = Store(None)
    engine = Engine(case.job)
    engine.run(case.plan().stages, store)
    broken = {name: int(store.records(name).broken.sum()) for name in ("apgd", CLEAN)}
    exact = read_samples(whole)
    assert broken[CLEAN] == exact[CLEAN].broken.sum()
    assert abs(broken["apgd"] - int(exact["apgd"].broken.sum())) <= 3
    for name in ("apgd", "apgd-t", "fab-t", "square"):
        records = store.records(name)
        assert (records.margin[records.broken] <= 0).all()
        assert (records.margin[~records.broken] > 0).all()


class Viewing(nn.Module):
    """Takes a view that channels last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(128, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(x.shape[0], -1))


def test_weights_in_bf16_are_not_cast_at_every_pass() -> None:
    class Tied(nn.Module):
        """Uses its weights in other ways than autocast knows."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return x.flatten(1).float() @ self.layer.weight.float().T

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 10))
    clean = Clean(torch.arange(8), torch.rand(8, 1, 8, 8), torch.arange(8))
    fast = fast_copy(plain.eval(), FastModelOptions("bf16"), clean)
    kinds = [str(p.dtype).removeprefix("torch.") for p in fast.parameters()]
    assert kinds == ["bfloat16"] * 2 + ["float32"] * 2 + ["bfloat16"] * 2
    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain(clean.x).float()
    assert torch.equal(fast(clean.x), wanted)
    tied = fast_copy(Tied().eval(), FastModelOptions("bf16"), clean)
    assert {p.dtype for p in tied.parameters()} == {torch.float32}


@pytest.mark.parametrize("traced", [True, False])
def test_a_view_does_not_keep_a_traced_copy_from_channels_last(traced: bool) -> None:
    torch.manual_seed(0)
    model = Viewing()
    if not traced:  # and then the model's own steps are taken, which channels last does not allow
        model.register_forward_hook(lambda *_: None)
    clean = samples(net()).fetch(torch.arange(8))
    fast = fast_copy(model, FastModelOptions("bf16"), clean)
    assert isinstance(fast, FastModel) and fast(clean.x).shape == (8, 5)
    packed = fast_copy(model, FastModelOptions(), clean)
    assert any(isinstance(module, PackedConv) for module in packed.modules()) is traced
    torch.testing.assert_close(packed(clean.x), model(clean.x), rtol=1e-4, atol=1e-5)


def test_a_model_with_hooks_is_not_traced() -> None:
    model = net()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    clean = samples(net()).fetch(torch.arange(8))
    fast = fast_copy(model, FastModelOptions(), clean)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(fast(clean.x), model(clean.x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_search_finds_the_same(tmp_path: Path) -> None:
    # One attack and one size of batch: each is compiled on its own.
    plain = evaluation(Parts(("apgd",)), n=12, batch_size=2)
    found = []
    for mode in (None, "default"):
        case = changed(plain, fast_model=FastModelOptions(compile=mode))
        case.execute(tmp_path / str(mode), case.plan())
        found.append(read_samples(tmp_path / str(mode)))
    assert found[0]["apgd"].broken.any()
    differ = [int((one.broken != found[1][name].broken).sum()) for name, one in found[0].items()]
    assert len(differ) == 2 and sum(differ) <= 1


@dataclass(frozen=True)
class Boundaries(Protocol):
    """Untargeted FAB, with a backward pass per class through one forward pass."""

    name = "boundaries"

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("fab", FAB(steps=2, targeted=False), "a test")]


@pytest.mark.slow
def test_a_compiled_model_has_a_gradient_per_class(tmp_path: Path) -> None:
    found = []
    for mode in (None, "default"):
        case = evaluation(Boundaries(), n=8, batch_size=8)
        case = changed(case, fast_model=FastModelOptions(compile=mode))
        case.execute(tmp_path / str(mode), case.plan())
        found.append(read_samples(tmp_path / str(mode))["fab"])
    assert found[0].backwards.max() == 8, "four wrong classes, two steps"
    assert (found[0].backwards != found[1].backwards).sum() <= 1
