"""Indicators of misleading gradients. Each looks at a few images, chosen by the seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from advbench.attacks import losses
from advbench.attacks.base import Clean, Rows
from advbench.attacks.pgd import PGD
from advbench.attacks.threat import Threat, norm_of, per_row, unit
from advbench.verdict.look import Look, short_search
from advbench.verdict.reading import Reading, fall, images, of_share

DEAD = 1e-12
"""Of the median: a gradient shorter than that is none."""
DEAD_SHARE = 0.05
DIRECTIONS = 8
STEP = 1e-3
"""Of the pixel range: the shorter of the two steps of a difference."""
COSINE = 0.9
"""Below it, the gradient is of another function. Of 34 honest nets none is below 0.99."""
SOME = 0.01
"""A share of images that has to be exceeded for certain."""
STEPS = 20
ANYWHERE = Threat("linf", 1.0)
"""Any image is allowed."""
POINTS = 100
"""Random points for each image."""
MANY = 256
"""Images for what costs a few passes each."""


def zero_gradient(look: Look) -> Reading | None:
    """Survivors without a gradient of cross-entropy and of the margin, all along a search."""
    if not look.follows or not len(left := look.left_by_gradient):
        return None
    clean, points = look.sample(left), {}
    at = (0, STEPS // 2, STEPS)

    def keep(step: int, rows: Rows) -> None:
        if step in at:
            points.setdefault(step, []).append((rows.ids, rows.point.clone()))

    look.search("zero_gradient", short_search(look.job.threat, "margin", STEPS), clean, watch=keep)
    dead = torch.ones(len(clean.y), dtype=torch.bool, device=clean.y.device)
    ce_dead = dead.clone()
    for parts in points.values():
        ids = torch.cat([part[0] for part in parts])
        x = torch.cat([part[1] for part in parts])
        row = torch.searchsorted(clean.ids, ids)
        for loss in (losses.ce, losses.margin):
            gone = _dead(look.gradient(loss, x, clean.y[row]))
            dead[row] &= gone
            if loss is losses.ce:
                ce_dead[row] &= gone
    hits, of = int(dead.sum()), len(dead)
    why = (
        f"the gradient is zero or not a number on {hits} of {images(of)} that withstood it, so no "
        "attack along it can find anything there"
        if hits
        else f"the gradient is not zero on any of {images(of)} that withstood it"
    )
    if not hits and (saturated := int(ce_dead.sum())):
        why += f" (of {saturated} that of the cross-entropy is: the model saturates there)"
    return of_share(hits, of, DEAD_SHARE, why)


def _dead(gradient: Tensor) -> Tensor:
    """Which rows have no gradient to speak of, (N,)."""
    length = norm_of(gradient.double(), "l2")
    sound = length.isfinite()
    usual = length[sound].median() if sound.any() else torch.zeros(())
    return ~sound | (length <= DEAD * usual)


def gradient_mismatch(look: Look) -> Reading | None:
    """The cosine between the gradient and central differences along random directions."""
    if not look.follows or look.job.traits.stochastic or not len(look.correct):
        return None
    clean = look.sample(look.correct)
    gradient = look.gradient(losses.margin, clean.x, clean.y).nan_to_num()
    found = {}
    for step in (STEP, max(look.job.threat.radius, 2 * STEP) / 2 if _linf(look) else 10 * STEP):
        along, differences = [], []
        for number in range(DIRECTIONS):
            draws = look.random("gradient_mismatch", clean.ids, number)
            direction = 2.0 * (draws.uniform(clean.x) < 0.5) - 1.0
            ahead, behind = (
                losses.margin(look.logits(clean.x + sign * step * direction), clean.y)
                for sign in (1, -1)
            )
            differences.append((ahead - behind).double() / (2 * step))
            along.append((gradient * direction).flatten(1).double().sum(1))
        cosine = _cosine(torch.stack(along, 1), torch.stack(differences, 1))
        if len(cosine):
            found[step] = cosine.sort().values
    if not found:
        return None
    step, cosine = max(found.items(), key=lambda item: float(item[1].median()))
    value, (low, high) = float(cosine.median()), median_interval(cosine)
    triggered = high < COSINE
    why = (
        f"the gradient does not point where the model's logits really change (cosine {value:.2f} "
        "with finite differences; an honest gradient has 1)"
        if triggered
        else f"the gradient agrees with finite differences of the logits (cosine {value:.2f})"
    )
    data = {"cosines": [round(float(c), 3) for c in cosine], "step": step}
    return Reading(value, COSINE, triggered, why, (low, high), data=data)


def _linf(look: Look) -> bool:
    return look.job.threat.norm == "linf"


def _cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosine of each row, (N, D) and (N, D); rows that are zero in both are left out."""
    seen = (ours != 0).any(1) | (theirs != 0).any(1)
    return torch.nn.functional.cosine_similarity(ours[seen], theirs[seen], dim=1, eps=1e-30)


