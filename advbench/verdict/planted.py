"""Indicator ``planted``: the attack has to find an adversarial image that exists for certain.

Zimmermann et al. 2022 (arXiv 2206.13991), "Increasing confidence in adversarial robustness
evaluations". Around each image a linear readout of the model's features is made that calls one
point at distance eps adversarial and 999 points within 0.95 eps not. So an adversarial image exists
for certain, and an attack on features and readout that misses it says nothing when it misses
others.

Ours: the point at distance eps is a corner of the ball in linf, so that it can be told from the
others in few dimensions too, and the readout is a weighted logistic regression by Newton's method
with next to no penalty. The paper draws points on the surface, or corners, and fits without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack, Clean, Oracle, attackable
from advbench.attacks.pgd import PGD
from advbench.attacks.random import KeyedRandom
from advbench.attacks.threat import Threat, per_row, unit
from advbench.backbones.base import Classifier
from advbench.devices import full_float32
from advbench.evaluation.plan import Stage
from advbench.verdict.look import Look
from advbench.verdict.reading import Reading, images, of_share

INNER = 999
"""Points around each image that are not adversarial."""

GAP = 0.05
"""By how much of eps they stay inside of it."""

CLOSE = 1e-3
"""Of the way from the adversarial point to the nearest other: where the readout's zero is put."""

IMAGES = 16
"""Images around which the verdict plants."""

EVIDENCE, PROOF = 0.05, 0.1
"""Shares of missed images that must be exceeded for certain: 95 % and 90 % found."""

PENALTY = 1e-6
STEPS = 30
"""Of Newton's method: each moves separable points on by about one unit of the logit."""


def planted(look: Look) -> Reading | None:
    """Adversarial images that exist for certain and that the protocol's search misses."""
    job = look.job
    if not look.follows or job.traits.stochastic or not job.threat.radius > 0:
        return None
    if not len(look.correct):
        return None
    clean = look.sample(look.correct, IMAGES)
    attack = for_two_classes(look.stages)
    with full_float32():
        found = plant(
            job.model, clean, job.threat, attack, seed=job.seed, batch_size=job.batch_size
        )
    look.forwards, look.backwards = look.forwards + found.forwards, look.backwards + found.backwards
    data = {key: getattr(found, key) for key in ("images", "separated", "identical", "by_chance")}
    if found.identical > found.separated:
        why = (
            f"around {found.identical} of {images(found.images)} a point at distance eps has the "
            "same features as points nearer by: the model hides how it changes"
        )
        reading = of_share(found.identical, found.images, EVIDENCE, why, **data)
        return replace(reading, weight="evidence")
    missed = found.separated - found.reached
    why = (
        f"of {images(found.separated)} near which an adversarial image was planted, the search "
        f"misses {missed} (random points: {found.separated - found.by_chance})"
    )
    more = ": it may miss others too, and the number may be too high"
    reading = of_share(missed, found.separated, EVIDENCE, why, more=more, proof=PROOF, **data)
    # A single short attack misses images of an honest net too, which says nothing of the net.
    return reading if look.complete else replace(reading, weight="thin", question="number")


@dataclass(frozen=True)
class Planted:
    """The result of planting."""

    images: int
    """Images around which a readout was fitted."""
    separated: int
    """Of these, where the readout tells the adversarial point from the others: what counts."""
    identical: int
    """Of these, where the adversarial point has exactly the features of another."""
    reached: int
    """Of the separated, where the attack found an adversarial image."""
    by_chance: int
    """Of the separated, where as many random points of the ball contained one."""
    forwards: int
    """Rows passed forward."""
    backwards: int
    """Rows passed backward."""


