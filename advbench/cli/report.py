"""``advbench report``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from advbench.cli.parser import Parser
from advbench.errors import UserError
from advbench.files import write_text
from advbench.report import compare, compare_seeds, formats, leaderboard, terminal, validation
from advbench.report.collection import find, groups
from advbench.runs import directory
from advbench.text import printable


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the options. Those that name another thing to make exclude each other."""
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sweep", metavar="KEYS", help="one table over settings: KEY or KEY,KEY")
    kind.add_argument(
        "--compare",
        action="store_true",
        help="two evaluations, image by image: advbench report --compare RUN_A RUN_B",
    )
    kind.add_argument(
        "--validation",
        action="store_true",
        help="validation accuracy of trainings, to choose a setting by",
    )
    parser.add_argument(
        "--with",
        dest="others",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="compare groups, paired by training seed: --compare A1 A2 A3 --with B1 B2 B3",
    )
    parser.add_argument(
        "--mix",
        action="store_true",
        help="put other threats, data, n and protocols into one table, with a column for each",
    )
    parser.add_argument("--format", metavar="FORMAT", help=", ".join(formats.FORMATS))
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with everything")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="the figures as PNG and PDF")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a file instead of the screen")


def run(options: argparse.Namespace) -> None:
    """Do what was asked for. Raises UserError for options that do not go together."""
    paths = options.paths or [directory.OUTPUTS]
    if options.html is not None or options.plots is not None:
        _draw(paths, options)
        return
    if options.compare:
        named = options.out and formats.SUFFIXES.get(options.out.suffix)  # words need none
        form = options.format or named
        if options.others or len(options.paths) > 2:
            comparison = compare_seeds.text(options.paths, options.others or (), options.mix, form)
        else:
            comparison = compare.text(paths, options.mix, form)
        _put(comparison, options.out)
        return
    if options.others:
        raise UserError("--with names the second group of --compare: add --compare")
    if options.validation:
        table = validation.table(paths)
        form = formats.form_of(options.format, options.out)
        if form is None:
            terminal.show([table])
        else:
            _put(formats.render_validation(table, form), options.out)
        return
    form = formats.form_of(options.format, options.out)
    results = groups(find(paths))
    if options.sweep is not None:
        boards = [leaderboard.sweep(results, options.sweep.split(","), options.mix)]
        if bare := len(results) - len(boards[0].groups):
            print(printable(f"left out: {bare} without {options.sweep}"), file=sys.stderr)
    else:
        boards = leaderboard.boards(results, options.mix)
    if form is None:
        terminal.show(boards)
    else:
        _put(formats.render(boards, form), options.out)
    apart = leaderboard.apart(boards)
    if apart and form in (None, "md", "latex"):
        print(printable(f"{apart}: --mix puts them into one table"), file=sys.stderr)


def _draw(paths: list[Path], options: argparse.Namespace) -> None:
    """The page, the figures, or both. Raises UserError beside options of tables."""
    tables = ("sweep", "compare", "validation", "mix", "format", "out")
    beside = [f"--{key}" for key in tables if getattr(options, key)]
    if beside:
        raise UserError(f"{beside[0]} is for tables: leave it out beside --html and --plots")
    if options.html is not None:
        from advbench.report import page

        page.write(paths, options.html)
    if options.plots is not None:
        from advbench.report import figures

        figures.save(paths, options.plots)


def _put(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)


def main(arguments: list[str]) -> int:
    parser = Parser("advbench report", description="Tables of the results below some folders.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: outputs")
    declare(parser)
    run(parser.parse_args(arguments))
    return 0
