"""Reports: what may be ranked with what, intervals and tests against closed forms, every format."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import optimize, stats

from advbench.cli.main import main
from advbench.errors import UserError
from advbench.evaluation.store import Records, Store, clear_journal
from advbench.report import compare, formats, leaderboard, terminal
from advbench.report.collection import Entry, Mean, find, groups, varying
from advbench.report.conditions import protocol_of, text_of
from advbench.runs.results import Accuracy, Results, StageResult, wilson

MODEL = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""
SETTINGS = {"backbone": "convnet", "defense": "none", "recipe": "pgd_at", "seed": 0}
DATA = {"name": "digits", "split": "test", "n": 200, "sha256": "c0ffee00" * 8}
THREAT = {"norm": "linf", "eps": 8 / 255}
AUTOATTACK = {"name": "autoattack", "version": "1", "suite": "standard", "seed": 0}
PGD = {"name": "pgd", "version": "1", "steps": 50, "seed": 0}


def results(robust: int = 100, **changes: Any) -> Results:
    """Results of a plausible evaluation, in which ``robust`` images held.

    changes: of fields; those of a mapping are merged into it.
    """
    n = changes.get("data", {}).get("n", DATA["n"])
    stage = StageResult("apgd-ce", "APGD", "model", "why", robust / n, n, n - robust, 1.5, 40, 30)
    values: dict[str, Any] = {
        "run": "a-run",
        "settings": SETTINGS,
        "data": DATA,
        "threat": THREAT,
        "protocol": AUTOATTACK,
        "clean": Accuracy.of(max(n - 10, 0), n),
        "robust": Accuracy.of(robust, n),
        "stages": (stage,),
        "provenance": {"seconds": 12.5, "model_sha256": None},
    }
    for key, value in changes.items():
        whole = key in ("protocol",) or not isinstance(values.get(key), dict)
        values[key] = value if whole else {**values[key], **value}
    return Results(**values)


def put(folder: Path, robust: int = 100, **changes: Any) -> Path:
    """An evaluation directory with results and nothing else."""
    folder.mkdir(parents=True)
    results(robust, **changes).save(folder / "results.json")
    return folder


def jumps(folder: Path, values: Sequence[float], **changes: Any) -> None:
    """A sweep of a retrofit, the more robust the smaller its rest by 7."""
    for jump in values:
        settings = {"defense": "jumprelu", "defense.jump": jump}
        name = "-".join([str(jump), *map(str, changes)])
        put(folder / name, 100 + int(10 * jump) % 7, settings=settings, **changes)


def entries(*found: Results) -> list[Entry]:
    return [Entry(Path(f"run{i}"), each) for i, each in enumerate(found)]


# --- groups over seeds --------------------------------------------------------------------------


def test_seeds_have_a_mean_a_deviation_and_the_interval_of_their_images() -> None:
    mean = Mean.of([Accuracy.of(160, 200), Accuracy.of(180, 200)], 200)
    assert (mean.acc, mean.count) == (pytest.approx(0.85), 2)
    assert mean.sd == pytest.approx(0.1 / math.sqrt(2))
    assert mean.ci95 == pytest.approx(wilson(170, 200))  # not that of 400 images
    one = Accuracy.of(160, 200)
    assert Mean.of([one], 200) == Mean(one.acc, None, 1, one.ci95)


def seeds(*numbers: int | None, **changes: Any) -> list[Results]:
    extra = changes.pop("settings", {})
    return [results(settings={"seed": seed, **extra}, **changes) for seed in numbers]


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
    verdict = sheet.headings.index("verdict")
    assert [row[verdict] for row in sheet.rows] == ["-", "-", "-", "unfinished"]


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
    begun = results().stages[0]
    found = entries(
        unattacked(),
        results(50, protocol=PGD),
        results(190, stages=(replace(begun, attacked=0),), missing=("apgd-ce",)),
        results(120, stages=(begun,), missing=("apgd-ce",)),
    )
    (mixed,) = leaderboard.boards(groups(found), mix=True)
    shown = mixed.sheet()
    column = shown.headings.index("robust")
    assert [row[column].partition(" ")[0] for row in shown.rows] == ["25.0", "60.0", "-", "-"]
    assert leaderboard.READING_CLEAN in shown.notes
    rows = list(csv.DictReader(io.StringIO(formats.render([mixed], "csv"))))
    kept = [(row["robust"], row["robust_sd"], row["robust_low"]) for row in rows]
    assert kept[2:] == [("", "", "")] * 2 and float(kept[0][0]) == 0.25
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


# --- the command --------------------------------------------------------------------------------


def test_two_threats_are_two_tables_and_mix_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jumps(tmp_path, (0, 1, 2))
    jumps(tmp_path, (0, 1, 2), threat={"eps": 0.5})
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("robust   ") == 2
    assert "linf 8/255, linf 0.5" in shown.err and "--mix" in shown.err
    wanted = ["report", str(tmp_path), "--sweep", "defense.jump"]
    assert main(wanted) == 2
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err.count("\n") == 1
    assert "threat (linf 8/255, linf 0.5)" in refused.err and "add --mix" in refused.err
    assert main([*wanted, "--mix"]) == 0
    assert capsys.readouterr().out.count("linf") == 6
    assert main(["report", str(tmp_path), "--sweep", "threat.eps,defense.jump"]) == 0
    swept = capsys.readouterr().out
    assert swept.count("linf 8/255") == swept.count("linf 0.5") == 3
    assert main(["report", str(tmp_path), "--mix", "--format", "md"]) == 0
    mixed = capsys.readouterr()
    assert mixed.out.count("###") == 1 and mixed.err == ""


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no folder": (["nowhere"], "there is no 'nowhere'"),
    "no results": (["empty"], "there are no results in empty: make some with 'advbench eval'"),
    "no key": (["good", "--sweep", "defence"], "did you mean 'defense'?"),
    "no format": (["good", "--format", "markdown"], "there is: csv, json, latex, md"),
    "no suffix": (["good", "--out", "table.txt"], "add --format md|csv|json|latex"),
    "no option": (["good", "--frmat", "md"], "--frmat"),
    "one": (["--compare", "good"], "--compare takes two evaluations"),
    "none": (["--compare"], "--compare takes two evaluations"),
    "many": (["--compare", "good", "."], "'.' holds 2 evaluations: name the directory of one"),
    "both": (["--compare", "good", "good", "--sweep", "x"], "not allowed with"),
    "as a table": (["--compare", "good", "other", "--format", "csv"], "--format json"),
    "no records": (["--compare", "good", "other"], "has no samples.parquet"),
    "by its name": (["--compare", "good", "other", "--out", "table.csv"], "--format json"),
    "no place": (["good", "--out", "no/where.md"], "can't use 'no/where.md'"),
    "a folder": (["good", "--out", "empty", "--format", "md"], "can't use 'empty'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(MISTAKES) == 15
    monkeypatch.chdir(tmp_path)
    put(Path("good"))
    put(Path("other"))
    Path("empty").mkdir()
    command, message = MISTAKES[case]
    assert main(["report", *command]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("advbench: ") and message in shown.err


DAMAGED: list[tuple[str, Any]] = [
    ("schema", "advbench.results/9"),
    ("schema", "\x1b[31m\n"),
    ("robust", {"acc": 1.5, "ci95": [0.1, 0.2]}),
    ("clean", {"acc": float("nan"), "ci95": [0.1, 0.2]}),
    ("settings", {"defense": ["a", "list"]}),
    ("settings", {"defense.jump": 1e999}),
    ("data", {"name": "digits", "n": "many"}),
    ("data", {"name": "digits", "n": True}),
    ("data", {"name": "digits", "n": 10**30}),
    ("threat", {"norm": "linf"}),
    ("threat", {"norm": "linf", "eps": 10**400}),
    ("protocol", {"name": ["autoattack"], "version": "1"}),
    ("protocol", {"name": "pgd", "version": "1", "seed": []}),
    ("stages", [{"name": "apgd"}]),
    ("stages", [{**vars(results().stages[0]), "robust_acc": 1.5}]),
    ("stages", [{**vars(results().stages[0]), "broken": -1}]),
    ("verdict", []),
    ("measures", {"wra": float("nan")}),
    ("missing", 3),
    ("provenance", {}),
    ("provenance", {"seconds": 1, "model_sha256": 5}),
]


@pytest.mark.parametrize("case", range(len(DAMAGED)))
def test_a_damaged_file_hides_no_other(
    case: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(DAMAGED) == 21
    key, value = DAMAGED[case]
    put(tmp_path / "good")
    bad = put(tmp_path / "bad") / "results.json"
    text = json.dumps({**json.loads(bad.read_text()), key: value})
    bad.write_text(text.replace("Infinity", "1e999"))
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "convnet" in shown.out
    assert shown.err.startswith("left out: ") and shown.err.count("\n") == 1
    assert "\x1b" not in shown.err
    assert main(["report", str(bad.parent)]) == 2


def test_hundreds_are_read_quickly_and_without_torch(tmp_path: Path) -> None:
    for i in range(500):
        changes = {"settings": {"seed": i % 5, "defense.jump": i // 5}, "protocol": AUTOATTACK}
        put(tmp_path / str(i), i % 200, **changes)
    code = (
        "import sys, time;"
        f"from advbench.cli import main; main(['report', {str(tmp_path)!r}]);"
        "assert not {'torch', 'pyarrow', 'matplotlib'} & set(sys.modules);"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("convnet") == 100
    assert float(done.stdout.split()[-1]) < 3.0


def test_real_runs_are_averaged_over_their_seeds_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    quick = ["recipe=standard", "trainer.epochs=1", "threat.eps=0.1"]
    assert main(["train", "-m", "seed=1,2", *quick]) == 0
    trained = sorted(str(path) for path in Path("outputs/train").glob("digits-*"))
    attack = ["protocol=pgd", "protocol.steps=2", "n=40"]
    assert main(["eval", "-m", f"run={','.join(trained)}", *attack]) == 0
    own = ["eval", "model=m.py:build", "data=digits", "threat=linf_8", "threat.eps=0.1"]
    assert main([*own, *attack]) == 0
    found = groups(find([Path("outputs")]))
    (ours,) = (group for group in found if len(group.entries) == 2)
    (foreign,) = (group.first for group in found if group is not ours)
    assert (ours.seeds, ours.first.data, ours.first.threat_name) == ([1, 2], "digits", "linf 0.1")
    settings = ours.first.results.settings
    known = ("training.data", "training.threat", "optimizer.lr", "init_from", "data.augment.flip")
    assert [settings[key] for key in known] == ["digits", "linf 0.1", 0.1, None, False]
    assert [entry.training for entry in ours.entries] == list(map(Path, trained))
    assert (foreign.name("model"), foreign.seed, foreign.training) == ("m.py:build", None, None)
    capsys.readouterr()
    assert main(["report"]) == 0
    table = capsys.readouterr().out
    assert " ± " in table and "m.py:build" in table and table.count("digits test") == 1
    two = [str(entry.folder) for entry in ours.entries]
    assert main(["report", "--compare", *two]) == 0
    assert "on the same 40 images: digits test, linf 0.1, pgd 1" in capsys.readouterr().out


# --- formats ------------------------------------------------------------------------------------

NASTY = "[red]a|b_*<b>&\\input{x}$%#~^\"'` \x1b[31m\r\n\ud800 =1+1 é→[/red]"


def nasty() -> list[leaderboard.Board]:
    found = [
        results(101, run=NASTY, settings={"defense": NASTY, "backbone": "*x", "recipe": "=1+1"}),
        results(77, settings={"defense": "=cmd()", "backbone": "[1ex]", "recipe": NASTY}),
        *seeds(0, 1, settings={"defense": "hpm", "defense.momentum": 1 / 3}),
        *seeds(0, settings={"defense": "hpm", "defense.momentum": 0.99, NASTY: NASTY}),
    ]
    return leaderboard.boards(groups(entries(*found)))


def test_nothing_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(nasty())
    shown = capsys.readouterr().out
    assert "[red]a|b" in shown and "\x1b" not in shown and "\r" not in shown
    shown.encode()


@pytest.mark.parametrize("width", (200, 100, 80, 60))
def test_numbers_stay_whole_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(terminal, "table_console", lambda: console)
    found = [
        *seeds(0, 1, settings={"defense": "hpm", "defense.momentum": 0.25}),
        results(77, run="a-name-that-is-rather-long-" * 3, settings={"defense": "sparta"}),
    ]
    terminal.show(leaderboard.boards(groups(entries(*found))))
    shown = capsys.readouterr().out
    for whole in ("38.5", "[32.0, 45.4]", "50.0 ± 0.0", "[43.1, 56.9]", "hpm", "sparta"):
        assert whole in shown
    assert ("12 s" in shown) == (width > 60)
    assert max(map(len, shown.splitlines())) <= width
    assert "convnet" in shown and ("recipe" in shown) == (width == 200)


def test_no_number_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing else helps, it goes on in the next line."""
    console = Console(width=24, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(terminal, "table_console", lambda: console)
    terminal.show(leaderboard.boards(groups(entries(results(77)))))
    shown = capsys.readouterr().out
    assert "…" not in shown and "45.4]" in shown


@pytest.mark.parametrize("form", formats.FORMATS)
def test_every_format_is_text_of_whole_lines(form: str) -> None:
    assert list(formats.FORMATS) == ["md", "csv", "json", "latex"]
    text = formats.render(nasty(), form)
    text.encode()
    assert text.endswith("\n") and not {"\x1b", "\r"} & set(text)


def test_markdown_has_as_many_cells_in_every_row() -> None:
    text = formats.render(nasty(), "md")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in rows]
    assert len(rows) == 2 + 4 and len(set(cells)) == 1
    assert "<b>" not in text.replace("\\<b\\>", "")


