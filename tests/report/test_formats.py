"""Every format of a table: whole numbers, nothing cut off, nothing that runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up_results import NASTY, entries, put, results, seeds
from rich.console import Console

from advbench.cli.main import main
from advbench.report import formats, leaderboard, terminal
from advbench.report.collection import groups


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


def test_a_latex_caption_carries_no_footnotes() -> None:
    """How to read the table is a comment, for the paper says it once."""
    text = formats.render(nasty(), "latex")
    (caption,) = [line for line in text.splitlines() if line.startswith("\\caption")]
    assert "Wilson" not in caption
    assert any(line.startswith("% robust: an upper bound") for line in text.splitlines())


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
