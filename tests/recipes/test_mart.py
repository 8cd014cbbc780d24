"""MART by its formula in probabilities, and where probabilities are too small for that."""

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
from advbench.recipes.mart import MART, runner_up
from advbench.recipes.trades import NOISE


def problem(classes: int = 4, rows: int = 8) -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = linear(torch.randn(classes, 6, generator=generator))
    x = 0.3 + 0.4 * torch.rand(rows, 1, 1, 6, generator=generator)
    return model, x, torch.arange(rows) % classes


def by_probabilities(clean: Tensor, adversarial: Tensor, y: Tensor, beta: float) -> dict:
    """The three terms as the paper writes them."""
    p, q = clean.softmax(1), adversarial.softmax(1)
    rows = torch.arange(len(y))
    wrong = q.clone()
    wrong[rows, y] = 0
    kl = (p * (p / q).log()).sum(1)
    return {
        "ce": -q[rows, y].log().mean(),
        "runner_up": -(1 - wrong.amax(1)).log().mean(),
        "kl": beta * (kl * (1 - p[rows, y])).mean(),
    }


def of_logits(clean: Tensor, adversarial: Tensor, y: Tensor, targets: Tensor | None = None) -> Step:
    none = torch.zeros(0)
    return Step(y, Part(none, none, clean), Part(none, none, adversarial), 0, 0, targets=targets)


def test_it_is_the_formula_of_the_paper_and_so_is_its_gradient():
    model, x, y = problem()
    point = x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    terms = MART(threat=LINF, beta=3.0).loss_terms(
        model, record(model, y, clean=x, adversarial=point)
    )
    wanted = by_probabilities(model(x), model(point), y, 3.0)
    assert list(terms) == ["ce", "runner_up", "kl"]
    weight = next(model.head.parameters())
    for name, term in wanted.items():
        torch.testing.assert_close(terms[name], term)
        gradients = [
            torch.autograd.grad(t, weight, retain_graph=True)[0] for t in (terms[name], term)
        ]
        torch.testing.assert_close(*gradients)
        assert gradients[0].abs().max() > 1e-4
    assert MART(threat=LINF).beta == 5.0


def test_the_authors_code_differs_by_its_guards_alone():
    generator = torch.Generator().manual_seed(3)
    clean, adversarial = 2 * torch.randn(2, 64, 10, generator=generator)
    y = torch.arange(64) % 10
    terms = MART(threat=LINF).loss_terms(problem()[0], of_logits(clean, adversarial, y))
    q, p = adversarial.softmax(1), clean.softmax(1)
    top = q.argsort(dim=1)[:, -2:]
    other = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
    theirs = F.cross_entropy(adversarial, y) + F.nll_loss((1.0001 - q + 1e-12).log(), other)
    rows = (p * (p.log() - (q + 1e-12).log())).sum(1)
    theirs = theirs + 5.0 * (rows * (1.0000001 - p[torch.arange(64), y])).mean()
    ours = sum(terms.values(), torch.zeros(()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_a_sure_and_right_answer_at_x_needs_no_stability():
    clean = torch.tensor([[30.0, 0.0, 0.0], [0.0, 30.0, 0.0]])
    adversarial = torch.tensor([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    step = of_logits(clean, adversarial, torch.tensor([0, 0]))
    terms = MART(threat=LINF, beta=2.0).loss_terms(problem()[0], step)
    # Only the second row is wrong at x; there p is class 1 and KL is -log q_1.
    torch.testing.assert_close(terms["kl"], -2 * adversarial.log_softmax(1)[1, 1] / 2)


def test_everything_is_finite_where_probabilities_vanish():
    far = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]])
    cases = 0
    for clean in (far, far.flip(0), torch.zeros(3, 3)):
        for adversarial in (far, far.flip(1), torch.zeros(3, 3)):
            for y in (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0])):
                given = [clean.clone().requires_grad_(), adversarial.clone().requires_grad_()]
                step = of_logits(given[0], given[1], y)
                terms = MART(threat=LINF).loss_terms(problem()[0], step)
                assert all(term.isfinite() for term in terms.values())
                gradients = torch.autograd.grad(sum(terms.values(), torch.zeros(())), given)
                assert all(gradient.isfinite().all() for gradient in gradients)
                cases += 1
    assert cases == 18


