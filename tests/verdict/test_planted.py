"""Planted adversarial images are found along an honest gradient, and missed without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import LIARS

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Clean
from advbench.attacks.fab import FAB
from advbench.attacks.pgd import PGD
from advbench.attacks.threat import Threat
from advbench.evaluation.protocol import Stage
from advbench.verdict.planted import CLOSE, INNER, Features, fit, for_two_classes, plant

N, SHAPE = 6, (1, 4, 4)
ATTACK = APGD(steps=10, loss_name="margin")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).eval()


def clean() -> Clean:
    return Clean(torch.arange(N), torch.rand(N, *SHAPE), torch.zeros(N, dtype=torch.int64))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_honest_gradient_finds_what_was_planted(norm: str) -> None:
    threat = Threat(norm, {"linf": 0.1, "l2": 0.3, "l1": 1.0}[norm])
    planted = plant(net(), clean(), threat, ATTACK)
    assert planted.images == planted.separated == planted.reached == N
    assert planted.by_chance < N
    per_image = INNER + 1 + 2 * ATTACK.queries + 1
    assert (planted.forwards, planted.backwards) == (N * per_image, N * ATTACK.queries)


@pytest.mark.parametrize("trick", ["Negated", "Quantised", "Detached"])
def test_a_gradient_that_misleads_does_not(trick: str) -> None:
    planted = plant(LIARS.TRICKS[trick](net()), clean(), Threat("linf", 0.2), ATTACK)
    assert planted.separated >= N - 1 and planted.reached <= 1


def test_features_that_are_the_same_are_counted() -> None:
    planted = plant(LIARS.HardLabels(net()), clean(), Threat("linf", 0.01), ATTACK)
    assert (planted.identical, planted.separated, planted.reached) == (N, 0, 0)


def test_it_is_keyed_by_the_sample() -> None:
    whole, threat = clean(), Threat("linf", 0.1)
    weak, trick = APGD(steps=1, loss_name="margin"), LIARS.Sine(net())
    one, other = (plant(trick, whole, threat, weak, batch_size=size) for size in (4, 1000))
    halves = [
        plant(trick, Clean(*(p[i:j] for p in whole)), threat, weak) for i, j in ((0, 2), (2, N))
    ]
    assert one == other
    assert one.reached == sum(half.reached for half in halves)
    assert one.forwards == sum(half.forwards for half in halves)


def test_the_readout_is_zero_near_the_last_point() -> None:
    h = torch.randn(50, 8, dtype=torch.float64)
    h[-1] *= 4
    readout = fit(h)
    assert readout is not None
    scores = h @ readout.weight + readout.bias
    torch.testing.assert_close(scores[-1].item(), CLOSE)
    torch.testing.assert_close(scores[:-1].max().item(), CLOSE - 1)
    h[-1] = h[:-1].mean(0)
    assert fit(h) is None, "inside of the others"


def test_features_are_what_the_head_sees() -> None:
    class Around(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.net, self.scale = net(), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    x = torch.rand(2, *SHAPE)
    body = net()[:-1]
    torch.testing.assert_close(Features(Around(1.0), x)(x), body(x))
    torch.testing.assert_close(Features(Around(2.0), x)(x), 2 * net()(x))
    torch.testing.assert_close(Features(body, x)(x), body(x))


def test_the_plans_own_search_is_used() -> None:
    def stages(*attacks: object) -> list[Stage]:
        return [Stage(str(i), attack, "") for i, attack in enumerate(attacks)]  # pyright: ignore

    assert for_two_classes(stages(FAB(), APGD(steps=7, targets=3))) == APGD(
        steps=7, loss_name="margin"
    )
    assert for_two_classes(stages(PGD(steps=3, restarts=2))) == PGD(steps=3, loss_name="margin")
    assert for_two_classes(stages(FAB())) == APGD(loss_name="margin")
