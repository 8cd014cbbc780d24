"""FAB against closed forms, linear programs and the authors' implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyautoattack.fab_projections import projection_l1, projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from scipy.optimize import linprog
from torch import Tensor, nn

from advbench.attacks import fab, losses
from advbench.attacks.base import Clean, Oracle
from advbench.attacks.fab import FAB, hyperplane_moves
from advbench.attacks.random import KeyedRandom
from advbench.attacks.threat import NORMS, Threat, norm_of
from advbench.errors import UserError

SHAPE = (3, 4, 4)
THEIRS = {"linf": projection_linf, "l2": projection_l2, "l1": projection_l1}
THEIR_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Log(nn.Module):
    """A model that keeps the images it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)


def linear(classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def curved(classes: int) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, classes))
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(3)
    first, head = model[1], model[-1]
    assert isinstance(first, nn.Linear) and isinstance(head, nn.Linear)
    first.bias.copy_(-first.weight.sum(1) / 2)  # bends in the middle of the pixel range
    head.weight.mul_(torch.linspace(0.3, 1.5, classes)[:, None])  # boundaries of many slopes
    return model


def batch(model: nn.Module, n: int, low: float = 0.0, high: float = 1.0) -> Clean:
    generator = torch.Generator().manual_seed(2)
    x = low + (high - low) * torch.rand(n, *SHAPE, generator=generator)
    with torch.no_grad():
        return Clean(torch.arange(n), x, model(x).argmax(1))


def search(
    attack: FAB, model: nn.Module, clean: Clean, threat: Threat, restart: int = 0
) -> tuple[Tensor, Tensor]:
    """The smallest distance of an error that one search visits, (N,); and its last points."""
    oracle, best = Oracle(model), torch.full((len(clean.y),), torch.inf)
    restarts = torch.full_like(clean.ids, restart)
    random = KeyedRandom(0, "test", clean.ids, restarts)
    rows = attack.start(oracle, clean, threat, random, restarts)
    for _ in range(attack.queries):
        attack.advance(rows, attack.ask(oracle, rows, threat), threat, random)
        assert rows.point.min() >= 0 and rows.point.max() <= 1
        logits = oracle.peek(rows)
        distance = threat.distance(rows.point, rows.x)
        best = torch.where(logits.argmax(1) != rows.y, torch.minimum(best, distance), best)
        attack.settle(rows, logits, threat)
    assert (rows.iteration == attack.steps).all()
    return best, rows.point


def smallest_move(t: Tensor, w: Tensor, gap: float, norm: str) -> float:
    """The norm of the smallest move from ``t`` that changes <w, t> by ``gap`` in [0, 1].

    By linear programs for linf and l1, and by bisection of the dual for l2.
    """
    start, slope, d = t.double().numpy(), w.double().numpy(), len(t)
    if norm == "l2":

        def moved(lam: float) -> np.ndarray:
            return np.clip(start + lam * slope, 0, 1) - start

        low, high = -1e6, 1e6
        for _ in range(200):
            lam = (low + high) / 2
            low, high = (lam, high) if moved(lam) @ slope < gap else (low, lam)
        return float(np.linalg.norm(moved(high)))
    # Moves up and moves down, both non-negative; for linf also a bound on all of them.
    bounds = [(0, 1 - v) for v in start] + [(0, v) for v in start]
    meet = np.concatenate([slope, -slope])[None]
    if norm == "l1":
        found = linprog(np.ones(2 * d), A_eq=meet, b_eq=[gap], bounds=bounds)
    else:
        cost = np.append(np.zeros(2 * d), 1)
        limit = np.concatenate([np.eye(2 * d), -np.ones((2 * d, 1))], 1)
        found = linprog(
            cost, limit, np.zeros(2 * d), np.append(meet, 0)[None], [gap], [*bounds, (0, None)]
        )
    assert found.status == 0
    return float(found.fun)