def test_the_runner_up_of_a_sure_and_wrong_answer():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = runner_up(logits, F.one_hot(torch.tensor([1]), 3))
    # 1 - p_0 is p_2 = exp(-1e4): float32 has zero for it.
    torch.testing.assert_close(loss, torch.tensor([1e4]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0, -1.0]]))


def test_mixed_images_have_the_classes_outside_as_wrong_ones():
    generator = torch.Generator().manual_seed(2)
    clean, adversarial = torch.randn(2, 6, 4, generator=generator)
    y, other = torch.arange(6) % 4, (torch.arange(6) + 1) % 4
    targets = 0.7 * F.one_hot(y, 4) + 0.3 * F.one_hot(other, 4)
    terms = MART(threat=LINF, beta=1.0).loss_terms(
        problem()[0], of_logits(clean, adversarial, y, targets)
    )
    p, q = clean.softmax(1), adversarial.softmax(1)
    outside = torch.where(targets > 0, 0.0, q).amax(1)
    torch.testing.assert_close(terms["runner_up"], -(1 - outside).log().mean())
    torch.testing.assert_close(terms["ce"], -(targets * q.log()).sum(1).mean())
    kl = (p * (p / q).log()).sum(1) * (1 - (targets * p).sum(1))
    torch.testing.assert_close(terms["kl"], kl.mean())


def test_soft_labels_of_one_class_are_the_class():
    generator = torch.Generator().manual_seed(2)
    clean, adversarial = torch.randn(2, 6, 4, generator=generator)
    y = torch.arange(6) % 4
    hard, soft = (
        MART(threat=LINF).loss_terms(problem()[0], of_logits(clean, adversarial, y, targets))
        for targets in (None, F.one_hot(y, 4).float())
    )
    for name, term in hard.items():
        torch.testing.assert_close(term, soft[name])


def test_no_class_is_wrong_where_both_of_two_are_in_the_image():
    logits = torch.tensor([[2.0, 1.0], [1e4, -1e4]], requires_grad=True)
    loss = runner_up(logits, torch.tensor([[0.6, 0.4], [1.0, 0.0]]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all() and not gradient[0].any()


def test_the_search_raises_the_cross_entropy_from_near_the_image():
    model, x, y = problem(classes=2)
    recipe = MART(threat=LINF)
    assert recipe.parts == ("clean", "adversarial")
    point = recipe.perturb(model, x, y)
    torch.testing.assert_close(point, x + 0.1 * attack_direction(model, y).sign())
    still = MART(threat=LINF, steps=1, step_size=0)
    noise = still.perturb(model, x[:1].expand(500, -1, -1, -1), y[:1].expand(500)) - x[:1]
    assert abs(noise.std() - NOISE) < 1e-4 and noise.mean().abs() < 1e-4


def test_smoothing_is_of_the_cross_entropy_alone():
    model, x, y = problem()
    step = record(model, y, clean=x, adversarial=x + 0.1)
    plain, smooth = (
        MART(threat=LINF, label_smoothing=s).loss_terms(model, step) for s in (0.0, 0.2)
    )
    assert plain["ce"] != smooth["ce"]
    assert plain["runner_up"] == smooth["runner_up"] and plain["kl"] == smooth["kl"]


MISTAKES = [
    (lambda: MART(), "threat=linf_8"),
    (lambda: MART(threat=Threat("l1", 12)), "not defined for l1"),
    (lambda: MART(threat=LINF, steps=0), "steps >= 1"),
    (lambda: MART(threat=LINF, beta=-1.0), "recipe.beta=-1 "),
    (lambda: MART(threat=LINF, beta=float("inf")), "recipe.beta=inf "),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 5
