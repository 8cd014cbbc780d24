"""Leaderboards: what may be ranked with what, and what a table says."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_results import AUTOATTACK, PGD, entries, jumps, put, results, seeds

from advbench.cli.main import main
from advbench.errors import UserError
from advbench.report import formats, leaderboard
from advbench.report.collection import Mean, find, groups, varying
from advbench.report.conditions import protocol_of, text_of
from advbench.runs.accuracy import Accuracy, wilson
from advbench.runs.results import Results

# --- groups over seeds --------------------------------------------------------------------------


def test_seeds_have_a_mean_a_deviation_and_the_interval_of_their_images() -> None:
    mean = Mean.of([Accuracy.of(160, 200), Accuracy.of(180, 200)], 200)
    assert mean is not None
    assert (mean.acc, mean.count) == (pytest.approx(0.85), 2)
    assert mean.sd == pytest.approx(0.1 / math.sqrt(2))
    assert mean.ci95 == pytest.approx(wilson(170, 200))  # not that of 400 images
    one = Accuracy.of(160, 200)
    assert Mean.of([one], 200) == Mean(one.acc, None, 1, one.ci95)


GROUPED: dict[str, tuple[list[Results], list[list[int | None]]]] = {
    "seeds": (seeds(2, 0, 1), [[0, 1, 2]]),
    "another learning rate": (
        [*seeds(0, 1), *seeds(0, 1, settings={"optimizer.lr": 0.5})],
        [[0, 1], [0, 1]],
    ),
    "another threat": ([*seeds(0, 1), *seeds(2, threat={"eps": 0.1})], [[0, 1], [2]]),
    "attack seeds of their own": (
        [*seeds(0, protocol={**PGD, "seed": 5}), *seeds(1, protocol={**PGD, "seed": 6})],
        [[0, 1]],
    ),
    "attacked twice": (
        [*seeds(0, 1), *seeds(0, 1, protocol={**AUTOATTACK, "seed": 1})],
        [[0, 1], [0, 1]],
    ),
    "the same twice": (seeds(0, 0, 1), [[0], [0], [1]]),
    "unfinished": ([*seeds(0, 1), *seeds(2, missing=("square",))], [[0, 1], [2]]),
    "no training of ours": (seeds(None, None), [[None], [None]]),
    "one of ours": (seeds(None, 0), [[None], [0]]),
}


@pytest.mark.parametrize("case", GROUPED)
def test_only_trainings_that_differ_in_the_seed_alone_are_averaged(case: str) -> None:
    assert len(GROUPED) == 9
    found, expected = GROUPED[case]
    grouped = groups(entries(*found))
    assert [[entry.seed for entry in group.entries] for group in grouped] == expected


def test_what_varies_is_what_was_swept() -> None:
    old = results(settings={"defense.jump": 0.5})
    new = results(settings={"defense.jump": 1.0, "optimizer.lr": 0.1, "seed": 7})
    assert varying(entries(old, new)) == ["defense.jump"]
    assert varying(entries(old, results(settings={"recipe": "standard"}))) == ["recipe"]
    none, some = results(settings={"trainer.ema": None}), results(settings={"trainer.ema": 0.9})
    assert varying(entries(none, some)) == ["trainer.ema"]


def test_names_tell_what_is_inside() -> None:
    chain = {"defense": "chain", "defense.members": "sparta+hpm", "recipe": "awp"}
    (entry,) = entries(results(settings={**chain, "recipe.of": "trades"}))
    assert (entry.defense, entry.name("recipe")) == ("chain(sparta+hpm)", "awp(trades)")
    assert entry.threat_name == "linf 8/255"


# --- what is ranked with what -------------------------------------------------------------------

OTHER: dict[str, dict[str, Any]] = {
    "radius": {"threat": {"eps": 0.1}},
    "norm": {"threat": {"norm": "l2"}},
    "images": {"data": {"sha256": "beef" * 16}},
    "part": {"data": {"split": "val"}},
    "data": {"data": {"name": "cifar10", "sha256": "beef" * 16}},
    "number": {"data": {"n": 150}},
    "version": {"protocol": {**AUTOATTACK, "version": "2"}},
    "suite": {"protocol": {**AUTOATTACK, "suite": "plus"}},
    "protocol": {"protocol": PGD},
}


@pytest.mark.parametrize("case", OTHER)
def test_other_conditions_are_another_table(case: str) -> None:
    assert len(OTHER) == 9
    settings = {"defense": "hpm"}
    found = groups(entries(results(), results(settings=settings, **OTHER[case])))
    boards = leaderboard.boards(found)
    assert [len(board.groups) for board in boards] == [1, 1]
    assert len({board.title for board in boards}) == 2  # a reader sees which is which
    with pytest.raises(UserError, match="add --mix"):
        leaderboard.sweep(found, ["defense"])
    (mixed,) = leaderboard.boards(found, mix=True)
    shown = mixed.sheet()
    more = set(shown.headings) - set(boards[0].sheet().headings)
    assert len(more) == 1 and more <= {"data", "n", "threat", "protocol"}
    (column,) = (i for i, heading in enumerate(shown.headings) if heading in more)
    assert len({row[column] for row in shown.rows}) == 2


def test_the_most_robust_comes_first_and_the_unfinished_last() -> None:
    found = [
        results(120, settings={"defense": "a"}),
        results(190, settings={"defense": "b"}, missing=("square",)),
        results(150, settings={"defense": "c"}),
        results(130, settings={"defense": "d"}),
    ]
    (board,) = leaderboard.boards(groups(entries(*found)))
    sheet = board.sheet()
    assert [row[0] for row in sheet.rows] == ["c", "d", "a", "b"]
    robust = sheet.headings.index("robust")
    assert "verdict" not in sheet.headings  # there is none yet
    assert sheet.rows[0][robust] == "75.0 [68.6, 80.5]"
    assert sheet.rows[-1][robust] == "UNFINISHED: at most 95.0, 95 of 190 samples decided"
    assert leaderboard.READING_UNFINISHED in sheet.notes
    judged = {"verdict": {"label": "reliable", "indicators": []}, "settings": {"defense": "e"}}
    (board,) = leaderboard.boards(groups(entries(*found, results(**judged))))
    (verdict,) = (i for i, word in enumerate(board.sheet().headings) if word == "verdict")
    assert [row[verdict] for row in board.sheet().rows] == ["-", "-", "-", "reliable", "-"]


def test_a_weak_protocol_is_never_ranked_with_a_strong_one() -> None:
    paper = {"name": "paper/hpm", "version": "1", "seed": 0}
    adaptive = {"name": "adaptive", "version": "1", "seed": 0}
    msa = {"name": "msa", "version": "1", "seed": 0}
    found = groups(
        entries(
            results(199, protocol=paper),
            results(198, protocol=PGD),
            results(100, protocol=AUTOATTACK),
            results(90, protocol=AUTOATTACK, settings={"defense": "hpm"}),
            results(80, protocol=adaptive),
            results(85, protocol=msa),
        )
    )
    titles = [board.title for board in leaderboard.boards(found)]
    assert [title.rpartition(", ")[2] for title in titles] == [
        "adaptive 1", "msa 1", "autoattack 1", "paper/hpm 1 (weak)", "pgd 1 (weak)",
    ]  # fmt: skip
    (mixed,) = leaderboard.boards(found, mix=True)
    protocols = [group.first.protocol for group in mixed.groups]
    assert protocols == [
        "adaptive 1", "msa 1", "autoattack 1", "autoattack 1", "paper/hpm 1", "pgd 1",
    ]  # fmt: skip
    assert leaderboard.READING_WEAK in mixed.sheet().notes


def test_a_mixed_table_has_the_strong_above_the_weak_and_the_unfinished_below() -> None:
    """Whatever the threat, n and accuracy; of a protocol of the user's own nobody knows."""
    few = {"data": {"n": 40}, "threat": {"eps": 1 / 255}}
    found = entries(
        results(40, protocol=PGD, **few),
        results(39, protocol={"name": "zzz", "version": "1"}, **few),
        results(100, protocol=AUTOATTACK),
        results(200, protocol=AUTOATTACK, missing=("square",)),
    )
    (mixed,) = leaderboard.boards(groups(found), mix=True)
    names = [group.first.results.protocol["name"] for group in mixed.groups]
    assert names == ["autoattack", "zzz", "pgd", "autoattack"]
    assert mixed.groups[-1].first.results.missing


