"""Tables as Markdown, CSV, JSON and LaTeX.

All text may come from somebody else's results.json, so each format escapes all of it.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advbench.errors import UserError, did_you_mean
from advbench.report.collection import NAMES, Group, Mean, varying
from advbench.report.leaderboard import Board, Sheet, value_of
from advbench.report.validation import Table
from advbench.text import printable

SCHEMA = "advbench.report/1"
SUFFIXES = {".md": "md", ".csv": "csv", ".json": "json", ".tex": "latex"}

_LATEX = {
    **{char: f"\\{char}" for char in "{}$&#_%"},
    "\\": "\\textbackslash{}",
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "''",
    "±": "$\\pm$",
    # At the start of a row these would be read as an option of the line break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def render(boards: Sequence[Any], form: str) -> str:
    """The tables as text of one of FORMATS. Raises UserError for another format."""
    if form == "html":
        raise UserError("--format is for tables; the page is made with: --html FILE")
    if form not in FORMATS:
        raise UserError(f"no format '{form}'{did_you_mean(form, FORMATS)}")
    return FORMATS[form](boards)


def render_validation(table: Table, form: str) -> str:
    """The validation results of trainings as text of one of FORMATS.

    Raises:
        UserError: For another format.
    """
    if form == "csv":
        return _csv_rows(table.records())
    if form == "json":
        return (
            json.dumps({"schema": "advbench.validation/1", "rows": table.records()}, indent=2)
            + "\n"
        )
    return render([table], form)


def notes_of(sheets: Sequence[Sheet]) -> list[str]:
    """Each note once."""
    return list(dict.fromkeys(note for sheet in sheets for note in sheet.notes))


# --- Markdown and LaTeX: what a person reads ----------------------------------------------------


def _markdown(boards: Sequence[Board | Table]) -> str:
    sheets = [board.sheet() for board in boards]
    notes = [f"- {note}" for note in _markdown_text(notes_of(sheets))]
    return "\n".join([*map(_markdown_sheet, sheets), *notes, ""])


def _markdown_sheet(sheet: Sheet) -> str:
    rule = ["---:" if right else ":---" for right in sheet.right]
    body = [_markdown_text(sheet.headings), rule, *map(_markdown_text, sheet.rows)]
    lines = [f"| {' | '.join(row)} |" for row in body]
    (title,) = _markdown_text([sheet.title])
    return "\n".join([f"### {title}", "", *lines, ""])


def _markdown_text(texts: Sequence[str]) -> list[str]:
    return [
        "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!&" else char for char in printable(text))
        for text in texts
    ]


def _latex(boards: Sequence[Board | Table]) -> str:
    return "\n".join(
        ["% \\usepackage{booktabs}", *(_latex_sheet(board.sheet()) for board in boards)]
    )


def _latex_sheet(sheet: Sheet) -> str:
    align = "".join("r" if right else "l" for right in sheet.right)
    rows = [" & ".join(map(latex_text, row)) + " \\\\" for row in sheet.rows]
    caption = f"{latex_text(sheet.title)}."
    return "\n".join(
        [
            *(f"% {latex_text(note)}" for note in sheet.notes),
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{caption}}}",
            f"\\begin{{tabular}}{{{align}}}",
            "\\toprule",
            " & ".join(map(latex_text, sheet.headings)) + " \\\\",
            "\\midrule",
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def latex_text(text: str) -> str:
    """Text that compiles with any engine: letters lose their accents, other signs become '?'."""
    plain = []
    for char in printable(text):
        near = char if char in _LATEX else unicodedata.normalize("NFKD", char)
        plain += [c for c in near if not unicodedata.combining(c)]
    return "".join(_LATEX.get(char, char if char.isascii() else "?") for char in plain)


# --- CSV and JSON: what a program reads ---------------------------------------------------------


def _records(groups: Sequence[Group], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Rows in full precision, flat. settings: keys to tell beside the names."""
    estimated = any(group.estimates for group in groups)
    return [_record(group, settings, estimated) for group in groups]


def _record(group: Group, settings: Sequence[str], estimated: bool) -> dict[str, Any]:
    """One of the rows. estimated: whether one of them has an estimate."""
    first = group.first
    conditions = first.conditions
    inside = {k: v for k, v in conditions.items() if k.startswith("protocol.")}
    version = inside.pop("protocol.version")
    return {
        **{key: conditions[key] for key in ("data", "data.split", "data.sha256", "n")},
        **{key: conditions[key] for key in ("threat.norm", "threat.eps", "protocol")},
        "protocol.version": version,
        "protocol.parameters": json.dumps(inside),
        **{key: value_of(first, key) for key in NAMES},
        **{key: first.results.settings.get(key) for key in settings if key not in NAMES},
        "runs": len(group.entries),
        "seeds": ";".join(map(str, group.seeds)),
        **_spread("clean", group.clean),
        **_spread("robust", group.robust),
        **(_estimated(group) if estimated else {}),
        "verdict": group.verdict,
        "missing": ";".join(first.results.missing),
        "decided": group.unfinished and group.unfinished.decided,
        "to_decide": group.unfinished and group.unfinished.of,
        "seconds": group.seconds,
        "passes": group.passes,
        "folders": ";".join(entry.folder.as_posix() for entry in group.entries),
    }


def _spread(name: str, mean: Mean | None) -> dict[str, Any]:
    if mean is None:
        return dict.fromkeys((name, f"{name}_sd", f"{name}_low", f"{name}_high"))
    low, high = mean.ci95 or (None, None)
    return {name: mean.acc, f"{name}_sd": mean.sd, f"{name}_low": low, f"{name}_high": high}


def _estimated(group: Group) -> dict[str, Any]:
    known = group.estimates
    return {
        **_spread("estimate", group.estimate),
        "estimate_of": known[0].of if known else None,
        "audited": sum(estimate.audited for estimate in known) if known else None,
        "survivors": sum(estimate.survivors for estimate in known) if known else None,
    }


def _csv(boards: Sequence[Board]) -> str:
    """One flat table of all rows, in full precision; a sweep's rows stand in it once."""
    groups = list({id(group): group for board in boards for group in board.groups}.values())
    keys = varying(group.first for group in groups)
    return _csv_rows(_records(groups, keys))


def _csv_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_cell(value) for key, value in row.items()})
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    """Words that a spreadsheet would take for a formula get an apostrophe."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _json(boards: Sequence[Board]) -> str:
    keys = varying(group.first for board in boards for group in board.groups)
    tables = [
        {
            "title": board.title,
            "conditions": board.conditions,
            "differing": list(board.differing),
            "swept": list(board.swept),
            "rows": [
                {
                    **record,
                    "evaluations": [
                        {"folder": entry.folder.as_posix(), **entry.results.to_json()}
                        for entry in group.entries
                    ],
                }
                for group, record in zip(board.groups, _records(board.groups, keys), strict=True)
            ],
        }
        for board in boards
    ]
    return json.dumps({"schema": SCHEMA, "tables": tables}, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Any]], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "latex": _latex,
}


def form_of(form: str | None, out: Path | None) -> str | None:
    """The format that was named, or that the file's name tells; None for a terminal's tables.

    Raises UserError for a file that tells none.
    """
    if form is not None or out is None:
        return form
    if out.suffix not in SUFFIXES:
        raise UserError(f"'{out}' could be in any format: add --format {'|'.join(FORMATS)}")
    return SUFFIXES[out.suffix]