def plant(
    model: nn.Module,
    clean: Clean,
    threat: Threat,
    attack: Attack,
    *,
    seed: int = 0,
    batch_size: int = 250,
) -> Planted:
    """Plant an adversarial image near each clean one, and attack.

    Args:
        model: deterministic, row by row, in evaluation mode.
        clean: the images; labels are not used.
        threat: what the attack may change, eps > 0.
        attack: for two classes, see ``for_two_classes``. It makes one search for each image.
        seed: of all draws, which are keyed by it and by the sample.
        batch_size: rows passed at once.
    """
    features, n = Features(model, clean.x[:2]), len(clean.x)
    readouts: list[Readout | None] = []
    identical = 0
    with attackable(model), torch.no_grad():
        for row in range(n):
            one = Clean(*(part[row : row + 1] for part in clean))
            points = _points(one, threat, seed)
            h = torch.cat([features(part) for part in points.split(batch_size)]).double()
            identical += int((h[:-1] == h[-1]).all(1).any())
            readouts.append(fit(h))
    forwards = n * (INNER + 1)
    kept = [row for row, readout in enumerate(readouts) if readout is not None]
    reached = by_chance = backwards = 0
    for some in torch.tensor(kept, dtype=torch.int64).split(batch_size) if kept else ():
        rows = Clean(*(part[some.to(part.device)] for part in clean))
        target = WithReadout(features, [r for i in some if (r := readouts[i]) is not None])
        with attackable(model):
            found, oracle = _search(target, rows, threat, attack, seed)
            lucky = _guess(target, rows, threat, attack.queries, seed)
        reached, by_chance = reached + int(found.sum()), by_chance + int(lucky.sum())
        forwards += oracle.model.forwards + len(rows.x) * attack.queries
        backwards += oracle.model.backwards
    return Planted(n, len(kept), identical, reached, by_chance, forwards, backwards)


def for_two_classes(stages: Sequence[Stage]) -> Attack:
    """The first search of a plan along the model's gradient, as it is with two classes.

    One search on the margin, which has one wrong class. APGD with 100 steps if the plan has none.
    """
    for stage in stages:
        if stage.follows_model and isinstance(stage.attack, PGD):
            return replace(stage.attack, loss_name="margin", restarts=1)
        if stage.follows_model and isinstance(stage.attack, APGD):
            break
    else:
        return APGD(loss_name="margin")
    return APGD(steps=stage.attack.steps, loss_name="margin")


class Features(nn.Module):
    """The input of a model's linear head: (N, C, H, W) -> (N, D).

    Of a ``Classifier`` its features. Of another model the input of the linear layer whose output it
    returns; where it does something with that output, or has none, what it returns.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model = model
        self.head: nn.Linear | None = None
        if isinstance(model, Classifier):
            return
        with torch.no_grad(), _last_linear(model) as last:
            answer = model(images)
        if last and torch.equal(last[-1][2], answer):
            self.head = last[-1][0]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.model, Classifier):
            return self.model.features(x)
        if self.head is None:
            return self.model(x)
        with _last_linear(self.head) as last:
            self.model(x)
        return last[-1][1]


@contextmanager
def _last_linear(model: nn.Module) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    """Calls inside of linear layers on (N, D), in order: the layer, its input and its output."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def see(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> None:
        if isinstance(module, nn.Linear) and given[0].dim() == 2:
            calls.append((module, given[0], answer))

    handles = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Readout:
    """A linear function of features, above zero for what is adversarial."""

    weight: Tensor
    """(D,), float64."""
    bias: Tensor
    """A number, float64."""


def fit(h: Tensor) -> Readout | None:
    """The readout of one image; None where no hyperplane was found that separates the last point.

    Args:
        h: features (M, D) in float64, of which the last row is to be told from the others.

    Returns:
        Zero at ``CLOSE`` of the way from the last row to the nearest other, one unit apart.
    """
    centre, spread = h[:-1].mean(0), h[:-1].std(0)
    scale = torch.where(spread > 0, spread, 1.0)
    points = torch.cat([(h - centre) / scale, torch.ones_like(h[:, :1])], 1)
    sign = -torch.ones_like(h[:, 0])
    sign[-1] = 1.0
    weights = torch.full_like(sign, 1 / (len(h) - 1))
    weights[-1] = 1.0
    penalty = PENALTY * torch.eye(points.shape[1], dtype=h.dtype, device=h.device)
    beta = torch.zeros_like(points[0])
    for _ in range(STEPS):
        p = torch.sigmoid(-sign * (points @ beta))
        slope = points.T @ (weights * sign * p) - PENALTY * beta
        curvature = (points * (weights * p * (1 - p))[:, None]).T @ points + penalty
        beta = beta + torch.linalg.solve(curvature, slope)
    scores = points[:, :-1] @ beta[:-1]
    gap = scores[-1] - scores[:-1].max()
    if not (gap.isfinite() and gap > 1e-9 * beta[:-1].norm()):
        return None
    weight = beta[:-1] / scale / gap
    return Readout(weight, -(weight @ h[-1]) + CLOSE)


