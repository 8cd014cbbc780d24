"""Indicators from the records and the plan, and from the attacks' own images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from advbench.evaluation.job import CLEAN
from advbench.evaluation.plan import Stage
from advbench.evaluation.rescoring import RANGE_SLACK
from advbench.verdict.look import Look
from advbench.verdict.outputs import unsteadiness
from advbench.verdict.reading import Reading, below_interval, images, of_share

PROOF, EVIDENCE = 0.05, 0.01
"""Shares of survivors that must be exceeded for certain."""
QUARTERED = 8
"""Queries of which the last quarter says something."""
REPLAYED = 16
"""Samples whose search is repeated."""
RESCORED = 256
"""Images that are scored again."""


def weak_attack(look: Look) -> Reading | None:
    """Whether the protocol is a single attack, which a stronger one may beat."""
    if look.complete:
        return Reading("suite", "suite", False, "the protocol is a whole suite of attacks")
    names = ", ".join(stage.name for stage in look.stages)
    why = f"only {names} attacked the model: a suite of attacks may leave less"
    declared = look.job.traits.gradient
    if declared in ("exact", "none") or any(not stage.follows_model for stage in look.stages):
        return Reading(names, "suite", True, why)
    why += (
        f", and its gradient is declared {declared.replace('_', ' ')}, so another attack is needed "
        "than one along it: on surrogates, or a black box"
    )
    return Reading(names, "suite", True, why, weight="evidence")


def black_box(look: Look) -> Reading | None:
    """Survivors of the gradient attacks that Square or transferred images break."""
    if not look.white_box:
        return None
    found = _broken_later(look, [stage for stage in look.stages if look.is_blind(stage)])
    if found is None:
        return None
    hits, of = found
    why = (
        f"attacks that need no gradient (Square, transfer) break {hits} of {images(of)} that the "
        "model's gradient had left"
    )
    more = "; an honest gradient leaves almost nothing to them"
    return of_share(hits, of, EVIDENCE, why, more=more, proof=PROOF)


def audit(look: Look) -> Reading | None:
    """Survivors of a short search that the suite breaks which attacked some of them."""
    first = next((k for k, stage in enumerate(look.stages) if stage.only is not None), None)
    if first is None:
        return None
    before, suite = look.stages[:first], look.stages[first:]
    found = _broken_later(look, suite)
    if found is None:
        return None
    hits, of = found
    rest = len(look.survivors(before)) - of
    if not of or not rest:
        return None
    why = (
        f"the audit broke {hits or 'none'} of {of}, and {images(rest)} that it did not attack "
        "count as robust"
    )
    reading = of_share(hits, of, EVIDENCE, why, more=": the number is too high")
    low, counted = (reading.interval or (0.0, 0.0))[0], len(look.survivors())
    proof = below_interval(counted - low * rest, counted, len(look.records[CLEAN]))
    return replace(reading, weight=None if proof else "evidence")


def surrogate_gap(look: Look) -> Reading | None:
    """Survivors of the model's own gradient that a surrogate's gradient breaks."""
    own = {"model", *(name for name, s in look.job.surrogates.items() if s.transfer)}
    found = _broken_later(look, [stage for stage in look.stages if stage.victim not in own])
    if found is None or not look.white_box:
        return None
    hits, of = found
    why = (
        f"surrogates with other gradients break {hits} of {images(of)} that the model's own "
        "gradient had left"
    )
    more = ": the model's own gradient misleads"
    return of_share(hits, of, EVIDENCE, why, more=more)


def _broken_later(look: Look, stages: Sequence[Stage]) -> tuple[int, int] | None:
    """Of the survivors of the model's gradient that these stages attacked: how many they broke.

    Attacks on the model's gradient count where they came before. None where nothing was left.
    """
    if not stages:
        return None
    before = look.stages[: look.stages.index(stages[0])]
    left = look.survivors([stage for stage in before if stage.follows_model])
    left = np.intersect1d(left, look.attacked(stages))
    broken = [look.broken(stage) for stage in stages]
    hits = np.intersect1d(left, np.concatenate(broken))
    return (len(hits), len(left)) if len(left) else None


def unconverged(look: Look) -> Reading | None:
    """Survivors that the last quarter of the steps of the last white-box stage still breaks."""
    stages = [s for s in look.white_box if len(look.records[s.name])]
    stages = [s for s in stages if s.attack.queries >= QUARTERED]  # a single step is no search
    if not stages or look.job.traits.batch_dependent:
        return None
    records = look.records[stages[-1].name]
    if records.alone.all():
        return None  # none has spent all of the steps, and none is left
    late = records.forwards > 0.75 * records.forwards.max()
    hits, of = int((records.alone & late).sum()), int(late.sum())
    why = (
        f"the last quarter of the steps of {stages[-1].name} breaks {hits} of {images(of)} that "
        "were left until then"
    )
    more = ": more steps may break more, and the number may be too high"
    reading = of_share(hits, of, EVIDENCE, why, more=more)
    if not reading.triggered:
        return reading
    low = (reading.interval or (0.0, 0.0))[0]
    return replace(reading, weight="evidence" if low > PROOF else "thin")


def eot_plateau(look: Look) -> Reading | None:
    """Whether means over more draws still break samples."""
    if not look.job.traits.stochastic:
        return None
    stages = [stage for stage in look.white_box if stage.eot_samples > 1]
    most = max((stage.eot_samples for stage in stages), default=1)
    fewer = [stage for stage in stages if stage.eot_samples < most]
    last = [
        s for s in stages if s.eot_samples == most and (look.records[s.name].forwards > 0).any()
    ]
    if not fewer or not last:
        return None
    records = look.records[last[0].name]
    hits, of = int(records.alone.sum()), int((records.forwards > 0).sum())
    why = (
        f"means over {most} draws of the model's noise break {hits} of {images(of)} that fewer "
        "draws had left"
    )
    more = ": still more may break more, and the number may be too high"
    return of_share(hits, of, EVIDENCE, why, more=more)


def silent_success(look: Look) -> Reading | None:
    """Survivors of a search that repeats it and finds an adversarial image on the way."""
    if not look.follows or look.job.traits.stochastic:
        return None
    threat = look.job.threat
    stages = [
        stage
        for stage in look.white_box
        if stage.attack.queries
        and not stage.attack.peeks
        and stage.attack.starts == 1
        and stage.eps is None
        and stage.attack.stays_inside(threat)
    ]
    left = look.survivors()
    if not stages or not len(left):
        return None
    stage, clean = stages[0], look.sample(left, REPLAYED)
    broken = look.search("silent_success", stage.attack, clean, stage=stage.name)
    hits, of = int(broken.sum()), len(broken)
    why = (
        f"{stage.name}, repeated, fools the model for {hits or 'none'} of {images(of)} that it had "
        "left"
    )
    reading = of_share(hits, of, EVIDENCE, why)
    if not reading.triggered:
        return reading
    moved = unsteadiness(look, clean)
    if moved is None:
        return replace(reading, why=f"{why}: the number is too high, and our records are wrong")
    why += (
        f": the model's logits differ {moved}, so no search runs twice the same way. The record "
        "counts; more searches would leave fewer"
    )
    cure = (
        "remove what makes the logits differ (noise, batch statistics, a memory), or declare it: "
        "traits.stochastic=true, traits.batch_dependent=true"
    )
    return replace(reading, why=why, weight="evidence", settles=cure)


def norm(look: Look) -> Reading | None:
    """Whether the adversarial images that were kept are inside the threat, and fool the model."""
    if look.images is None or not look.by_image:
        return None
    chosen = look.sample(np.unique(look.images.ids), RESCORED)
    point = torch.from_numpy(look.images.of(chosen.ids.cpu().numpy())).to(chosen.x)
    inside = look.job.threat.contains(point, chosen.x)
    inside &= ((point >= -RANGE_SLACK) & (point <= 1 + RANGE_SLACK)).flatten(1).all(1)
    fooled = look.wrong(point, chosen)
    eight_bit = look.wrong((255 * point).round() / 255, chosen)
    outside, right, of = int((~inside).sum()), int((inside & ~fooled).sum()), len(inside)
    why = (
        f"of {of} adversarial images that were kept {outside} lie outside of the threat and "
        f"{right} do not fool the model (as 8-bit images {int((~eight_bit).sum())})"
    )
    bad = outside + (0 if look.job.traits.stochastic else right)
    return Reading(bad, 0, bad > 0, why)
