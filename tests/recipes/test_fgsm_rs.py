"""Fast adversarial training against linear models, whose gradient is the same everywhere."""

from __future__ import annotations

import pytest
import torch
from problems import L2, LINF, attack_direction, linear, record
from torch.nn import functional as F

from advbench.attacks.threat import Threat
from advbench.errors import UserError
from advbench.recipes.fgsm_rs import FGSMRS

MANY = 2000


def problem(rows: int = MANY):
    generator = torch.Generator().manual_seed(0)
    model = linear(torch.randn(2, 6, generator=generator))
    x = 0.3 + 0.4 * torch.rand(rows, 1, 1, 6, generator=generator)
    return model, x, torch.arange(rows) % 2


def test_one_step_of_five_quarters_from_a_uniform_start():
    model, x, y = problem()
    torch.manual_seed(0)
    point = FGSMRS(threat=LINF).perturb(model, x, y)
    torch.manual_seed(0)
    start = 0.1 * (2 * torch.rand_like(x) - 1)
    sign = attack_direction(model, y).sign()
    torch.testing.assert_close(point, x + (start + 0.125 * sign).clamp(-0.1, 0.1))
    # A start is uniform in [-eps, eps]; from 5/8 of it the step reaches the surface.
    gained = (point - x) * sign / 0.1
    assert gained.min() > 0.25 - 1e-4
    assert abs(float((gained > 1 - 1e-4).float().mean()) - 5 / 8) < 0.02


def test_one_step_in_l2():
    model, x, y = problem()
    torch.manual_seed(0)
    point = FGSMRS(threat=Threat("l2", 0.2)).perturb(model, x, y)
    direction = attack_direction(model, y)
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    radius = 0.2 * torch.rand(len(x), 1, 1, 1)
    noise = torch.randn_like(x)
    start = radius * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = start + 0.25 * unit
    length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(point, x + moved * (0.2 / length).clamp(max=1))
    assert ((point - x) * unit).flatten(1).sum(1).min() > 0.049, "0.25 less 0.2 at worst"


@pytest.mark.parametrize(("size", "expected"), [("2/255", 2 / 255), (0.01, 0.01), (0, 0.0)])
def test_the_step_can_be_given(size, expected):
    model, x, y = problem(50)
    torch.manual_seed(0)
    start = FGSMRS(threat=Threat("linf", 0.1), step_size=0).perturb(model, x, y)
    torch.manual_seed(0)
    point = FGSMRS(threat=Threat("linf", 0.1), step_size=size).perturb(model, x, y)
    inside = (start - x).abs() < 0.1 - expected
    assert inside.float().mean() > 0.8
    moved = (point - start).abs()[inside]
    torch.testing.assert_close(moved, torch.full_like(moved, expected))


def test_the_loss_is_that_of_the_adversarial_part():
    model, x, y = problem(8)
    recipe = FGSMRS(threat=LINF, label_smoothing=0.1)
    assert recipe.parts == ("adversarial",)
    terms = recipe.loss_terms(model, record(model, y, adversarial=x))
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(model(x), y, label_smoothing=0.1))


MISTAKES = [
    (lambda: FGSMRS(), "threat=linf_8"),
    (lambda: FGSMRS(threat=Threat("l1", 12)), "not defined for l1"),
    (lambda: FGSMRS(threat=L2, step_size="far"), "step_size='far'"),
    (lambda: FGSMRS(threat=L2, step_size=-1.0), "step_size=-1"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 4