class WithReadout(nn.Module):
    """Features and a readout for each row: (N, C, H, W) -> logits (N, 2); class 1 is adversarial.

    The rows are always those that the readouts were made for, in this order.
    """

    def __init__(self, features: Features, readouts: Sequence[Readout]) -> None:
        super().__init__()
        self.features = features
        self.weight = torch.stack([readout.weight for readout in readouts])
        self.bias = torch.stack([readout.bias for readout in readouts])

    def forward(self, x: Tensor) -> Tensor:
        score = (self.features(x).to(self.weight) * self.weight).sum(1) + self.bias
        if x.requires_grad and not score.requires_grad:  # cut off from x: a gradient of zero
            score = score + 0 * x.flatten(1).sum(1)
        return torch.stack([-score, score], 1)


def _points(one: Clean, threat: Threat, seed: int) -> Tensor:
    """The points around one image, (INNER + 1, C, H, W), the adversarial one last."""
    ids, restarts = one.ids.expand(INNER + 1), torch.arange(INNER + 1, device=one.ids.device)
    random = KeyedRandom(seed, "planted", ids, restarts)
    x = one.x.expand(INNER + 1, *one.x.shape[1:])
    inner = _in_ball(x, threat, random, (1 - GAP) * threat.radius)
    if threat.norm == "linf":
        side = torch.where(random.uniform(x, 1)[-1:] < 0.5, -1.0, 1.0) * threat.radius
        outside = (one.x + side < 0) | (one.x + side > 1)
        edge = one.x + torch.where(outside, -side, side)  # where there is room
    else:
        edge = one.x + threat.radius * unit(random.normal(x, 1)[-1:], threat.norm)
    return torch.cat([inner[:-1], threat.project(edge, one.x)])


def _in_ball(x: Tensor, threat: Threat, random: KeyedRandom, radius: float) -> Tensor:
    """A random point of each row's ball of that radius, within [0, 1]."""
    if threat.norm == "linf":
        return (x + radius * (2 * random.uniform(x) - 1)).clamp(0, 1)
    length = random.uniform(x.flatten(1)[:, :1], 2).squeeze(1) ** (1 / x[0].numel())
    return (x + per_row(radius * length, x) * unit(random.normal(x), threat.norm)).clamp(0, 1)


def _search(
    target: WithReadout, clean: Clean, threat: Threat, attack: Attack, seed: int
) -> tuple[Tensor, Oracle]:
    """Which rows the attack turns into class 1, (N,)."""
    zero = torch.zeros_like(clean.ids)
    clean = Clean(clean.ids, clean.x, zero)
    random, oracle = KeyedRandom(seed, "planted-attack", clean.ids, zero), Oracle(target)
    rows = attack.start(oracle, clean, threat, random, zero)
    found = torch.zeros_like(zero, dtype=torch.bool)
    for _ in range(attack.queries):
        answer = attack.ask(oracle, rows, threat)
        found |= answer.logits.argmax(1) == 1
        attack.advance(rows, answer, threat, random)
    return found | (oracle.peek(rows).argmax(1) == 1), oracle


@torch.no_grad()
def _guess(target: WithReadout, clean: Clean, threat: Threat, times: int, seed: int) -> Tensor:
    """Which rows one of so many random points of the ball turns into class 1, (N,)."""
    found = torch.zeros_like(clean.ids, dtype=torch.bool)
    for number in range(times):
        random = KeyedRandom(seed, "planted-chance", clean.ids, torch.full_like(clean.ids, number))
        point = _in_ball(clean.x, threat, random, threat.radius)
        found |= target(point).argmax(1) == 1
    return found
