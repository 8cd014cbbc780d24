"""An exact estimate for all survivors from a keyed sample of them (hypergeometric law).

Of S survivors, B would break; a sample of m, drawn without replacement, has k of them. The interval
for B inverts the two one-sided tests (Clopper & Pearson 1934, here for a finite population): it
covers B in at least 95 % of all samples, whatever B is.
"""

from __future__ import annotations

import math

from advbench.runs.accuracy import Estimate

ODDS = 40
"""One over the error on each side of the interval, 2.5 %."""


def breakable(survivors: int, audited: int, broken: int) -> tuple[int, int]:
    """95 % interval for the number of survivors that would break.

    Args:
        survivors: S, of which ``audited`` were drawn without replacement.
        broken: of the audited.

    Returns:
        The fewest and the most, from ``broken`` to ``survivors - audited + broken``.
    """
    ways = math.comb(survivors, audited)
    fewest, most = broken, survivors - (audited - broken)
    # More breakable survivors make many broken ones likelier, so both ends can be bisected.
    low, high = fewest, most
    while low < high:
        middle = (low + high) // 2
        as_many = ways - _at_most(broken - 1, survivors, middle, audited)
        low, high = (low, middle) if ODDS * as_many > ways else (middle + 1, high)
    first, high = low, most
    while low < high:
        middle = (low + high + 1) // 2
        as_few = _at_most(broken, survivors, middle, audited)
        low, high = (middle, high) if ODDS * as_few > ways else (low, middle - 1)
    return first, low


def _at_most(broken: int, survivors: int, breakable: int, audited: int) -> int:
    """Of the samples of that size, how many have at most ``broken`` of the breakable ones."""
    robust = survivors - breakable
    i, last = max(0, audited - robust), min(broken, audited, breakable)
    if i > last:
        return 0
    total = term = math.comb(breakable, i) * math.comb(robust, audited - i)
    while i < last:
        term = term * (breakable - i) * (audited - i)
        i += 1
        term //= i * (robust - audited + i)
        total += term
    return total


def estimate(of: str, n: int, survivors: int, audited: int, broken: int) -> Estimate:
    """The estimated accuracy of these n images if the suite ``of`` had attacked all survivors.

    Args:
        of: name of the suite.
        n: images, of which ``survivors`` are left without it.
        audited: survivors that it attacked; all, or at least one.
        broken: by it.
    """
    if not survivors:
        return Estimate(of=of, acc=0.0, ci95=(0.0, 0.0), survivors=0, audited=0, broken=0)
    fewest, most = breakable(survivors, audited, broken)
    return Estimate(
        of=of,
        acc=survivors * (audited - broken) / (n * audited),
        ci95=((survivors - most) / n, (survivors - fewest) / n),
        survivors=survivors,
        audited=audited,
        broken=broken,
    )


def sample_size(points: float, n: int, survivors: int) -> int:
    """The smallest audit whose interval has that half-width, if it breaks nothing.

    Args:
        points: half of the interval's width, of accuracy over ``n`` images, in percent.
        n: images of the evaluation.
        survivors: of the short search, at most ``n``.
    """
    low, high = min(1, survivors), survivors
    while low < high:
        middle = (low + high) // 2
        narrow = 100 * breakable(survivors, middle, 0)[1] <= 2 * points * n
        low, high = (low, middle) if narrow else (middle + 1, high)
    return low