def test_csv_gives_back_the_same_numbers(tmp_path: Path) -> None:
    boards = nasty()
    rows = list(csv.DictReader(io.StringIO(formats.render(boards, "csv"))))
    groups_shown = [group for board in boards for group in board.groups]
    assert len(rows) == len(groups_shown) == 4
    for row, group in zip(rows, groups_shown, strict=True):
        for name, mean in (("clean", group.clean), ("robust", group.robust)):
            assert mean is not None
            assert float(row[name]) == mean.acc
            assert (float(row[f"{name}_low"]), float(row[f"{name}_high"])) == mean.ci95
            assert row[f"{name}_sd"] == ("" if mean.sd is None else repr(mean.sd))
        assert float(row["threat.eps"]) == 8 / 255 and row["protocol.version"] == "1"
    averaged = next(row for row in rows if row["runs"] == "2")
    assert (averaged["seeds"], averaged["defense.momentum"]) == ("0;1", repr(1 / 3))
    assert not any(value.startswith(("=", "@", "+")) for row in rows for value in row.values())
    assert any(row["defense"] == "'=cmd()" for row in rows)


def test_json_has_everything() -> None:
    boards = nasty()
    report = json.loads(formats.render(boards, "json"))
    assert report["schema"] == "advbench.report/1"
    (table,) = report["tables"]
    assert table["conditions"]["threat.eps"] == 8 / 255
    kept = [each for row in table["rows"] for each in row["evaluations"]]
    assert len(kept) == 5 and kept[0]["stages"][0]["name"] == "apgd-ce"
    known = [entry.results.to_json() for group in boards[0].groups for entry in group.entries]
    assert [{k: v for k, v in each.items() if k != "folder"} for each in kept] == json.loads(
        json.dumps(known)
    )


