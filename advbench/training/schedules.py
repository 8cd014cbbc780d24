"""Learning rate schedules: pure functions from a step to a factor of the highest learning rate.

All have one signature, so that a name picks a function:

Args:
    step: from 0.
    steps: of the whole training, at least 1.
    milestones: steps at which ``multistep`` drops.
    gamma: the factor of each drop.

Returns:
    A factor in [0, 1] for gamma <= 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int, int, Sequence[int], float], float]


def constant(step: int, steps: int, milestones: Sequence[int], gamma: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(step: int, steps: int, milestones: Sequence[int], gamma: float) -> float:
    """From 1 towards 0 along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def multistep(step: int, steps: int, milestones: Sequence[int], gamma: float) -> float:
    """1, times ``gamma`` from each milestone on."""
    return gamma ** sum(step >= milestone for milestone in milestones)


def cyclic(step: int, steps: int, milestones: Sequence[int], gamma: float) -> float:
    """A triangle: 0 at the start, 1 half-way, 0 at the end (Wong et al. 2020, arXiv 2001.03994)."""
    return 1 - abs(2 * step / steps - 1)


def onecycle(step: int, steps: int, milestones: Sequence[int], gamma: float) -> float:
    """Up from 1/25 within 2.5 % of the steps and down to 1/250,000, each along half a cosine.

    PyTorch's ``OneCycleLR`` (Smith & Topin 2018, arXiv 1708.07120) as in the codes of Rade &
    Moosavi-Dezfooli 2022 (arXiv 2110.05626) and Wang et al. 2023 (arXiv 2302.04638), which change
    the rate per epoch.
    """
    start, end = 1 / 25, 1 / 25 * 1e-4
    top = max(0.025 * steps - 1, 0.0)
    if step < top:
        return 1 + (start - 1) / 2 * (1 + math.cos(math.pi * step / top))
    done = (step - top) / max(steps - 1 - top, 1.0)
    return end + (1 - end) / 2 * (1 + math.cos(math.pi * done))


def warmup(step: int, steps: int) -> float:
    """A linear rise that ends at 1, to be multiplied with a schedule (Goyal et al. 2017, arXiv
    1706.02677, sec. 2.2).

    Args:
        steps: how many steps it takes; step ``steps - 1`` and all later ones are at 1. 0 is off.
    """
    return min(1.0, (step + 1) / steps) if steps else 1.0


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "multistep": multistep,
    "cyclic": cyclic,
    "onecycle": onecycle,
}
