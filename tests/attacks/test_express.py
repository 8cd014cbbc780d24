"""Express: closed-form truths, its order of targets, and logits of any scale."""

from __future__ import annotations

import math

import pytest
import torch
from test_attacks import EPS, batch, best_margins, keyed, largest_margin, linear
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.base import Clean, Oracle
from advbench.attacks.express import Express, ExpressRows
from advbench.attacks.threat import Threat
from advbench.errors import UserError

CASES = [(norm, classes) for norm in EPS for classes in (2, 3, 10, 100)]


@pytest.mark.parametrize(("norm", "classes"), CASES)
def test_it_reaches_the_optimum_of_a_linear_model(norm: str, classes: int) -> None:
    model, threat = linear(classes), Threat(norm, EPS[norm])
    clean = batch(model)
    attack = Express(targets=min(6, classes - 1))
    gained = largest_margin(attack, model, clean, threat)
    optimum = best_margins(model, clean, threat).amax(1)
    assert (gained <= optimum + 1e-5).all()
    torch.testing.assert_close(gained, optimum, atol=1e-3, rtol=0)


def net(classes: int = 10, seed: int = 0) -> nn.Module:
    """Not linear, and so that an attack of some strength breaks some samples."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(),
        nn.Linear(40, classes),
    ).eval()  # fmt: skip


def visited(attack: Express, model: nn.Module, clean: Clean, threat: Threat) -> list[ExpressRows]:
    """Copies of the rows before each query."""
    random, restarts = keyed(clean)
    oracle, seen = Oracle(model), []
    rows = attack.start(oracle, clean, threat, random, restarts)
    for _ in range(attack.queries):
        seen.append(rows.take(torch.arange(len(rows))))
        attack.advance(rows, attack.ask(oracle, rows, threat), threat, random)
    return seen


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_targets_are_the_likeliest_wrong_classes_and_none_comes_twice(classes: int) -> None:
    model, attack = net(classes), Express(steps=4, targets=min(3, classes - 1))
    clean = batch(model)
    seen = visited(attack, model, clean, Threat("linf", 0.02))
    assert len(seen) == attack.queries == 4 * (1 + attack.targets)
    begun = seen[4::4]
    targets = torch.stack([rows.target for rows in begun], 1)
    assert all(len(set(row)) == len(row) for row in targets.tolist())
    assert (targets != clean.y[:, None]).all()
    first = begun[0].logits_best.scatter(1, clean.y[:, None], -torch.inf).argmax(1)
    assert torch.equal(begun[0].target, first)
    with torch.no_grad():  # the best of all points before, the clean one among them
        margins = torch.stack([losses.margin(model(rows.point), clean.y) for rows in seen[:4]])
        own = losses.margin(model(clean.x), clean.y)
    torch.testing.assert_close(begun[0].margin_best, torch.maximum(margins.amax(0), own))


def test_steps_fall_by_a_cosine_and_each_search_starts_anew() -> None:
    model, threat, attack = net(), Threat("linf", 0.1), Express(steps=5, targets=2)
    clean = batch(model)
    seen = visited(attack, model, clean, threat)
    starts = [seen[i].point for i in (0, 5, 10)]
    for point in starts:
        assert torch.allclose((point - clean.x).abs().flatten(1).amax(1), torch.tensor(0.1))
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    rows, gradient = seen[0], torch.full_like(clean.x, -1e-3)
    rows.point = rows.previous = clean.x
    for step in range(5):
        moved = attack._move(rows, torch.full_like(clean.ids, step), gradient, Threat("linf", 0.1))
        size = min(0.1, 0.2 * 0.5 * (1 + math.cos(math.pi * step / 4)))
        weight = 1.0 if step == 0 else 0.75
        assert torch.allclose(clean.x - moved, torch.tensor(weight * size), atol=1e-6), step


def test_an_l1_step_is_sparse_and_moves_only_what_can_move() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.full((4, 1, 10, 10), 0.5)
    gradient = torch.randn(x.shape, generator=generator)
    largest = gradient.flatten(1).abs().sort(dim=1, descending=True).indices
    held = largest[:, :50]  # at the edge, with a gradient that leads out of [0, 1]
    edge = (gradient.flatten(1) > 0).to(x.dtype).gather(1, held)
    x = x.flatten(1).scatter(1, held, edge).view_as(x)
    clean = Clean(x=x, y=torch.zeros(4, dtype=torch.long), ids=torch.arange(4))
    threat, model = Threat("l1", 2.5), nn.Sequential(nn.Flatten(), nn.Linear(100, 3))
    rows = Express().start(Oracle(model), clean, threat, *keyed(clean))
    rows.point = rows.previous = x
    for step, touched in ((0, 10), (10, 4), (19, 1)):
        moved = Express()._move(rows, torch.full_like(clean.ids, step), gradient, threat) - x
        share = 0.5 * (1 + math.cos(math.pi * step / 19))
        assert int(4 * 2.5 * share) == (touched if step < 19 else 0)
        for change, slope, order in zip(moved, gradient, largest, strict=True):
            change, slope = change.flatten(), slope.flatten()
            if step == 19:
                assert not change.any()  # the size is 0
                continue
            chosen = order[50 : 50 + touched]
            assert sorted(change.nonzero().flatten().tolist()) == sorted(chosen.tolist())
            assert torch.equal(change[chosen].sign(), slope[chosen].sign())
            assert float(change.abs().sum()) == pytest.approx(
                min(5 * share, 2.5, 0.5 * touched), abs=1e-5
            )


class Scaled(nn.Module):
    """Logits times a factor, plus a constant."""

    def __init__(self, model: nn.Module, factor: float, shift: float) -> None:
        super().__init__()
        self.model, self.factor, self.shift = model, factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.factor + self.shift


def broken(model: nn.Module, threat: Threat) -> Tensor:
    """The samples that Express breaks, (N,) bool."""
    clean = batch(net(), 300)
    return largest_margin(Express(), model, clean, threat) > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_scale_and_shift_of_the_logits_do_not_matter(norm: str) -> None:
    threat = Threat(norm, {"linf": 0.08, "l2": 0.4, "l1": 1.2}[norm])
    plain = broken(net(), threat)
    share = float(plain.float().mean())
    assert 0.2 < share < 0.9, share
    for factor, shift in ((10.0, 0.0), (1e3, 0.0), (1e4, 0.0), (1.0, 1e4)):
        other = broken(Scaled(net(), factor, shift), threat)
        # As near as another seed; a shift of 1e4 rounds the logits to 1e-3.
        assert abs(int(other.sum()) - int(plain.sum())) <= 6, (factor, shift)
        assert (other != plain).sum() <= 12, (factor, shift)


def test_the_rescaled_cross_entropy_has_a_gradient_where_the_plain_one_has_none() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(50, 10), torch.zeros(50, dtype=torch.int64)
    logits[:, 0] += 6
    directions = []
    for factor in (0.25, 1.0, 16.0, 2.0**14):
        z = (logits * factor).requires_grad_()
        value = losses.ce_rescaled(z, y)
        assert (value >= 0).all()
        (grad,) = torch.autograd.grad(value.sum(), z)
        directions.append(grad * factor)
    for other in directions[1:]:
        torch.testing.assert_close(other, directions[0])
    z = (logits * 2.0**14).requires_grad_()
    (plain,) = torch.autograd.grad(losses.ce(z, y).sum(), z)
    assert not plain.any() and directions[0].any()


@pytest.mark.parametrize("masked", [-torch.inf, -1e9])
def test_classes_that_a_model_masks_do_no_harm(masked: float) -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, masked], [0.0, 2.0, 1.0, masked]], requires_grad=True)
    value = losses.ce_rescaled(logits, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and grad.isfinite().all() and grad[:, :3].all()


def test_a_rows_search_does_not_depend_on_the_others() -> None:
    model, threat, attack = net(), Threat("linf", 0.02), Express(steps=5)
    clean = batch(model)
    some = torch.tensor([17, 3, 8])
    whole = visited(attack, model, clean, threat)[-1]
    part = visited(attack, model, Clean(*(field[some] for field in clean)), threat)[-1]
    torch.testing.assert_close(part.point, whole.point[some])
    assert torch.equal(part.target, whole.target[some])


def test_wrong_values_are_refused() -> None:
    refused = 0
    for values in ({"steps": 1}, {"targets": 0}):
        with pytest.raises(UserError, match="Express needs"):
            Express(**values)
        refused += 1
    with pytest.raises(UserError, match="3 targets need 4 classes"):
        Express().check(3, Threat("l1", 1.0))
    assert refused == 2