def test_latex_escapes_all_that_it_would_run() -> None:
    text = formats.latex_text(NASTY)
    bare = text
    for sign in formats._LATEX.values():
        bare = bare.replace(sign, "")
    assert not set('\\{}$&#_%^~<>|"[]*') & set(bare) and bare.isascii()
    assert formats.latex_text("é ± 1") == "e $\\pm$ 1"
    body = formats.render(nasty(), "latex").replace("\\&", "").splitlines()
    rows = [line for line in body if line.endswith("\\\\")]
    assert len({line.count("&") for line in rows}) == 1 and len(rows) == 5


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path: Path) -> None:
    table = formats.render(nasty(), "latex")
    (tmp_path / "t.tex").write_text(
        "\\documentclass[landscape]{article}\\usepackage{booktabs}\\begin{document}\n"
        f"{table}\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Misplaced" not in done.stdout and (tmp_path / "t.pdf").stat().st_size > 1000


def test_out_is_written_in_the_format_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "e")
    for suffix, start in ((".md", "### "), (".csv", "data,"), (".json", "{"), (".tex", "% ")):
        out = tmp_path / f"table{suffix}"
        assert main(["report", str(tmp_path / "e"), "--out", str(out)]) == 0
        assert out.read_text().startswith(start)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob(".*"))


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

