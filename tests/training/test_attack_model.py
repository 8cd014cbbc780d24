"""What makes the attack of a training fast, and that it changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from small import THREAT, fit, net, state
from torch import Tensor, nn

from advbench.attacks.pgd import PGD
from advbench.backbones.base import Classifier
from advbench.backbones.convnet import convnet
from advbench.backbones.preact_resnet import preact_resnet18
from advbench.backbones.resnet import resnet20
from advbench.defenses.base import Step
from advbench.defenses.mfdv_snn import MFDVSNN
from advbench.progress import NullProgress
from advbench.recipes.base import frozen
from advbench.recipes.pgd_at import PGDAT
from advbench.training import compilation, learner
from advbench.training.attack_model import AttackModel, attack_model
from advbench.training.syncnorm import synchronise
from advbench.training.trainer import Trainer

SIZE = {"num_classes": 4, "input_shape": [3, 8, 8], "mean": [0.4], "std": [0.3]}
FOLDS = [(convnet, 4), (resnet20, 19), (preact_resnet18, 8)]


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 4


def used(model: nn.Module) -> None:
    """Statistics and weights of batch norm as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # pyright: ignore[reportArgumentType]
            nn.init.uniform_(module.running_var, 0.5, 2)  # pyright: ignore[reportArgumentType]


def answers(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    with frozen(model):
        logits = model(point)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), point)[0]


@pytest.mark.parametrize(("backbone", "folds"), FOLDS)
@pytest.mark.parametrize("synced", [False, True])
def test_a_folded_copy_is_the_model_of_now(backbone, folds, synced):
    assert len(FOLDS) == 3
    torch.manual_seed(0)
    model = backbone(**SIZE).build().double()
    if synced:
        synchronise(model)
    x = images()[0].double()
    copy = AttackModel(model)
    assert len(copy._pairs) == folds
    names = list(model.state_dict())
    for seed in (1, 2):  # the weights move between two steps
        torch.manual_seed(seed)
        used(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        copy.refresh()
        for ours, theirs in zip(answers(copy, x), answers(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert list(model.state_dict()) == names
    assert not any(pair.both.weight.requires_grad for pair in copy._pairs)
    copy.train()
    torch.testing.assert_close(copy(x), model(x), rtol=0, atol=0)
    assert copy.head is model.head and copy.num_classes == 4


def test_what_cannot_be_folded_or_disagrees_is_left_alone():
    x, y = images()
    assert attack_model(convnet(**SIZE).build(), x, y) is not None
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    assert attack_model(plain, x, y) is None
    hooked = convnet(**SIZE).build()
    for module in hooked.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: None)
    assert attack_model(hooked, x, y) is None
    model = convnet(**SIZE).build()
    copy = AttackModel(model)
    assert copy.agrees(x, y)
    copy._pairs[0] = copy._pairs[0]._replace(norm=nn.BatchNorm2d(32))  # a wrong fold
    used(model)
    assert not copy.agrees(x, y)


def test_finding_out_whether_a_copy_agrees_draws_nothing():
    x, y = images()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = MFDVSNN().apply(convnet(**SIZE).build())
    assert attack_model(model, x, y) is not None, "its noise is drawn by its own module in both"
    assert not torch.equal(before, torch.get_rng_state()), "the net's weights were drawn"
    torch.manual_seed(5)
    attack_model(model, x, y)
    assert torch.equal(before, torch.get_rng_state())


def test_the_attack_of_a_training_asks_the_copy_for_input_gradients_alone(tmp_path, monkeypatch):
    """And takes as many passes as PGD has steps: the last iterate is not forwarded again."""
    model, passes, asked = net(), [], []

    def head(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if not module.training and torch.is_grad_enabled():
            asked.append(any(p.requires_grad for p in model.parameters()))

    class Counting(PGDAT):
        def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(model, AttackModel)
            before, gradients = len(asked), [p.grad for p in model.parameters()]
            point = super().perturb(model, x, y)
            passes.append(len(asked) - before)
            after = [p.grad for p in model.parameters()]
            assert all(a is b for a, b in zip(gradients, after, strict=True))
            return point

        def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
            assert isinstance(model, Classifier)
            return super().loss_terms(model, step)

    model.head.register_forward_pre_hook(head)
    fit(
        tmp_path,
        Trainer(epochs=1, batch_size=16, val_steps=1),
        model=model,
        recipe=Counting(threat=THREAT, steps=3),
    )
    assert passes == [3] * 6 and not any(asked)
    assert PGD(steps=3).queries == 3


def test_training_through_the_copy_ends_where_training_without_does(tmp_path, monkeypatch):
    fit(tmp_path / "with")
    monkeypatch.setattr(learner, "attack_model", lambda *_: None)
    fit(tmp_path / "without")
    one, other = (load_file(tmp_path / f / "last.safetensors") for f in ("with", "without"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


def test_a_compiler_that_fails_is_told_and_done_without(tmp_path, monkeypatch):
    class Notes(NullProgress):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    def fails(*_) -> None:
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr(compilation, "_try", fails)
    notes, model = Notes(), net()
    trainer = Trainer(epochs=1, batch_size=16, val_steps=1, compile="default")
    fit(tmp_path / "a", trainer, model=model, progress=notes)
    assert notes.lines == [
        "trainer.compile=default fails here and training continues without it: "
        "RuntimeError: no C++ compiler"
    ]
    assert model.trunk._compiled_call_impl is None


@pytest.mark.slow
def test_a_compiled_training_is_the_same_up_to_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "attack_model", lambda *_: None)
    runs = {}
    for name, mode in (("eager", None), ("compiled", "default")):
        model = net()
        start = state(model)
        trainer = Trainer(epochs=1, batch_size=16, val_steps=1, compile=mode)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        fit(tmp_path / name, trainer, model=model)
        runs[name] = load_file(tmp_path / name / "last.safetensors")
        assert runs[name].keys() == start.keys(), "no name has changed"
        assert (model.trunk._compiled_call_impl is not None) == (mode is not None)
    for name, value in runs["eager"].items():
        torch.testing.assert_close(value, runs["compiled"][name], rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "compiled" / "summary.json").read_text())["guards"] == {}