def hyperplanes(n: int, d: int, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images (2, n, d), many pixels at 0 or 1; normals (n, d), some entries zero or equal; gaps of
    both signs, up to the share ``reach`` of what the box allows (2, n)."""
    generator = torch.Generator().manual_seed(3)
    start = (1.5 * torch.rand(2, n, d, generator=generator) - 0.25).clamp(0, 1)
    normal = torch.randn(n, d, generator=generator)
    normal[::3, ::2] = normal[::3, :1].abs() * normal[::3, ::2].sign()
    normal[1::3, ::4] = 0
    normal *= 10.0 ** torch.linspace(-6, 3, n)[:, None]
    sign = torch.randint(2, (2, n), generator=generator) * 2.0 - 1
    corner = ((normal * sign[..., None]) > 0).float()
    share = reach * torch.rand(2, n, generator=generator)
    return start, normal, share * ((corner - start) * normal).sum(2)


@pytest.mark.parametrize("norm", NORMS)
def test_moves_are_feasible_and_the_smallest(norm: str) -> None:
    start, normal, gap = hyperplanes(30, 9, 0.95)
    moves = hyperplane_moves(start, normal, gap, norm)
    end = start + moves
    assert end.min() >= 0 and end.max() <= 1
    scale = normal.abs().amax(1)
    torch.testing.assert_close((moves * normal).sum(2) / scale, gap / scale, atol=1e-5, rtol=1e-5)
    got = norm_of(moves.flatten(0, 1), norm).view(2, -1)
    for p in range(2):
        for i in range(30):
            expected = smallest_move(
                start[p, i], normal[i] / scale[i], float(gap[p, i] / scale[i]), norm
            )
            assert float(got[p, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [0.05, 0.5, 2.0])
def test_moves_are_as_long_as_the_authors(norm: str, reach: float) -> None:
    start, normal, gap = hyperplanes(40, 500, reach)
    normal = normal / normal.abs().amax(1, keepdim=True) * torch.linspace(0.1, 10, 40)[:, None]
    full = (((normal * gap.sign()[..., None]) > 0).float() - start) * normal
    gap = full.sum(2) * torch.linspace(0.01, reach, 40)
    assert bool((gap.abs() > full.sum(2).abs()).any()) == (reach > 1)
    ours = hyperplane_moves(start, normal, gap, norm)
    for p in range(2):
        b = gap[p] + (normal * start[p]).sum(1)
        theirs = THEIRS[norm](start[p], normal, b)
        torch.testing.assert_close(
            norm_of(ours[p], norm), norm_of(theirs, norm), rtol=1e-3, atol=1e-4
        )
        if norm == "l2":  # unique there
            torch.testing.assert_close(ours[p], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_degenerate_hyperplanes(norm: str) -> None:
    start = torch.tensor([0.2, 0.9, 1.0, 0.0]).expand(1, 7, 4)
    normal = torch.tensor([[1.0, -2.0, 0.5, -1.0]]).repeat(7, 1)
    normal[0] = 0
    normal[5] *= 1e-25
    gap = torch.tensor([[1.0, 0.0, 100.0, -100.0, torch.nan, 1e-26, torch.inf]])
    moves = hyperplane_moves(start, normal, gap, norm)[0]
    assert moves.isfinite().all()
    assert not moves[[0, 1, 4]].any()
    up = torch.tensor([0.8, -0.9, 0.0, 0.0])
    torch.testing.assert_close(moves[2], up)
    torch.testing.assert_close(moves[6], up)
    torch.testing.assert_close(moves[3], torch.tensor([-0.2, 0.1, -1.0, 1.0]))
    closed = (moves[5] * normal[5] * 1e26).sum()
    torch.testing.assert_close(closed, torch.tensor(1.0))


def slow_for_newton(d: int) -> tuple[Tensor, Tensor, Tensor]:
    """An image whose pixels reach the box one by one as lam grows, so that passes add up."""
    normal = 1.6 ** -torch.arange(float(d))[None]
    start = 1 - 1.5 ** -torch.arange(float(d)).flip(0)[None, None]
    return start, normal, 0.98 * (normal * (1 - start)).sum(2)


@pytest.mark.parametrize("norm", NORMS)
def test_moves_do_not_depend_on_the_company(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, normal, gap = hyperplanes(20, 60, 0.9)
    others = slow_for_newton(60)
    start, normal = torch.cat((start, others[0].repeat(2, 1, 1)), 1), torch.cat((normal, others[1]))
    gap = torch.cat((gap, others[2].repeat(2, 1)), 1)
    monkeypatch.setattr(fab, "FIRST_COORDINATES", 8)
    together = hyperplane_moves(start, normal, gap, norm)
    for i in range(21):
        alone = hyperplane_moves(start[:, i : i + 1], normal[i : i + 1], gap[:, i : i + 1], norm)
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(fab, "NEWTON_PASSES", 500)
    assert torch.equal(together, hyperplane_moves(start, normal, gap, norm))
    closed = (together * normal).sum(2)
    torch.testing.assert_close(closed / gap, torch.ones_like(gap), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [True, False])
def test_the_minimum_of_a_linear_model_is_found(norm: str, targeted: bool) -> None:
    model, threat = linear(4), Threat(norm, 0.1)
    clean = batch(model, 8)
    layer = model[-1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        logits = model(clean.x)
    attack = FAB(steps=20, targeted=targeted, targets=3)
    assert attack.starts == (3 if targeted else 1)
    found = torch.stack(
        [search(attack, model, clean, threat, restart)[0] for restart in range(attack.starts)]
    )
    for i, y in enumerate(clean.y.tolist()):
        expected = min(
            smallest_move(
                clean.x[i].flatten(),
                (layer.weight[k] - layer.weight[y]).detach(),
                float(logits[i, y] - logits[i, k]),
                norm,
            )
            for k in range(4)
            if k != y
        )
        assert expected * (1 - 1e-5) <= float(found[:, i].amin()) <= expected * 1.01


CASES = [(norm, targeted) for norm in NORMS for targeted in (True, False)]


def test_every_norm_has_both_kinds() -> None:
    assert len(CASES) == 6


def run_theirs(model: nn.Module, clean: Clean, norm: str, steps: int, rank: int | None) -> Tensor:
    theirs = FABAttack_PT(
        model, norm=THEIR_NAMES[norm], n_iter=steps, eps=1.0, device=torch.device("cpu")
    )
    theirs.target_class = None if rank is None else rank + 2
    return theirs.attack_single_run(clean.x, clean.y, is_targeted=rank is not None)


@pytest.mark.parametrize(("norm", "targeted"), CASES)
def test_the_first_points_are_the_authors(norm: str, targeted: bool) -> None:
    model, rank, steps = curved(5), 1 if targeted else None, 6
    clean = batch(model, 16)
    theirs = Log(model)
    run_theirs(theirs, clean, norm, steps, rank)
    ours = Log(model)
    attack = FAB(steps=steps, targeted=targeted, targets=4)
    search(attack, ours, clean, Threat(norm, 1.0), rank or 0)
    assert len(theirs.seen) == 2 * steps + 1 + targeted
    assert len(ours.seen) == 2 * steps + targeted
    got, expected = (torch.stack(log.seen[-2 * steps :]) for log in (ours, theirs))
    apart = (got - expected).abs().flatten(2).amax(2)
    assert apart[:4].max() < 1e-5
    assert (apart.amax(0) < 1e-5).sum() >= 14, "rounding may lead a row or two astray"


@pytest.mark.parametrize(("norm", "targeted"), CASES)
def test_the_distances_are_the_authors(norm: str, targeted: bool) -> None:
    model, threat = curved(5), Threat(norm, 1.0)
    clean = batch(model, 24)
    attack = FAB(steps=40, targeted=targeted, targets=2)
    for rank in range(attack.starts):
        ours, _ = search(attack, model, clean, threat, rank)
        adversarial = run_theirs(model, clean, norm, 40, rank if targeted else None)
        theirs = threat.distance(adversarial, clean.x)
        assert (theirs > 0).all() and ours.isfinite().all()
        ratio = ours / theirs
        # Rounding decides on which side of a boundary a point lies that was put onto it.
        assert float(((ratio - 1).abs() < 1e-3).float().mean()) > 0.9
        assert float(ratio.max()) < 1.3


@pytest.mark.parametrize("norm", NORMS)
def test_starts_and_targets(norm: str) -> None:
    model, threat = linear(5), Threat(norm, 0.2)
    clean = batch(model, 12, 0.4, 0.6)
    attack = FAB(restarts=2, targets=3)
    assert attack.starts == 6
    assert not attack.stays_inside(threat)
    with torch.no_grad():
        ranking = model(clean.x).argsort(1, descending=True)
    assert torch.equal(ranking[:, 0], clean.y)
    starts = []
    for restart in range(6):
        restarts = torch.full_like(clean.ids, restart)
        random = KeyedRandom(0, "test", clean.ids, restarts)
        rows = attack.start(Oracle(model), clean, threat, random, restarts)
        assert torch.equal(rows.target, ranking[:, 1 + restart // 2])
        assert rows.forwards.tolist() == [1] * 12
        reach = torch.full((12,), 0.1 if restart % 2 else 0.0)
        torch.testing.assert_close(threat.distance(rows.point, clean.x), reach)
        starts.append(rows.point)
    assert not torch.equal(starts[1], starts[3])


def test_a_restart_finds_errors_too() -> None:
    model, threat = curved(3), Threat("l2", 0.5)
    clean = batch(model, 12)
    attack = FAB(steps=30, restarts=2, targeted=False)
    first, _ = search(attack, model, clean, threat, 0)
    second, _ = search(attack, model, clean, threat, 1)
    assert not torch.equal(first, second)
    assert 0.8 < float((second / first).median()) < 1.25


def nearest_by_hand(model: nn.Module, x: Tensor, y: int, dual: float) -> tuple[float, Tensor]:
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
    assert isinstance(jacobian, Tensor)
    logits, slopes = model(x[None])[0], jacobian.flatten(1) - jacobian.flatten(1)[y]
    options = [k for k in range(len(logits)) if k != y]
    k = min(options, key=lambda k: float((logits[k] - logits[y]).abs() / slopes[k].norm(p=dual)))
    return float(logits[k] - logits[y]), slopes[k].view_as(x)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1.0), ("l2", 2.0), ("l1", float("inf"))])
@pytest.mark.parametrize("classes", [2, 6])
def test_the_untargeted_search_asks_for_the_nearest(norm: str, dual: float, classes: int) -> None:
    model, threat = curved(classes), Threat(norm, 0.1)
    clean, oracle = batch(model, 10), Oracle(model)
    attack, zero = FAB(targeted=False), torch.zeros_like(clean.ids)
    rows = attack.start(oracle, clean, threat, KeyedRandom(0, "test", clean.ids, zero), zero)
    answer = attack.ask(oracle, rows, threat)
    assert answer.gradient is not None and answer.usable is not None and answer.usable.all()
    assert torch.equal(answer.logits, model(clean.x))
    assert rows.forwards.tolist() == [1] * 10 and rows.backwards.tolist() == [classes - 1] * 10
    assert (oracle.model.forwards, oracle.model.backwards) == (10, 10 * (classes - 1))
    by_logits = losses.margin(answer.logits, clean.y)
    assert classes == 2 or not torch.equal(answer.loss, by_logits), "distance must matter"
    for i in range(10):
        loss, gradient = nearest_by_hand(model, clean.x[i], int(clean.y[i]), dual)
        assert float(answer.loss[i]) == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(answer.gradient[i], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_two_classes(norm: str) -> None:
    model, threat = curved(2), Threat(norm, 0.1)
    clean = batch(model, 8)
    targeted = FAB(steps=10, targets=1)
    targeted.check(2, threat)
    one, _ = search(targeted, model, clean, threat)
    other, _ = search(replace(targeted, targeted=False), model, clean, threat)
    assert one.isfinite().all()
    torch.testing.assert_close(one, other)


class Deaf(nn.Module):
    """Its gradient is ``gradient`` times the model's, and zero for images darker than 0.5."""

    def __init__(self, model: nn.Module, gradient: float | Tensor = 1.0) -> None:
        super().__init__()
        self.model, self.gradient = model, gradient

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad * self.gradient)
        hears = (x.flatten(1).mean(1) > 0.5).to(x.dtype)[:, None]
        return self.model(x) * hears + torch.tensor([0.5, 0.0, 0.0]) * (1 - hears)


