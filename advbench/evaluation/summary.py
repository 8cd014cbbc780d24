"""The results of an evaluation, computed from its records alone."""

from __future__ import annotations

import numpy as np

from advbench.defenses.base import Traits
from advbench.evaluation.store import Records


def measures(traits: Traits, n: int, records: list[Records], correct: int) -> dict[str, float]:
    """Other ways to say what the records hold, shares in [0, 1].

    records: of the clean images and of each stage.  correct: samples that held.
    wra: weighted robust accuracy, the mean of clean and robust.  mean_draw, worst_draw: robust
    accuracy if one evaluation of a stochastic model decides, on average, and if the worst of them
    does.  single_image: the share that no image broke alone among clean ones; an upper bound, since
    the attacks alter whole batches.
    """
    clean = records[0]
    found = {"wra": (float((~clean.broken).sum()) + correct) / (2 * n) if n else 0.0}
    everything = Records.joined(records)
    if traits.stochastic:
        wrong = np.zeros(int(clean.sample.max(initial=-1)) + 1)
        np.maximum.at(wrong, everything.sample, everything.wrong)
        wrong = wrong[clean.sample]
        found["mean_draw"] = float((1 - wrong).sum()) / max(n, 1)
        found["worst_draw"] = float((wrong == 0).sum()) / max(n, 1)
    if traits.batch_dependent:
        fallen = np.unique(everything.sample[everything.alone])
        found["single_image"] = (n - len(fallen)) / max(n, 1)
    return {name: round(value, 6) for name, value in found.items()}
