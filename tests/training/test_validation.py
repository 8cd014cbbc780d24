"""Validation during training, against closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from small import (
    THREAT,
)
from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.base import ArraySplit
from advbench.defenses.base import Traits
from advbench.training import validation
from advbench.training.validation import accuracies, fixed_batches

# Validation


def test_validation_of_a_linear_model_in_closed_form():
    generator = torch.Generator().manual_seed(2)
    x = 0.2 + 0.6 * torch.rand(50, 1, 2, 3, generator=generator)
    weight = torch.randn(6, generator=generator)
    head = nn.Linear(6, 2)
    head.weight.data = torch.stack([weight, -weight]) / 2
    head.bias.data = torch.tensor([-0.5, 0.5]) * (weight.sum() / 2)
    model = Classifier(
        nn.Flatten(), num_features=6, num_classes=2, input_shape=(1, 2, 3), head=head
    )
    margin = (x.flatten(1) - 0.5) @ weight  # of class 0 over class 1
    y = (margin < 0).long()
    y[:5] = 1 - y[:5]
    split = ArraySplit(x, y)
    fabric = Fabric(accelerator="cpu", devices=1)

    def measure(threat: Threat | None, batch_size: int = 16) -> tuple[float, float | None]:
        return accuracies(
            model,
            split,
            threat,
            steps=5,
            seed=0,
            batch_size=batch_size,
            fabric=fabric,
            traits=Traits(),
        )

    survives = (margin.abs() > 0.1 * weight.abs().sum())[5:].sum().item()
    assert 5 < survives < 40
    torch.manual_seed(0)
    assert measure(THREAT) == pytest.approx((45 / 50, survives / 50))
    torch.manual_seed(1)
    assert measure(THREAT, batch_size=7) == measure(THREAT)
    assert measure(None) == (pytest.approx(0.9), None)
    assert not any(p.grad is not None for p in model.parameters())


def test_validation_attacks_the_same_points_whatever_the_batch_and_the_generator():
    class Spy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return super().forward(x)

    x, y = torch.rand(20, 1, 2, 3), torch.arange(20) % 2
    model = Spy(nn.Flatten(), nn.Linear(6, 2))
    fabric = Fabric(accelerator="cpu", devices=1)
    attacked = []
    for seed, batch_size in ((0, 20), (1, 7)):
        calls: list[Tensor] = []
        torch.manual_seed(seed)
        accuracies(
            model,
            ArraySplit(x, y),
            THREAT,
            steps=1,
            seed=0,
            batch_size=batch_size,
            fabric=fabric,
            traits=Traits(),
        )
        clean, _, final = (torch.cat(calls[first::3]) for first in range(3))
        assert torch.equal(clean, x) and not torch.equal(final, x)
        attacked.append(final)
    torch.testing.assert_close(*attacked)


def test_what_is_wrong_from_the_start_is_not_robust():
    class OffGrid(nn.Module):
        """Class 1 exactly on the grey image."""

        def forward(self, x: Tensor) -> Tensor:
            grey = (x.flatten(1) == 0.5).all(1)
            return torch.stack([~grey, grey], 1) + 0 * x.sum()

    split = ArraySplit(torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64))
    fabric = Fabric(accelerator="cpu", devices=1)
    result = accuracies(
        OffGrid(), split, THREAT, steps=1, seed=0, batch_size=4, fabric=fabric, traits=Traits()
    )
    assert result == (0, 0)


@dataclass
class Crew:
    """One of several processes, whose sums are added up by hand."""

    global_rank: int
    world_size: int
    device: str = "cpu"


@pytest.mark.parametrize(("total", "size"), [(23, 8), (16, 8), (5, 8)])
def test_a_batch_dependent_model_is_validated_in_its_fixed_batches(monkeypatch, total, size):
    """As it is judged: whole batches of that size, the same for any number of processes."""
    x = torch.arange(total).float().view(-1, 1, 1, 1) / total
    split = ArraySplit(x, torch.arange(total) % 2)
    met: list[Tensor] = []

    class Odd(nn.Module):
        """Class 1 where a row's place in its batch is odd, and so right in some places."""

        def forward(self, x: Tensor) -> Tensor:
            met.append((x.flatten() * total).round().long())
            odd = torch.arange(len(x)) % 2 == 1
            return torch.stack([~odd, odd], 1).float()

    monkeypatch.setattr(validation, "gather", lambda value, _: value[None])
    found = []
    for ranks in (1, 2, 4):
        met.clear()
        clean = 0.0
        for rank in range(ranks):
            crew: Any = Crew(rank, ranks)
            share, none = accuracies(
                Odd(), split, None, steps=1, seed=ranks, batch_size=3, fabric=crew,
                traits=Traits(batch_dependent=True, batch_size=size),
            )  # fmt: skip
            assert none is None
            clean += share
        found.append((sorted(ids.tolist() for ids in met), clean))
    assert found[1:] == found[:1] * 2
    batches = fixed_batches(total, size)
    order = torch.cat([ids for ids, _ in batches])
    assert found[0][0] == sorted(ids.tolist() for ids, _ in batches)
    assert len(order) == -(-total // size) * size and {len(ids) for ids, _ in batches} == {size}
    assert order[:total].sort().values.tolist() == list(range(total)) != order[:total].tolist()
    assert torch.equal(order[total:], order[:total].repeat(2)[: len(order) - total])
    assert [own for _, own in batches] == [size] * (total // size) + [total % size] * bool(
        total % size
    )
    # Each sample counts once, where it is met first.
    place = torch.arange(len(order)) % size
    right = (order % 2 == place % 2)[:total].sum().item()
    assert found[0][1] == pytest.approx(right / total) and 0 < right < total
