"""Indicators of what the model returns, and of whether it is a function of the image alone."""

from __future__ import annotations

import torch

from advbench.evaluation.checks import PROBE, agree, are_shares, off_the_grid
from advbench.verdict.look import Look
from advbench.verdict.reading import Reading


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
