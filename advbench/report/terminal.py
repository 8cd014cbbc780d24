"""Tables for a terminal, as wide as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich import box
from rich.markup import escape
from rich.table import Table

from advbench.console import table_console
from advbench.report.collection import UNKNOWN
from advbench.report.formats import notes_of
from advbench.report.leaderboard import COSTS, Board, Sheet
from advbench.report.validation import Table as Validation
from advbench.text import printable

GAP = 3
"""Blanks between two columns."""


def show(boards: Sequence[Board | Validation]) -> None:
    """Print the tables for a person."""
    console = table_console()
    sheets = [board.sheet() for board in boards]
    for sheet in sheets:
        fitted = _fitted(sheet, console.width)
        console.print(_table(fitted, complete=_width(fitted) <= console.width))
        console.print()
    for note in notes_of(sheets):
        console.print(_rich(note), style="dim")


def _rich(text: str) -> str:
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def _table(sheet: Sheet, complete: bool) -> Table:
    """complete: it fits. Otherwise numbers are folded: a number cut off would be another number."""
    table = Table(
        title=_rich(sheet.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading, right in zip(sheet.headings, sheet.right, strict=True):
        side = "right" if right else "left"
        table.add_column(_rich(heading), justify=side, overflow="fold", no_wrap=right and complete)
    for row in sheet.rows:
        table.add_row(*map(_rich, row))
    return table


def _fitted(sheet: Sheet, width: int) -> Sheet:
    """The sheet, made narrower step by step as long as it is too wide."""
    steps: tuple[Callable[[Sheet], Sheet], ...] = (
        _common_words_up,
        _intervals_below,
        _one_model,
        _without_costs,
    )
    for step in steps:
        if _width(sheet) > width:
            sheet = step(sheet)
    return sheet


def _width(sheet: Sheet) -> int:
    columns = zip(sheet.headings, *sheet.rows, strict=True)
    return sum(max(len(line) for c in column for line in c.split("\n")) + GAP for column in columns)


def _common_words_up(sheet: Sheet) -> Sheet:
    """Words that stand in every row of several stand in the title instead."""
    if len(sheet.rows) == 1:
        return sheet
    columns = list(zip(*sheet.rows, strict=True))
    common = [not right and len(set(c)) == 1 for c, right in zip(columns, sheet.right, strict=True)]
    words = [c[0] for c, out in zip(columns, common, strict=True) if out and c[0] != UNKNOWN]
    shortened = _columns(sheet, [i for i, out in enumerate(common) if not out])
    return replace(shortened, title=", ".join([sheet.title, *words]))


def _columns(sheet: Sheet, indices: Sequence[int]) -> Sheet:
    """Some of the columns."""
    return replace(
        sheet,
        headings=tuple(sheet.headings[i] for i in indices),
        right=tuple(sheet.right[i] for i in indices),
        rows=tuple(tuple(row[i] for i in indices) for row in sheet.rows),
    )


def _intervals_below(sheet: Sheet) -> Sheet:
    """Intervals, and the parts of an unfinished result, on lines of their own."""

    def broken(text: str, right: bool) -> str:
        return re.sub(r"(:|,|\d|\]) (?=\[|\(|at most|\d+ of )", r"\1\n", text) if right else text

    rows = [map(broken, row, sheet.right) for row in sheet.rows]
    return replace(sheet, rows=tuple(map(tuple, rows)))


def _one_model(sheet: Sheet) -> Sheet:
    """All words in one column."""

    def joined(row: Sequence[str]) -> tuple[str, ...]:
        words = [text for text, right in zip(row, sheet.right, strict=True) if not right]
        numbers = [text for text, right in zip(row, sheet.right, strict=True) if right]
        return ", ".join(text for text in words if text not in ("", UNKNOWN)), *numbers

    headings = [h for h, right in zip(sheet.headings, sheet.right, strict=True) if right]
    rows = tuple(joined(row) for row in sheet.rows)
    return Sheet(
        sheet.title, ("model", *headings), (False, *(True for _ in headings)), rows, sheet.notes
    )


def _without_costs(sheet: Sheet) -> Sheet:
    """Without what the evaluations cost."""
    return _columns(sheet, [i for i, word in enumerate(sheet.headings) if word not in COSTS])