@pytest.mark.parametrize(("norm", "targeted"), CASES)
def test_rows_without_a_gradient_stay(norm: str, targeted: bool) -> None:
    model, threat = Deaf(curved(3)), Threat(norm, 0.1)
    bright, dark = batch(model, 6, 0.4, 0.9), batch(model, 6, 0.1, 0.6)
    clean = Clean(torch.arange(12), torch.cat((bright.x, dark.x)), torch.cat((bright.y, dark.y)))
    attack = FAB(steps=10, targeted=targeted, targets=2)
    best, point = search(attack, model, clean, threat)
    assert point.isfinite().all()
    assert torch.equal(point[6:], dark.x) and best[6:].isinf().all()
    assert best[:6].isfinite().all()


@pytest.mark.parametrize("targeted", [True, False])
def test_unusable_gradients_are_told(targeted: bool) -> None:
    model, threat = Deaf(curved(3), torch.nan), Threat("l2", 0.1)
    clean, zero = batch(model, 4, 0.4, 0.9), torch.zeros(4, dtype=torch.int64)
    attack, oracle = FAB(targeted=targeted, targets=2), Oracle(model)
    rows = attack.start(oracle, clean, threat, KeyedRandom(0, "test", clean.ids, zero), zero)
    answer = attack.ask(oracle, rows, threat)
    assert answer.usable is not None and not answer.usable.any()
    assert answer.gradient is not None and not answer.gradient.any()
    attack.advance(rows, answer, threat, KeyedRandom(0, "test", clean.ids, zero))
    assert torch.equal(rows.point, clean.x)