def unattacked(**changes: Any) -> Results:
    """Of protocol=clean: what nothing attacked."""
    return results(190, protocol={"name": "clean", "version": "1", "seed": 0}, stages=(), **changes)


def test_what_was_not_attacked_has_no_robust_accuracy() -> None:
    """It is no 95 % that PGD's 25 % would stand below."""
    late = results(190, missing=("apgd-ce", "square"))
    stages = tuple(replace(stage, attacked=0) for stage in late.stages)
    found = entries(
        unattacked(),
        results(50, protocol=PGD),
        replace(late, stages=stages, robust=Accuracy()),
        results(120, missing=("apgd-ce", "square")),
    )
    (mixed,) = leaderboard.boards(groups(found), mix=True)
    shown = mixed.sheet()
    column = shown.headings.index("robust")
    assert [row[column] for row in shown.rows] == [
        "25.0 [19.5, 31.4]",
        "UNFINISHED: at most 60.0, 70 of 190 samples decided",
        "-",
        "UNFINISHED: 0 of 190 samples decided",
    ]
    assert leaderboard.READING_CLEAN in shown.notes
    rows = list(csv.DictReader(io.StringIO(formats.render([mixed], "csv"))))
    kept = [(row["robust"], row["robust_sd"], row["robust_low"]) for row in rows]
    assert kept[2:] == [("", "", "")] * 2 and float(kept[0][0]) == 0.25
    assert [row["decided"] for row in rows] == ["", "70", "", "0"] and kept[1][1:] == ("", "")
    assert json.loads(formats.render([mixed], "json"))["tables"][0]["rows"][2]["robust"] is None
    assert "-" in formats.render([mixed], "latex") and "- |" in formats.render([mixed], "md")
    (alone,) = leaderboard.boards(groups(entries(results(50, protocol=PGD))))
    assert leaderboard.READING_CLEAN not in alone.sheet().notes


