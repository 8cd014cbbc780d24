"""A fraction of the batch is adversarial: which rows, and what they are."""

from __future__ import annotations

import pytest
import torch
from problems import LINF, attack_direction, linear, record
from torch import Tensor
from torch.nn import functional as F

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.defenses.base import Part, Step
from advbench.errors import UserError
from advbench.recipes.mixed import Mixed


def problem() -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = linear(torch.randn(2, 6, generator=generator))
    x = 0.3 + 0.4 * torch.rand(10, 1, 1, 6, generator=generator)
    return model, x, torch.arange(10) % 2


def test_the_attack_is_fgsm_unless_told_otherwise():
    model, x, y = problem()
    point = Mixed(threat=LINF).perturb(model, x, y)
    torch.testing.assert_close(point, x + 0.1 * attack_direction(model, y).sign())
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    Mixed(threat=LINF).perturb(model, x, y)
    assert len(calls) == 1
    Mixed(threat=LINF, steps=7).perturb(model, x, y)
    assert len(calls) == 1 + 7
    started = Mixed(threat=LINF, random_start=True, step_size=0).perturb(model, x, y)
    assert (started - x).abs().max() > 0.05


@pytest.mark.parametrize(
    ("fraction", "rows"), [(0.3, 3), (0.6, 6), (1.0, 10), (0.01, 1), (0.26, 3)]
)
def test_the_first_rows_are_adversarial(fraction, rows):
    model, x, y = problem()
    point = x + 0.1 * attack_direction(model, y).sign()
    recipe = Mixed(threat=LINF, fraction=fraction)
    terms = recipe.loss_terms(model, record(model, y, clean=x, adversarial=point))
    batch = torch.cat([point[:rows], x[rows:]])
    torch.testing.assert_close(terms, {"ce": F.cross_entropy(model(batch), y)})


def test_only_what_is_in_the_batch_has_a_gradient():
    clean, adversarial = (torch.randn(10, 3, requires_grad=True) for _ in range(2))
    none, y = torch.zeros(0), torch.arange(10) % 3
    step = Step(y, Part(none, none, clean), Part(none, none, adversarial), 0, 0)
    loss = Mixed(threat=LINF, fraction=0.4).loss_terms(problem()[0], step)["ce"]
    gradients = torch.autograd.grad(loss, [clean, adversarial])
    first = torch.arange(10) < 4
    assert gradients[0].any(1).equal(~first) and gradients[1].any(1).equal(first)


def test_soft_labels_and_smoothing():
    model, x, y = problem()
    targets = torch.rand(10, 2, generator=torch.Generator().manual_seed(1)).softmax(1)
    seen = record(model, y, clean=x, adversarial=x + 0.1)
    step = Step(y, seen.clean, seen.adversarial, 0, 0, targets=targets)
    loss = Mixed(threat=LINF, fraction=0.5, label_smoothing=0.1).loss_terms(model, step)["ce"]
    logits = model(torch.cat([x[:5] + 0.1, x[5:]]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=0.1))


MISTAKES = [
    (lambda: Mixed(), "threat=linf_8"),
    (lambda: Mixed(threat=Threat("l1", 12)), "not defined for l1"),
    (lambda: Mixed(threat=LINF, steps=0), "steps >= 1"),
    (lambda: Mixed(threat=LINF, fraction=0.0), "recipe.fraction=0 "),
    (lambda: Mixed(threat=LINF, fraction=1.1), "recipe.fraction=1.1 "),
    (lambda: Mixed(threat=LINF, fraction=float("nan")), "recipe.fraction=nan"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 6