STAGES = ("clean", "apgd-ce", "square")


def evaluated(
    folder: Path, fell: Sequence[int], ids: Sequence[int] | None = None, **more: Any
) -> Path:
    """An evaluation with records. fell: index of the stage in which each image was lost, or -1."""
    where, n = np.asarray(fell), len(fell)
    sample = np.arange(n) if ids is None else np.asarray(ids)
    more["data"] = {"n": n, **more.get("data", {})}
    clean = Accuracy.of(int((where != 0).sum()), n)
    put(folder, int((where < 0).sum()), clean=clean, **more)
    store = Store(folder)
    for stage, name in enumerate(STAGES):
        there = (where < 0) | (where >= stage)  # a later stage sees the survivors
        broken = (where == stage)[there]
        zeros = np.zeros(len(broken))
        store.append(
            name,
            Records(
                **{
                    key: np.asarray(value, Records.DTYPES[key])
                    for key, value in {
                        "sample": sample[there], "broken": broken, "label": zeros, "margin": zeros,
                        "distance": zeros, "wrong": zeros, "alone": broken, "forwards": zeros,
                        "backwards": zeros,
                    }.items()
                }
            ),
            0.0,
        )  # fmt: skip
    store.finish(list(STAGES))
    clear_journal(folder)
    return folder


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
    with pytest.raises(UserError, match="it did not finish: go on with the same command"):
        compare.of([a, b])