@pytest.mark.parametrize("targeted", [True, False])
def test_single_pixels_without_a_gradient_stay(targeted: bool) -> None:
    factor = torch.ones(SHAPE)
    factor[1, 2, 3] = torch.nan
    clean = batch(curved(3), 4, 0.4, 0.9)
    zero = torch.zeros_like(clean.ids)
    attack, threat = FAB(targeted=targeted, targets=2), Threat("linf", 0.1)
    rows = []
    for model in (Deaf(curved(3)), Deaf(curved(3), factor)):
        random, oracle = KeyedRandom(0, "test", clean.ids, zero), Oracle(model)
        rows.append(attack.start(oracle, clean, threat, random, zero))
        attack.advance(rows[-1], attack.ask(oracle, rows[-1], threat), threat, random)
    whole, some = ((row.point - clean.x).flatten(1) for row in rows)
    still = ~factor.flatten().isfinite()
    assert whole[:, still].all() and not some[:, still].any()
    assert torch.equal(whole[:, ~still].sign(), some[:, ~still].sign())


@pytest.mark.parametrize(("norm", "targeted"), CASES)
def test_a_row_alone_and_in_a_batch(norm: str, targeted: bool) -> None:
    model, threat = curved(4), Threat(norm, 0.1)
    clean = batch(model, 9)
    attack = FAB(steps=8, restarts=2, targeted=targeted, targets=2)
    best, point = search(attack, model, clean, threat, 1)
    for i in (0, 4, 8):
        alone = Clean(*(field[i : i + 1] for field in clean))
        best_alone, point_alone = search(attack, model, alone, threat, 1)
        torch.testing.assert_close(best_alone[0], best[i], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(point_alone[0], point[i], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FAB(steps=0),
        lambda: FAB(restarts=0),
        lambda: FAB(targets=0),
        lambda: FAB(alpha_max=1.5),
        lambda: FAB(eta=0.9),
        lambda: FAB(beta=0.0),
    ],
)
def test_bad_parameters_are_refused(make: Callable[[], FAB]) -> None:
    with pytest.raises(UserError, match="FAB needs"):
        make()


def test_too_many_targets_are_refused() -> None:
    threat = Threat("linf", 0.1)
    with pytest.raises(UserError, match="9 targets need 10 classes and there are 5"):
        FAB().check(5, threat)
    with pytest.raises(UserError, match="9 targets"):
        FAB().check(9, threat)
    FAB().check(10, threat)
    FAB(targeted=False).check(2, threat)
