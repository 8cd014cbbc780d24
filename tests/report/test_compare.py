"""Two evaluations compared: intervals and tests against closed forms."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_up_results import AUTOATTACK, NASTY, PGD, evaluated, results
from scipy import optimize, stats

from advbench.cli.main import main
from advbench.errors import UserError
from advbench.report import compare

# --- the statistics of pairs --------------------------------------------------------------------


def test_mcnemar_is_a_binomial_test() -> None:
    cases = 0
    for a_only in range(0, 30, 3):
        for b_only in range(0, 30, 2):
            m = a_only + b_only
            exact = stats.binomtest(a_only, m, 0.5).pvalue if m else 1.0
            assert compare.mcnemar(a_only, b_only) == pytest.approx(exact, rel=1e-12)
            cases += 1
    assert cases == 150
    assert compare.mcnemar(12, 2) == pytest.approx(
        0.0129, abs=5e-5
    )  # Armitage & Berry 1994, p. 127
    assert compare.mcnemar(4000, 5000) == pytest.approx(
        stats.binomtest(4000, 9000, 0.5).pvalue, rel=1e-9
    )


def test_tangos_interval_is_that_of_the_literature() -> None:
    # Fagerland, Lydersen & Laake 2014, table VI: 1 and 7 of 21 children.
    assert compare.tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (10, 200):  # none differs: +- z^2 / (n + z^2)
        assert compare.tango(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-6)
        low, high = compare.tango(n, 0, n)  # all do
        assert (low, high) == (pytest.approx(1 - 2 * z2 / (n + z2), rel=1e-6), 1.0)


def score(a_only: int, b_only: int, n: int, delta: float) -> float:
    """The score statistic of a difference, with the nuisance parameter found by a search."""

    def surprise(share: float) -> float:
        chances = (share + delta, share, 1 - 2 * share - delta)
        counts = (a_only, b_only, n - a_only - b_only)
        return -sum(c * math.log(p) for c, p in zip(counts, chances, strict=True) if c)

    low, high = max(0.0, -delta), (1 - delta) / 2
    options: Any = {"xatol": 1e-13}
    inside = (low + 1e-13, high - 1e-13)
    found: Any = optimize.minimize_scalar(
        surprise, bounds=inside, method="bounded", options=options
    )
    share = float(found.x)
    return (a_only - b_only - n * delta) / math.sqrt(n * (2 * share + delta * (1 - delta)))


def test_tangos_limits_are_where_the_score_test_turns() -> None:
    z = float(stats.norm.ppf(0.975))
    cases = ((12, 2, 50), (40, 20, 160), (3, 11, 200), (1, 1, 10), (100, 150, 1000))
    for a_only, b_only, n in cases:
        low, high = compare.tango(a_only, b_only, n)
        assert score(a_only, b_only, n, low) == pytest.approx(z, abs=1e-4)
        assert score(a_only, b_only, n, high) == pytest.approx(-z, abs=1e-4)
        assert compare.tango(b_only, a_only, n) == pytest.approx((-high, -low), abs=1e-9)


def test_tangos_interval_excludes_zero_where_mcnemars_score_rejects() -> None:
    cases = rejected = 0
    for a_only in range(0, 40, 3):
        for b_only in range(1, 40, 3):
            low, high = compare.tango(a_only, b_only, 100)
            statistic = (a_only - b_only) ** 2 / (a_only + b_only)
            assert (low > 0 or high < 0) == (statistic > stats.chi2.ppf(0.95, 1))
            cases, rejected = cases + 1, rejected + (low > 0 or high < 0)
    assert cases == 182 and 50 < rejected < 150


def test_words_and_interval_of_a_comparison_agree() -> None:
    said = {m: compare.sentence(compare.Paired(90 - m, m, 0, 10), "robust") for m in (3, 5, 6)}
    assert said[3].startswith("no difference shown: A - B = +3.0 points [-")
    assert said[5].startswith(
        "borderline, the interval excludes 0 and the exact test does not: A - B = +5.0 points [+1.1"
    )
    assert said[6].startswith("A is more robust than B by 6.0 points")
    cases = borderline = 0
    for a_only in range(60):
        for b_only in range(60):
            paired = compare.Paired(0, a_only, b_only, 10)
            low, high = paired.ci95
            excluded, shown = not low <= 0 <= high, paired.p < compare.ALPHA
            assert excluded or not shown  # the other contradiction does not occur
            assert (compare.BORDERLINE in compare.sentence(paired, "robust")) == (excluded > shown)
            cases, borderline = cases + 1, borderline + (excluded > shown)
    assert cases == 3600 and borderline > 50


# --- two evaluations, image by image ------------------------------------------------------------


A = [-1] * 150 + [0] * 10 + [1] * 30 + [2] * 10
B = [-1] * 140 + [2] * 10 + [1] * 30 + [-1] * 5 + [0] * 5 + [0] * 10
"""150 and 145 held, 140 by both; B lost 10 that A held, to square; A lost 5 that B held."""


def test_pairs_are_counted_by_hand(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", A)
    b = evaluated(tmp_path / "b", B, settings={"defense": "hpm"})
    found = compare.of([a, b])
    assert found.robust == compare.Paired(both=140, a_only=10, b_only=5, neither=45)
    assert found.robust is not None
    assert found.robust.difference == 0.025 and found.robust.n == 200
    clean = [(x != 0, y != 0) for x, y in zip(A, B, strict=True)]
    assert found.clean == compare.Paired(
        clean.count((True, True)), clean.count((True, False)), clean.count((False, True)),
        clean.count((False, False)),
    )  # fmt: skip
    assert found.a_lost == {"apgd-ce": 5} and found.b_lost == {"square": 10}
    assert found.notes == ()
    turned = compare.of([b, a])
    assert turned.robust == compare.Paired(140, 5, 10, 45)
    assert (turned.a_lost, turned.b_lost) == (found.b_lost, found.a_lost)


def test_a_comparison_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = evaluated(tmp_path / "a", [-1] * 170 + [1] * 30)
    b = evaluated(tmp_path / "b", [-1] * 140 + [1] * 60, settings={"defense": NASTY, "seed": 1})
    assert main(["report", "--compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    low, high = compare.tango(30, 0, 200)
    interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
    assert (
        f"A is more robust than B by 15.0 points {interval}; 85.0 % and 70.0 %; p < 0.001" in said
    )
    assert "clean: no difference shown: A - B = +0.0 points" in said
    assert "on the same 200 images: digits test, linf 8/255, autoattack 1" in said
    assert "lost by B and held by A: 30 by apgd-ce" in said and "lost by A" not in said
    assert "one training seed each" in said and "\x1b" not in said
    assert main(["report", "--compare", str(b), str(a)]) == 0
    assert f"A is less robust than B by 15.0 points {interval}" in capsys.readouterr().out
    out = tmp_path / "words.txt"
    assert main(["report", "--compare", str(a), str(b), "--out", str(out)]) == 0
    assert capsys.readouterr().out == "" and "on the same" in out.read_text()
    assert main(["report", "--compare", str(a), str(b), "--format", "json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["robust"]["ci95"] == [low, high] and plain["b_lost"] == {"apgd-ce": 30}


def test_what_was_not_attacked_is_compared_on_clean_images_alone(tmp_path: Path) -> None:
    clean = {"protocol": {"name": "clean", "version": "1"}, "stages": ()}
    held = [-1 if where else 0 for where in A]
    both = [evaluated(tmp_path / name, held, **clean) for name in ("a", "b")]
    said = compare.text(both)
    assert "robust: no comparison, for they were not both attacked" in said
    assert "clean: no difference shown" in said and "on the same 200 images" in said
    assert json.loads(compare.text(both, form="json"))["robust"] is None
    assert "robust: no comparison" in compare.text(
        [both[0], evaluated(tmp_path / "c", A)], mix=True
    )


def test_two_evaluations_of_one_model_are_called_that(tmp_path: Path) -> None:
    provenance = {"seconds": 1.0, "model_sha256": "f" * 64}
    a = evaluated(tmp_path / "a", A, provenance=provenance)
    b = evaluated(tmp_path / "b", B, provenance=provenance)
    said = compare.text([a, b])
    assert "A and B are one model: the lower number is the closer bound" in said


def test_images_in_common_are_compared_and_counted(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", [-1, -1, 1, 2], ids=[3, 5, 7, 9])
    b = evaluated(tmp_path / "b", [-1, 1, -1, -1, -1, 0], ids=[1, 5, 7, 9, 11, 13])
    found = compare.of([a, b])
    assert found.robust == compare.Paired(both=0, a_only=1, b_only=2, neither=0)
    assert found.a_lost == {"apgd-ce": 1, "square": 1}
    assert found.notes == ("3 images are common to the 4 of A and 6 of B",)
    c = evaluated(tmp_path / "c", [-1, -1], ids=[100, 101])
    with pytest.raises(UserError, match="no image in common"):
        compare.of([a, c])


REFUSED: dict[str, tuple[dict[str, Any], str, bool]] = {
    "threat": ({"threat": {"eps": 0.1}}, "threat .linf 8/255, linf 0.1.: add --mix", True),
    "protocol": ({"protocol": PGD}, "protocol .autoattack 1, pgd 1 .weak..: add --mix", True),
    "parameters": ({"protocol": {**AUTOATTACK, "suite": "rand"}}, "suite rand.*add --mix", True),
    "images": ({"data": {"sha256": "beef" * 16}}, "other images can't be paired", False),
    "data": ({"data": {"name": "other"}}, "other images can't be paired", False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_is_refused_and_mix_allows_what_makes_sense(case: str, tmp_path: Path) -> None:
    assert len(REFUSED) == 5
    changes, message, allowed = REFUSED[case]
    both = [evaluated(tmp_path / "a", A), evaluated(tmp_path / "b", B, **changes)]
    with pytest.raises(UserError, match=message):
        compare.of(both)
    if allowed:
        (note,) = compare.of(both, mix=True).notes
        assert note.startswith("they differ in more than the model: ")
    else:
        with pytest.raises(UserError, match=message):
            compare.of(both, mix=True)


def test_records_that_are_not_those_of_the_results_are_refused(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", A), evaluated(tmp_path / "b", B)
    shutil.copyfile(a / "samples.parquet", b / "samples.parquet")
    with pytest.raises(UserError, match=r"is not that of results\.json"):
        compare.of([a, b])
    (b / "samples.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="is damaged"):
        compare.of([a, b])
    (b / "samples.parquet").unlink()
    results(missing=("square",)).save(b / "results.json")
    with pytest.raises(UserError, match="it did not finish: resume it with the same command"):
        compare.of([a, b])
