"""Attacks against closed-form truths: linear models, whose best perturbation is known."""

from __future__ import annotations

import pytest
import torch
from cheat import Cheat
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack, Clean, Oracle, craft
from advbench.attacks.pgd import PGD
from advbench.attacks.random import KeyedRandom, TorchRandom, philox
from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat, pixels, project
from advbench.errors import UserError

SHAPE = (3, 4, 4)
EPS = {"linf": 0.03, "l2": 0.1, "l1": 0.15}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


def linear(classes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def last(model: nn.Sequential) -> nn.Linear:
    layer = model[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def batch(model: nn.Module, n: int = 24) -> Clean:
    """Images away from the borders of the box, labelled as the model sees them."""
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    with torch.no_grad():
        return Clean(torch.arange(n), x, model(x).argmax(1))


def best_margins(model: nn.Sequential, clean: Clean, threat: Threat) -> Tensor:
    """The largest value of (logit k - logit y) inside the ball, by duality: (N, K)."""
    weight = last(model).weight.detach()
    with torch.no_grad():
        logits = model(clean.x)
    gap = logits - logits.gather(1, clean.y[:, None])
    slope = weight[None] - weight[clean.y][:, None]
    best = gap + threat.radius * slope.norm(p=DUAL[threat.norm], dim=2)
    return best.scatter(1, clean.y[:, None], -torch.inf)


def keyed(clean: Clean, restart: int = 0, seed: int = 0) -> tuple[KeyedRandom, Tensor]:
    restarts = torch.full_like(clean.ids, restart)
    return KeyedRandom(seed, "test", clean.ids, restarts), restarts


def largest_margin(attack: Attack, model: nn.Module, clean: Clean, threat: Threat) -> Tensor:
    """The largest margin at any point inside the threat that the attack visits, (N,)."""
    oracle, reached = Oracle(model), torch.full((len(clean.y),), -torch.inf)
    for restart in range(attack.starts):
        random, restarts = keyed(clean, restart)
        rows = attack.start(oracle, clean, threat, random, restarts)
        for _ in range(attack.queries):
            attack.advance(rows, attack.ask(oracle, rows, threat), threat, random)
            with torch.no_grad():
                margin = losses.margin(model(rows.point), clean.y)
            inside = threat.contains(rows.point, clean.x)
            reached = torch.where(inside, torch.maximum(reached, margin), reached)
    return reached


CASES = [
    (norm, loss, classes)
    for norm in EPS
    for loss, classes in (
        ("ce", 2),
        ("margin", 2),
        ("margin_targeted", 5),
        ("dlr", 3),
        ("dlr_targeted", 4),
    )
]


def test_every_norm_and_loss_has_a_case() -> None:
    assert len(CASES) == 15
    assert {loss for _, loss, _ in CASES} == set(losses.NAMES)


@pytest.mark.parametrize(("norm", "loss", "classes"), CASES)
def test_apgd_reaches_the_optimum_of_a_linear_model(norm: str, loss: str, classes: int) -> None:
    model, threat = linear(classes), Threat(norm, EPS[norm])
    clean = batch(model)
    attack = APGD(loss_name=loss, targets=classes - 1, large_radius=norm == "l1")
    gained = largest_margin(attack, model, clean, threat)
    optimum = best_margins(model, clean, threat).amax(1)
    assert (gained <= optimum + 1e-5).all()
    if loss.startswith("dlr"):  # a ratio: its maximum need not be the margin's, its sign is
        decided = optimum.abs() > 0.01
        assert decided.any()
        assert torch.equal(gained[decided] > 0, optimum[decided] > 0)
    else:
        torch.testing.assert_close(gained, optimum, atol=2e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm: str) -> None:
    model, threat = linear(2), Threat(norm, EPS[norm])
    clean = batch(model)
    gained = largest_margin(PGD(steps=40, step_size=EPS[norm]), model, clean, threat)
    torch.testing.assert_close(
        gained, best_margins(model, clean, threat).amax(1), atol=1e-4, rtol=0
    )


def test_one_step_without_a_random_start_is_fgsm() -> None:
    model, threat = linear(2), Threat("linf", 0.1)
    clean = batch(model)
    weight = last(model).weight.detach()
    direction = (weight[1 - clean.y] - weight[clean.y]).sign().view_as(clean.x)
    got = craft(PGD(steps=1, random_start=False), model, clean, threat, TorchRandom())
    torch.testing.assert_close(got, (clean.x + 0.1 * direction).clamp(0, 1))


def test_philox_gives_the_known_answers() -> None:
    """The reference vectors that are published with Random123."""
    vectors = [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ]
    for word, expected in vectors:
        counter = torch.tensor([word])
        got = philox((counter, counter, counter, counter), (word, word))
        assert tuple(int(part) for part in got) == expected


def test_draws_belong_to_the_sample() -> None:
    ids = torch.arange(10)
    like, zero = torch.zeros(10, *SHAPE), torch.zeros(10, dtype=torch.int64)
    every = KeyedRandom(3, "stage", ids, zero)
    order = torch.tensor([7, 2, 9])
    some = KeyedRandom(3, "stage", ids[order], zero[order])
    for draw in ("uniform", "normal"):
        whole = getattr(every, draw)(like)
        assert torch.equal(whole[order], getattr(some, draw)(like[order]))
        assert not torch.equal(whole[0], whole[1])
        for other in (
            KeyedRandom(4, "stage", ids, zero),
            KeyedRandom(3, "other", ids, zero),
            KeyedRandom(3, "stage", ids, zero + 1),
        ):
            assert not torch.equal(whole, getattr(other, draw)(like))
        assert not torch.equal(whole, getattr(every, draw)(like, iteration=1))


def test_draws_have_the_right_moments() -> None:
    like = torch.zeros(64, 3, 32, 32)
    random = KeyedRandom(0, "s", torch.arange(64), torch.zeros(64, dtype=torch.int64))
    uniform, normal = random.uniform(like), random.normal(like)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 3e-3 and abs(float(uniform.var()) - 1 / 12) < 1e-3
    assert abs(float(normal.mean())) < 1e-2 and abs(float(normal.var()) - 1) < 1e-2


@pytest.mark.parametrize("norm", list(EPS))
def test_projection_is_the_nearest_feasible_point(norm: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(200, 6, generator=generator)
    point = x + 0.8 * torch.randn(200, 6, generator=generator)
    threat = Threat(norm, 0.5)
    near = threat.project(point, x)
    assert threat.contains(near, x).all() and near.min() >= 0 and near.max() <= 1
    feasible = threat.contains(point, x) & (point >= 0).all(1) & (point <= 1).all(1)
    assert torch.equal(threat.project(x, x), x)
    if feasible.any():
        torch.testing.assert_close(near[feasible], point[feasible])
    if norm == "l2":
        return  # feasible only: the ball first, then the box
    # Euclidean projection: no other feasible point is nearer.
    x, point, near = (tensor.repeat(500, 1) for tensor in (x, point, near))
    rivals = threat.project(near + 0.05 * torch.randn(near.shape, generator=generator), x)
    assert threat.contains(rivals, x).all()
    gap = (rivals - point).norm(dim=1) - (near - point).norm(dim=1)
    assert gap.min() > -1e-5


def test_a_radius_per_row() -> None:
    x = torch.full((3, 4), 0.5)
    for norm in EPS:
        eps = torch.tensor([0.0, 0.1, 0.2])
        rows = project(x + 1, x, norm, eps)
        for i, radius in enumerate(eps):
            torch.testing.assert_close(rows[i : i + 1], project(x[:1] + 1, x[:1], norm, radius))


def test_losses_in_closed_form() -> None:
    logits = torch.tensor([[4.0, 1.0, 2.0, 0.0], [1.0, 3.0, 0.0, 7.0]])
    y, target = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert losses.margin(logits, y).tolist() == [-2.0, 4.0]
    torch.testing.assert_close(losses.dlr(logits, y), torch.tensor([-2 / 3, 4 / 6]))
    torch.testing.assert_close(
        losses.dlr_targeted(logits, y, target), torch.tensor([-2 / 3.5, 4 / 6.5])
    )
    torch.testing.assert_close(losses.dlr(5 * logits + 3, y), losses.dlr(logits, y))
    with pytest.raises(ValueError, match="3 classes"):
        losses.dlr(logits[:, :2], y)
    with pytest.raises(ValueError, match="4 classes"):
        losses.dlr_targeted(logits[:, :3], y, target)


@pytest.mark.parametrize(
    ("value", "expected"), [("8/255", 8 / 255), (0.5, 0.5), ("0.03", 0.03), (12, 12.0)]
)
def test_lengths_are_read_as_written(value: float | str, expected: float) -> None:
    assert pixels(value) == expected


@pytest.mark.parametrize("value", ["eight", "8/0", "nan", "inf", -1, ""])
def test_what_is_no_length_is_refused(value: float | str) -> None:
    with pytest.raises(UserError, match="is not a length"):
        pixels(value)


def test_a_linf_budget_above_the_pixel_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"did you mean threat.eps=8/255"):
        Threat("linf", 8)
    assert Threat("l1", 12).radius == 12
    with pytest.raises(UserError, match="did you mean 'linf'"):
        Threat("Linf", 0.1)


def test_the_referee_rejects_what_is_outside_and_wrong_claims() -> None:
    model, threat = linear(2), Threat("linf", 1e-4)
    clean = batch(model)
    weight = last(model).weight.detach().view(2, *SHAPE)
    cheat = Cheat(torch.stack([weight[1] - weight[0], weight[0] - weight[1]]))
    rows = cheat.start(Oracle(model), clean, threat, *keyed(clean))
    rows.point[0] = torch.nan
    with torch.no_grad():
        fooled = model(rows.point).argmax(1) != clean.y
    assert fooled[1:].all(), "the cheat must look like a success where it stands"
    judged = Referee(model, threat).judge(clean.x, clean.y, rows.point)
    assert threat.contains(judged.point, clean.x).all()
    assert judged.point.min() >= 0 and judged.point.max() <= 1
    truth = best_margins(model, clean, threat).amax(1) > 0
    assert torch.equal(judged.broken, truth) and not truth.all()


def test_counting_forwards_and_backwards() -> None:
    model, threat = linear(3), Threat("linf", 0.01)
    clean = batch(model, 5)
    oracle, attack = Oracle(model), PGD(steps=4)
    random, restarts = keyed(clean)
    rows = attack.start(oracle, clean, threat, random, restarts)
    for _ in range(4):
        attack.advance(rows, oracle.query(attack, rows), threat, random)
    oracle.query(attack, rows, gradient=False)
    assert rows.forwards.tolist() == [5] * 5 and rows.backwards.tolist() == [4] * 5
    assert (oracle.model.forwards, oracle.model.backwards) == (25, 20)


def test_rows_leave_and_enter_without_a_trace() -> None:
    """Searching in two halves, or in another order, gives the same points."""
    model, threat = linear(4), Threat("linf", 0.02)
    clean = batch(model, 8)
    attack = APGD(steps=20, loss_name="dlr")

    def search(order: Tensor) -> Tensor:
        part = Clean(*(field[order] for field in clean))
        oracle = Oracle(model)
        random, restarts = keyed(part)
        rows = attack.start(oracle, part, threat, random, restarts)
        for step in range(attack.queries):
            if step == 7:
                other = rows.take(torch.arange(4, 8))
                rows.point[4:] = torch.nan
                rows.put(torch.arange(4, 8), other, torch.arange(4))
            attack.advance(rows, oracle.query(attack, rows), threat, random)
        return rows.point

    order = torch.tensor([5, 3, 1, 7, 0, 2, 4, 6])
    torch.testing.assert_close(search(torch.arange(8))[order], search(order))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PGD(loss_name="mragin"),
        lambda: PGD(steps=0),
        lambda: APGD(loss_name="cw"),
        lambda: APGD(targets=0),
    ],
)
def test_attacks_refuse_bad_parameters(make) -> None:  # pyright: ignore
    with pytest.raises(UserError):
        make()


def test_too_few_classes_are_refused() -> None:
    for attack, classes in (
        (PGD(loss_name="dlr"), 2),
        (APGD(loss_name="dlr_targeted"), 3),
        (APGD(loss_name="margin_targeted", targets=9), 5),
    ):
        with pytest.raises(UserError, match="classes"):
            attack.check(classes, Threat("linf", 0.1))
