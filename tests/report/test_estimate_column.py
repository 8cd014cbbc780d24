"""Estimates of a stronger suite in tables and on the page: shown, and never ranked by."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from made_up_results import entries, put, results
from rich.console import Console

from advbench.cli.main import main
from advbench.report import formats, leaderboard, terminal
from advbench.report.collection import Group, groups
from advbench.runs.accuracy import Estimate

EXPRESS = {"name": "express", "version": "1", "audit": 64, "seed": 0}


def estimate(held: int, broken: int, audited: int = 40, n: int = 200) -> Estimate:
    acc = held / n * (1 - broken / audited)
    return Estimate("AutoAttack", acc, (acc - 0.02, acc + 0.01), held, audited, broken)


def made(held: int, broken: int | None, name: str, seed: int = 0) -> dict[str, object]:
    return {
        "protocol": EXPRESS,
        "settings": {"backbone": name, "seed": seed},
        "estimate": None if broken is None else estimate(held, broken),
    }


def found() -> list[Group]:
    """The second has the higher estimate; the third has none; two seeds are one row."""
    rows: Any = [
        (100, 8, "first", 0),
        (98, 0, "second", 0),
        (97, None, "third", 0),
        (90, 4, "seeds", 0),
        (92, 0, "seeds", 1),
    ]
    values = [results(row[0], **made(*row)) for row in rows]
    return groups(entries(*values))


def test_a_table_shows_estimates_and_ranks_by_what_was_proven() -> None:
    (board,) = leaderboard.boards(found())
    sheet = board.sheet()
    column, names = sheet.headings.index("estimate"), sheet.headings.index("backbone")
    assert sheet.headings[column - 1] == "robust" and sheet.right[column]
    assert [row[names] for row in sheet.rows] == ["first", "second", "third", "seeds"]
    assert [row[column] for row in sheet.rows] == [
        "40.0 [38.0, 41.0] (40 of 100)",
        "49.0 [47.0, 50.0] (40 of 98)",
        "-",
        "43.2 ± 3.9 (80 of 182)",
    ]
    assert leaderboard.READING_ESTIMATE in sheet.notes


def test_every_format_has_them() -> None:
    shown = leaderboard.boards(found())
    for form in ("md", "latex"):
        text = formats.render(shown, form)
        assert "estimate" in text and "(40 of 98)" in text and "exact 95" in text
    rows = {
        row["backbone"]: row for row in csv.DictReader(io.StringIO(formats.render(shown, "csv")))
    }
    assert (rows["second"]["estimate"], rows["second"]["estimate_of"]) == ("0.49", "AutoAttack")
    assert (rows["second"]["audited"], rows["second"]["survivors"]) == ("40", "98")
    assert rows["third"]["estimate"] == rows["third"]["audited"] == ""
    (table,) = json.loads(formats.render(shown, "json"))["tables"]
    assert table["rows"][1]["estimate_low"] == pytest.approx(0.47)
    assert table["rows"][1]["evaluations"][0]["estimate"]["broken"] == 0


def test_without_an_estimate_there_is_no_column() -> None:
    shown = leaderboard.boards(groups(entries(results(100), results(90))))
    for form in formats.FORMATS:
        text = formats.render(shown, form)
        assert "audited" not in text and "estimate_" not in text
    assert all("estimate" not in board.sheet().headings for board in shown)


def test_the_screen_and_the_page_show_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "first", 100, **made(100, 8, "first"))
    put(tmp_path / "third", 97, **made(97, None, "third"))
    for width in (140, 80, 60):
        console = Console(width=width, force_terminal=True, color_system=None, highlight=False)
        monkeypatch.setattr(terminal, "table_console", lambda console=console: console)
        assert main(["report", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        assert "estimate" in text and "(40 of 100)" in text and "[38.0, 41.0]" in text, width
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert '<td class="c-estimate" data-sort="0.4">' in page
    assert '<span class="ci">40 of 100</span>' in page and 'data-key="estimate"' in page
    assert '<td class="c-estimate" data-sort="0"><span class="tag">estimate</span>-</td>' in page
    put(tmp_path / "plain" / "a", 100)
    assert main(["report", str(tmp_path / "plain"), "--html", str(tmp_path / "plain.html")]) == 0
    assert "c-estimate" not in (tmp_path / "plain.html").read_text().partition("</style>")[2]
