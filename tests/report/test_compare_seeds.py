"""Groups of evaluations over training seeds, against statistics by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_up_results import evaluated

from advbench.cli.main import main
from advbench.errors import UserError
from advbench.report import compare_seeds
from advbench.report.collection import find


def group(folder: Path, name: str, *lost: int, n: int = 100, first: int = 1) -> list[Path]:
    """Evaluations of one defense, a seed each, that lost so many of n images."""
    made = []
    for i, count in enumerate(lost):
        settings = {"defense": name, "seed": first + i}
        fell = [1] * count + [-1] * (n - count)
        made.append(evaluated(folder / f"{name}-{first + i}", fell, settings=settings))
    return made


def test_pooled_differences_by_hand() -> None:
    a = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    b = np.array([[1, 0, 0, 0], [1, 0, 0, 1]], bool)
    found = compare_seeds.pooled(a, b)
    change = np.array([0, 1, 0.5, -0.5])
    assert (found.a, found.b, found.difference) == (5 / 8, 3 / 8, 0.25)
    assert found.by_seed == (0.5, 0.0) and found.sd == pytest.approx(np.std([0.5, 0], ddof=1))
    half = 1.959963984540054 * change.std(ddof=1) / 2
    assert found.ci95 == pytest.approx((0.25 - half, 0.25 + half))
    # A seed that repeats another one is no new evidence.
    twice = compare_seeds.pooled(np.repeat(a[:1], 5, 0), np.repeat(b[:1], 5, 0))
    once = compare_seeds.pooled(a[:1], b[:1])
    assert (twice.ci95, twice.p) == (once.ci95, once.p) and once.sd is None
    same = compare_seeds.pooled(a, a)
    assert (same.difference, same.ci95, same.p) == (0, (0, 0), 1)


def test_groups_are_paired_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = group(tmp_path, "hpm", 20, 22, 24), group(tmp_path, "none", 40, 40, 46)
    paths = [[str(path) for path in some] for some in (a, b)]
    assert main(["report", "--compare", *paths[0], "--with", *reversed(paths[1])]) == 0
    told = capsys.readouterr().out
    assert "A: defense=hpm\nB: defense=none\n" in told
    assert "on the same 100 images, paired by the seeds 1, 2, 3" in told
    assert "robust: A - B = +20.0 points" in told and "78.0 % and 58.0 %; p < 0.001" in told
    assert "by seed: +20.0, +18.0, +22.0; sd 2.0" in told
    assert main(["report", "--compare", *paths[0], *paths[1]]) == 0  # two groups by themselves
    assert capsys.readouterr().out == told
    assert main(["report", "--compare", *paths[0], "--with", *paths[1], "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["robust"]["by_seed"] == pytest.approx(
        [0.2, 0.18, 0.22]
    )


def test_groups_that_can_not_be_paired_are_refused(tmp_path: Path) -> None:
    a, b = group(tmp_path, "hpm", 20, 22), group(tmp_path, "none", 40, 40, first=7)
    with pytest.raises(UserError, match="A has the seeds 1, 2 and B has 7, 8: none in common"):
        compare_seeds.of(find(a), find(b))
    with pytest.raises(UserError, match="has the seed 1 twice"):
        compare_seeds.of([*find(a), *find(a)], find(b))
    more = group(tmp_path, "sparta", 30)
    with pytest.raises(UserError, match="these are 3 models, not 2: name the groups, --compare"):
        compare_seeds.text([*a, *b, *more], ())
    other = group(tmp_path, "other", 30, 30)
    found = compare_seeds.of(find(a), [*find(other), *find(more)][:2])
    assert [pair[0].seed for pair in found.pairs] == [1, 2]
    assert main(["report", "--with", str(a[0])]) == 2