def median_interval(ordered: Tensor) -> tuple[float, float]:
    """Exact 95 % interval of a median, from the ordered values (N,)."""
    n, below, k = len(ordered), 0.0, 0
    while k < n // 2:  # at most that many of n are below the median, at 2.5 %
        below += math.comb(n, k) / 2**n
        if below > 0.025:
            break
        k += 1
    if not k:
        return (-1.0, 1.0)
    return float(ordered[k - 1]), float(ordered[n - k])


def unbounded(look: Look) -> Reading | None:
    """Samples that a search along the gradient can't break even where any image is allowed."""
    if not look.follows or not len(look.correct):
        return None
    clean = look.sample(look.correct)
    attack = PGD(steps=2 * STEPS, loss_name="margin", random_start=False)
    broken = look.search("unbounded", attack, clean, threat=ANYWHERE)
    if not broken.all():  # a second chance, along another loss
        rest = Clean(*(part[~broken] for part in clean))
        again = PGD(steps=2 * STEPS, loss_name="ce", step_size=0.1)
        broken[~broken] = look.search("unbounded again", again, rest, threat=ANYWHERE)
    hits, of = int((~broken).sum()), len(broken)
    why = (
        f"a search along the gradient that may turn the image into any other leaves {hits} of "
        f"{of} right; with an honest gradient none is left"
        if hits
        else f"a search along the gradient that may turn the image into any other breaks all {of}"
    )
    return of_share(hits, of, SOME, why)


def one_step(look: Look) -> Reading | None:
    """Survivors of the whole search that a single step breaks."""
    if not look.follows or not len(left := look.survivors()):
        return None
    clean, threat = look.sample(left, MANY), look.job.threat
    broken = torch.zeros_like(clean.y, dtype=torch.bool)
    for loss in (losses.ce, losses.margin):
        step = _edge(look.gradient(loss, clean.x, clean.y).nan_to_num(), threat)
        for length in (0.5, 1.0):
            broken |= look.wrong(threat.project(clean.x + length * step, clean.x), clean)
    return after_all(look, clean, broken, "one step along the gradient")


def _edge(direction: Tensor, threat: Threat) -> Tensor:
    """Directions scaled to the edge of the ball."""
    if threat.norm == "linf":
        return threat.radius * direction.sign()
    length = norm_of(unit(direction, "l2"), threat.norm).clamp_min(1e-12)
    return unit(direction, "l2") * per_row(threat.radius / length, direction)


def noise(look: Look) -> Reading | None:
    """Survivors that random points at the edge of the ball break."""
    if not look.by_image or not len(left := look.left_by_gradient):
        return None
    clean, threat = look.sample(left), look.job.threat
    broken = torch.zeros_like(clean.y, dtype=torch.bool)
    for number in range(POINTS):
        rest = Clean(*(part[~broken] for part in clean))
        if not len(rest.y):
            break
        direction = look.random("noise", rest.ids, number).normal(rest.x)
        point = threat.project(rest.x + _edge(direction, threat), rest.x)
        broken[~broken] = look.wrong(point, rest)
    return after_all(look, clean, broken, "random noise inside the ball")


