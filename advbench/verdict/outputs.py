"""Indicators of what the model returns, and of whether it is a function of the image alone."""

from __future__ import annotations

import torch
from torch import Tensor

from advbench.attacks.base import Clean
from advbench.evaluation.checks import PROBE, agree, are_shares, gaps, off_the_grid
from advbench.text import percent
from advbench.verdict.look import Look
from advbench.verdict.reading import Reading, images, of_share

TINY = 1e-4
"""Of the pixel range: a fortieth of what separates two 8-bit values."""
MOVED = 0.01
"""Of the spread of an image's logits: ten times what rounding may move them."""
MOVED_SHARE = 0.25


def probabilities(look: Look) -> Reading | None:
    """Outputs of a softmax or a sigmoid, whose gradient vanishes where the model is sure."""
    if look.job.traits.output == "probabilities":
        return None  # searches follow their logarithm
    outputs = look.logits(look.sample(look.job.samples.ids.numpy()).x)
    lowest, highest = float(outputs.min()), float(outputs.max())
    value = f"{lowest:.3g} to {highest:.3g}"
    if are_shares(outputs):
        why = (
            "the model returns probabilities, so its gradient vanishes where it is sure and the "
            "number may be too high"
        )
        return Reading(value, "sums other than 1", True, why)
    if lowest >= 0 and highest <= 1:
        why = (
            "all outputs lie in [0, 1], as sigmoids do: the gradient vanishes where the model is "
            "sure, and the number may be too high"
        )
        return Reading(value, "outside of [0, 1]", True, why, weight="evidence")
    return Reading(value, "outside of [0, 1]", False, "the model returns logits")


def stochastic_mismatch(look: Look) -> Reading | None:
    """Two passes that differ though the model is declared deterministic, or the other way round."""
    clean = look.sample(look.job.samples.ids.numpy())
    points = (clean.x, off_the_grid(clean))
    same = all(agree(look.logits(x), look.logits(x)) for x in points)
    declared = look.job.traits.stochastic
    is_, said = ("deterministic" if same else "stochastic"), f"{'' if declared else 'not '}declared"
    if declared == (not same):
        return Reading(is_, said, False, f"two passes of the same images say: {is_}, as declared")
    why = (
        "two passes of the same images agree and the model is declared stochastic: the number is "
        "of another model than the one described"
        if same
        else "two passes of the same images differ and the model is declared deterministic: the "
        "search was misled, and each image was judged by one draw"
    )
    return Reading(is_, said, True, why)


def tiny_change(look: Look) -> Reading | None:
    """The share of images whose logits move with a change that no gradient can mean."""
    if not look.by_image or look.job.traits.stochastic:
        return None
    clean = look.sample(look.job.samples.ids.numpy())
    x = off_the_grid(clean)
    moved = gaps(look.logits(x), look.logits(_beside(look, clean, x))) > MOVED
    hits, of = int(moved.sum()), len(moved)
    why = f"a change of {TINY:g} in each pixel moves the logits of {hits or 'none'} of {images(of)}"
    more = (
        ", as with noise that is computed from the image itself: an attacker can try many such "
        "changes, and the more are tried, the fewer images withstand"
    )
    return of_share(hits, of, MOVED_SHARE, why, more=more)


def _beside(look: Look, clean: Clean, x: Tensor) -> Tensor:
    """The images (N, C, H, W) with a tiny change, up or down, in each pixel."""
    up = look.random("tiny_change", clean.ids).uniform(x) < 0.5
    return torch.where(up, x + TINY, x - TINY).clamp(0, 1)


def unsteadiness(look: Look, clean: Clean) -> str | None:
    """What the logits of these images move with, though it should not move them; None: nothing."""
    x = off_the_grid(clean)
    together = look.logits(x)
    others = {
        "in a second pass of the same images": look.logits(x),
        f"alone and in a batch of {len(x)}": torch.cat([look.logits(row) for row in x.split(1)]),
        f"with a change of {TINY:g} in each pixel": look.logits(_beside(look, clean, x)),
    }
    for how, others_logits in others.items():
        moved = gaps(together, others_logits).amax().item()
        if moved > MOVED:
            return f"by {percent(moved)} of their spread {how}"
    return None


def batch_mismatch(look: Look) -> Reading | None:
    """Logits that depend on the other images of the batch."""
    if not look.by_image or look.job.traits.stochastic:
        return None
    sizes = sorted({1, PROBE, min(look.job.batch_size, len(look.job.samples))})
    clean = look.sample(look.job.samples.ids.numpy(), max(sizes))
    few = clean.x[:PROBE]
    with look.counting() as model, torch.no_grad():
        alone = torch.cat([model(row) for row in few.split(1)])
        differ = [
            size
            for size in sizes[1:]
            if not agree(alone[:size], model(clean.x[:size])[: len(alone)])
        ]
    value = f"differs at {differ[0]}" if differ else "the same"
    if not differ:
        beside = " and ".join(map(str, sizes[1:]))
        why = f"an image has the same logits alone and in batches of {beside}"
        return Reading(value, "the same", False, why)
    why = (
        f"an image has other logits alone than in a batch of {differ[0]}: what was attacked is not "
        "what is deployed, and the number may be too high"
    )
    return Reading(value, "the same", True, why)
