"""``advbench export``."""

from __future__ import annotations

from pathlib import Path

from advbench.cli.parser import Parser


def main(arguments: list[str]) -> int:
    from advbench.report import model_info

    parser = Parser(
        "advbench export",
        description="An evaluation as a model_info file of RobustBench; what it can't know is "
        "empty, to be filled in.",
    )
    parser.add_argument("run", help="the directory of a finished evaluation")
    parser.add_argument("--out", metavar="FILE", help="default: print it")
    options = parser.parse_args(arguments)
    model_info.export(Path(options.run), None if options.out is None else Path(options.out))
    return 0