def after_all(look: Look, clean: Clean, broken: Tensor, what: str) -> Reading:
    """The reading of samples that break though attacks along the gradient left them."""
    hits, of = int(broken.sum()), len(broken)
    why = f"{what} breaks {hits or 'none'} of {images(of)} that attacks along the gradient left"
    reading = of_share(hits, of, SOME, why)
    if not reading.triggered:
        return reading
    left = look.survivors()
    robust = torch.isin(clean.ids, torch.from_numpy(left).to(clean.ids))
    counted = int((broken & robust).sum())
    if counted:
        why += f"; {counted} of them count as robust, so the number is too high"
        _, proof = fall(counted, int(robust.sum()), len(left), len(look.job.samples))
        return replace(reading, why=why, weight=None if proof else "evidence")
    why += "; other attacks broke them too, so they are not in the number"
    return replace(reading, why=why, weight="evidence", question="gradient")


def logit_scale(look: Look) -> Reading | None:
    """Survivors that fall once the logits are made smaller, which a search should not notice."""
    if not look.follows or not len(left := look.survivors()):
        return None
    clean = look.sample(left)
    attack = short_search(look.job.threat, "ce", STEPS)
    plain, *scaled = (
        look.search("logit_scale", attack, clean, scale=scale) for scale in (1.0, 0.1, 0.01)
    )
    more = (scaled[0] | scaled[1]) & ~plain
    return after_all(
        look, clean, more, "a search on smaller logits (and none on the logits as they are)"
    )


def monotone(look: Look) -> Reading | None:
    """Whether a search breaks fewer samples in a larger ball."""
    threat = look.job.threat
    if not look.follows or not len(look.correct) or not threat.radius > 0:
        return None
    clean = look.sample(look.correct)
    attack = short_search(threat, "margin", STEPS)
    most = 1.0 if threat.norm == "linf" else math.inf
    radii = [min(threat.radius * factor, most) for factor in (0.25, 0.5, 1.0, 2.0)]
    broken = [
        look.search("monotone", attack, clean, threat=Threat(threat.norm, radius))
        for radius in radii
    ]
    pairs = [
        (int((smaller & ~larger).sum()), int((larger & ~smaller).sum()), radius)
        for smaller, larger, radius in zip(broken, broken[1:], radii[1:], strict=False)
    ]
    lost, won, radius = max(pairs, key=lambda pair: pair[0] / max(pair[0] + pair[1], 1))
    curve = [float(part.float().mean()) for part in broken]
    why = (
        f"with eps {radius:.3g} the search breaks {won} more images than with the smaller one "
        f"before and loses {lost} that it had broken"
    )
    more = ": its gradient misleads, and the number may be too high"
    return of_share(lost, lost + won, 0.5, why, more=more, eps=radii, broken=curve)


def loss_gap(look: Look) -> Reading | None:
    """Whether searches on different losses break different samples, by far more than seeds do."""
    if not look.follows or not len(look.correct):
        return None
    clean, threat = look.sample(look.correct), look.job.threat
    classes = look.logits(clean.x[:1]).shape[1]
    names = ["ce", "margin", *(["dlr"] if classes >= losses.FEWEST_CLASSES["dlr"] else [])]
    search: Callable[[str, int], Tensor] = lambda loss, seed: look.search(  # noqa: E731
        f"loss_gap {seed}", short_search(threat, loss, STEPS, random_start=True), clean
    )
    found = {loss: [search(loss, seed) for seed in (0, 1)] for loss in names}
    by_seed = torch.stack([a ^ b for a, b in found.values()]).any(0)
    first = torch.stack([runs[0] for runs in found.values()])
    by_loss = (first.any(0) & ~first.all(0)) & ~by_seed
    hits, of = int(by_loss.sum()), len(by_loss)
    shares: dict[str, Any] = {k: float(runs[0].float().mean()) for k, runs in found.items()}
    said = ", ".join(f"{loss} {100 * share:.0f} %" for loss, share in shares.items())
    why = f"{hits} of {images(of)} break on one loss and not on another, whatever the seed ({said})"
    return of_share(hits, of, 0.1, why, **shares)
