"""The interval of an audit, against the definition, and by drawing."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from advbench.evaluation.estimate import breakable, estimate, sample_size
from advbench.evaluation.phases import keyed_sample
from advbench.runs.accuracy import Estimate


def chances(survivors: int, breakable: int, audited: int) -> list[float]:
    """The chance of each number of broken ones in a sample, from 0 to ``audited``."""
    ways = comb(survivors, audited)
    robust = survivors - breakable
    return [comb(breakable, k) * comb(robust, audited - k) / ways for k in range(audited + 1)]


def test_the_interval_is_what_its_definition_says() -> None:
    cases = 0
    for survivors in (1, 2, 7, 13, 24):
        for audited in range(1, survivors + 1):
            for broken in range(audited + 1):
                possible = [
                    b
                    for b in range(broken, survivors - audited + broken + 1)
                    if sum(chances(survivors, b, audited)[broken:]) > 0.025
                    and sum(chances(survivors, b, audited)[: broken + 1]) > 0.025
                ]
                got = breakable(survivors, audited, broken)
                assert got == (min(possible), max(possible)), (survivors, audited, broken)
                cases += 1
    assert cases == sum(m + 1 for s in (1, 2, 7, 13, 24) for m in range(1, s + 1))


@pytest.mark.parametrize(("survivors", "audited"), [(30, 10), (96, 64), (200, 20)])
def test_it_covers_the_truth_in_95_of_100_samples_whatever_the_truth(
    survivors: int, audited: int
) -> None:
    intervals = [breakable(survivors, audited, k) for k in range(audited + 1)]
    covers = [
        sum(
            chance
            for k, chance in enumerate(chances(survivors, truth, audited))
            if intervals[k][0] <= truth <= intervals[k][1]
        )
        for truth in range(survivors + 1)
    ]
    assert min(covers) >= 0.95 and min(covers) < 0.99, min(covers)


def test_keyed_audits_of_a_known_truth_cover_it() -> None:
    """The keyed order itself, over seeds: 200 draws from each of three truths."""
    ids = np.arange(0, 360, 2)
    for share in (0.01, 0.05, 0.3):
        truth = set(ids[: round(share * len(ids))].tolist())
        covered = 0
        for seed in range(200):
            broken = len(truth & set(keyed_sample(ids, 40, seed)))
            fewest, most = breakable(len(ids), 40, broken)
            covered += fewest <= len(truth) <= most
        assert covered >= 186, (share, covered)


def test_what_is_said_of_an_audit() -> None:
    assert breakable(5000, 500, 0) == (0, 34)  # at most a third of a point of 10,000 images
    some = estimate("AutoAttack", 10000, 5190, 500, 2)
    assert some.acc == pytest.approx(0.519 * (1 - 2 / 500))
    assert some.ci95[1] <= (5190 - 2) / 10000 and some.ci95[0] < some.acc < some.ci95[1]
    assert str(some).startswith("AutoAttack: 51.7 % [51.2, 51.9] estimated from 500 of 5,190")
    whole = estimate("AutoAttack", 200, 96, 96, 1)
    assert whole.acc == 95 / 200 and whole.ci95 == (95 / 200, 95 / 200)
    assert estimate("AutoAttack", 200, 0, 0, 0).ci95 == (0.0, 0.0)
    for audited, broken, acc in ((64, 65, 0.4), (97, 1, 0.4), (64, 1, 0.9)):
        with pytest.raises(ValueError):
            Estimate("AutoAttack", acc, (0.3, 0.5), survivors=96, audited=audited, broken=broken)


def test_the_size_that_a_half_width_needs() -> None:
    for points, n, survivors in ((0.3, 10000, 5000), (1.0, 200, 96), (5.0, 1000, 300)):
        size = sample_size(points, n, survivors)
        assert 100 * breakable(survivors, size, 0)[1] <= 2 * points * n
        assert size == 1 or 100 * breakable(survivors, size - 1, 0)[1] > 2 * points * n
    assert sample_size(100.0, 200, 96) == 1 and sample_size(0.1, 200, 96) == 94
    assert sample_size(0.3, 100, 0) == 0
