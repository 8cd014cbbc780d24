"""``advbench report``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from advbench.files import write_text
from advbench.report import compare, formats, leaderboard
from advbench.report.collection import find, groups

OUTPUTS = Path("outputs")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the options. Those that name another thing to make exclude each other."""
    parser.add_argument("--sweep", metavar="KEYS", help="one table over settings: KEY or KEY,KEY")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="two evaluations, image by image: advbench report --compare RUN_A RUN_B",
    )
    parser.add_argument(
        "--mix",
        action="store_true",
        help="put other threats, data, n and protocols into one table, with a column for each",
    )
    parser.add_argument("--format", metavar="FORMAT", help=", ".join(formats.FORMATS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="a file instead of the screen")


def run(given: argparse.Namespace) -> None:
    """Do what was asked for. Raises UserError for options that do not go together."""
    paths = given.paths or [OUTPUTS]
    form = formats.form_of(given.format, given.out)
    if given.compare:
        _put(compare.told(compare.of(paths, given.mix), form), given.out)
        return
    found = groups(find(paths))
    if given.sweep is not None:
        boards = [leaderboard.sweep(found, given.sweep.split(","), given.mix)]
    else:
        boards = leaderboard.boards(found, given.mix)
    if form is None:
        formats.show(boards)
    else:
        _put(formats.render(boards, form), given.out)
    apart = leaderboard.apart(boards)
    if apart and form in (None, "md", "latex"):
        print(f"{apart}: --mix puts them into one table", file=sys.stderr)


def _put(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