def test_a_title_says_what_tells_tables_apart() -> None:
    long = {**PGD, "steps": 100}
    found = groups(entries(results(protocol=PGD), results(protocol=long)))
    assert [board.title for board in leaderboard.boards(found)] == [
        "digits test, n = 200, linf 8/255, pgd 1 (weak, steps 50)",
        "digits test, n = 200, linf 8/255, pgd 1 (weak, steps 100)",
    ]


UNUSUAL: dict[str, dict[str, Any]] = {
    "autoattack 1": AUTOATTACK,
    "autoattack 1 (suite rand)": {**AUTOATTACK, "suite": "rand"},
    "autoattack 1 (suite plus, engine reference)": {
        **AUTOATTACK, "suite": "plus", "engine": "reference",
    },
    "autoattack 1 (attacks ['square'])": {**AUTOATTACK, "attacks": ["square"]},
    "adaptive 1 (steps 1)": {"name": "adaptive", "version": "1", "steps": 1, "restarts": 3},
    "curve 1 (weak, eps [0.1])": {"name": "curve", "version": "1", "points": 8, "eps": [0.1]},
    "paper/hpm 1 (weak)": {"name": "paper/hpm", "version": "1", "step_size": "2/255"},
    "zzz 1": {"name": "zzz", "version": "1", "steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("said", UNUSUAL)
def test_parameters_that_are_not_as_shipped_are_told(said: str) -> None:
    """Though nothing else in the report differs; of a protocol of the user's own nobody knows."""
    assert len(UNUSUAL) == 8
    (entry,) = entries(results(protocol=UNUSUAL[said]))
    (board,) = leaderboard.boards(groups([entry]))
    assert board.title == f"digits test, n = 200, linf 8/255, {said}"
    assert protocol_of(entry) == said


def test_a_sweep_stands_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    jumps(tmp_path, (10, 0.5, 2, 0))
    (board,) = leaderboard.boards(groups(find([tmp_path])))
    sheet = board.sheet()
    column = sheet.headings.index("defense.jump")
    assert [row[column] for row in sheet.rows] == ["0", "0.5", "2", "10"]
    assert all(
        "[" in row[sheet.headings.index(key)] for key in ("clean", "robust") for row in sheet.rows
    )
    put(tmp_path / "base", 150)
    ranked, swept = leaderboard.boards(groups(find([tmp_path])))
    assert len(ranked.groups) == 5 and ranked.sheet().rows[0][0] == "none"
    assert [row[column] for row in swept.sheet().rows] == ["0", "0.5", "2", "10"]


def test_values_are_said_as_one_would_type_them() -> None:
    said = [text_of(value) for value in (True, None, 0.1 + 0.2, 1e-05, 3, "x")]
    assert said == ["true", "-", "0.3", "1e-05", "3", "x"]


def test_a_sweep_leaves_out_what_it_did_not_vary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither their rows nor their conditions stand in the way."""
    jumps(tmp_path, (0, 1, 2))
    put(tmp_path / "base", 150, threat={"eps": 0.5})
    assert main(["report", str(tmp_path), "--sweep", "defense.jump"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("jumprelu") == 3 and "0.5" not in shown.out
    assert shown.err == "left out: 1 without defense.jump\n"
    assert main(["report", str(tmp_path), "--sweep", "threat.eps,defense"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("linf") == 4 and shown.err == ""


def test_those_that_look_alike_are_told_by_their_runs() -> None:
    first, second = results(), results(run="another", provenance={"seconds": 1.0})
    (board,) = leaderboard.boards(groups(entries(first, second)))
    sheet = board.sheet()
    assert {row[sheet.headings.index("run")] for row in sheet.rows} == {"a-run", "another"}
    (foreign,) = leaderboard.boards(groups(entries(Results(**{**vars(first), "settings": {}}))))
    assert foreign.sheet().headings[0] == "run" and foreign.sheet().rows[0][0] == "a-run"
