"""The public names, and ``attack`` on a linear model, whose smallest perturbation is known."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module, resources

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advbench
from advbench.attacks import APGD, PGD, Attack
from advbench.evaluation import PGDProtocol

PACKAGES = ["attacks", "backbones", "data", "defenses", "evaluation", "recipes", "runs"]


class Linear(nn.Module):
    """Two classes of 2x2 images: class 1 where the mean is above a half.

    In linf an image breaks within |mean - 1/2|, and not before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        logit = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-logit, logit], 1)


def images() -> tuple[Tensor, Tensor]:
    """Means 0.3 to 0.7 in even steps, with their true classes; the last label is wrong."""
    means = torch.linspace(0.3, 0.7, 8)
    y = (means > 0.5).long()
    y[-1] = 0
    return means.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), y


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "apgd", "square", APGD(steps=5), PGD(steps=3)])
def test_an_attack_changes_what_can_be_broken_and_nothing_else(attack: Attack | str) -> None:
    model, threat = Linear().eval(), advbench.Threat("linf", 0.1)
    x, y = images()
    found = advbench.attack(model, x, y, threat, attack)
    assert found.shape == x.shape and found.dtype == torch.float32 and found.device == x.device
    assert found.min() >= 0 and found.max() <= 1 and threat.contains(found, x).all()
    near = (x.flatten(1).mean(1) - 0.5).abs() < 0.1
    right = model(x).argmax(1) == y
    assert near.any() and (right & ~near).any() and (~right).any()
    changed = (found != x).flatten(1).any(1)
    assert torch.equal(changed, near & right), "neither what withstands nor what is wrong already"
    assert torch.equal(model(found).argmax(1) == y, right & ~near)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_attack_takes_uint8_and_names_and_repeats() -> None:
    x, y = images()
    pixels = (255 * x).round().to(torch.uint8)
    once, again = (advbench.attack(Linear().eval(), pixels, y, "linf_8") for _ in range(2))
    assert torch.equal(once, again) and once.dtype == torch.float32
    assert (once - pixels / 255).abs().max() <= 8 / 255 + 1e-6
    assert (once != pixels / 255).any()


def test_what_does_not_fit_is_one_line() -> None:
    x, y = images()
    with pytest.raises(advbench.UserError, match="training mode"):
        advbench.attack(nn.Sequential(Linear(), nn.Dropout()), x, y, "linf_8")
    with pytest.raises(advbench.UserError, match="did you mean 'apgd'"):
        advbench.attack(Linear().eval(), x, y, "linf_8", "agpd")
    with pytest.raises(advbench.UserError, match="give folder=DIR"):
        advbench.evaluate(Linear().eval(), x, y, threat="linf_8", adversarial=True)


def test_an_evaluation_keeps_its_images(tmp_path) -> None:
    x, y = images()
    threat, protocol = advbench.Threat("linf", 0.1), PGDProtocol(steps=3)
    results = advbench.evaluate(
        Linear().eval(), x, np.asarray(y), threat=threat, protocol=protocol, adversarial=True,
        folder=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "adversarial.safetensors").is_file()
    assert results.robust.acc < results.clean.acc < 1


def test_every_public_name_is_there() -> None:
    names = 0
    for module in (advbench, *(import_module(f"advbench.{package}") for package in PACKAGES)):
        assert module.__all__ == sorted(module.__all__, key=_as_ruff), module.__name__
        for name in module.__all__:
            value = getattr(module, name)
            assert name == "PartName" or (value.__name__ == name and value.__doc__), name
            names += 1
    assert names > 60 and set(advbench.__all__) <= set(dir(advbench))
    with pytest.raises(AttributeError, match="no attribute 'atack'"):
        _ = advbench.atack  # pyright: ignore[reportAttributeAccessIssue]


def _as_ruff(name: str) -> tuple[int, str]:
    """Constants before classes before functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_types_are_declared_and_torch_is_loaded_on_use() -> None:
    assert (resources.files("advbench") / "py.typed").is_file()
    script = "import sys, advbench; advbench.UserError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
