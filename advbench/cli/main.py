"""The command line: ``advbench SUBCOMMAND ...``.

``train`` and ``eval`` are Hydra applications on the packaged configs; the others are plain.
A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version

from advbench.cli import explain, hydra_app
from advbench.errors import UserError, did_you_mean

HELP = """advbench - train adversarial defenses and measure how robust they are

usage: advbench SUBCOMMAND ...

  advbench doctor                       what is installed, and a test of the attacks
  advbench train                        train on the embedded digits with PGD adversarial training
  advbench eval                         attack the newest training run with AutoAttack
  advbench list [GROUP]                 all options: data, backbones, defenses, recipes, ...
  advbench list runs [PATH ...]         all runs, and the command that resumes each
  advbench report outputs               tables of all results; --html FILE for a page
  advbench report --compare A B         compare two evaluations image by image
  advbench copy GROUP/NAME DIR          copy a shipped config, to change it and use --config-dir DIR
  advbench verify outputs/eval/RUN      score its adversarial images again: does the number stand?
  advbench export outputs/eval/RUN      a RobustBench entry, and the fields left to fill in

Settings follow as KEY=VALUE, in any order:

  advbench train data=cifar10 data.download=true backbone=resnet18 threat=linf_8
  advbench train recipe=standard trainer.epochs=10 optimizer.lr=0.05 seed=1
  advbench train -m seed=1,2,3                        several runs, one after the other
  advbench train -m hydra/launcher=joblib seed=1,2,3  ... or side by side (also submitit_slurm, ray)
  advbench eval run=outputs/train/RUN protocol=pgd n=1000 budget=10min
  advbench eval model=my_model.py:build weights=my.pt data=npz data.path=test.npz threat=linf_8
  advbench eval model=robustbench:cifar10/Linf/NAME data.download=true

  advbench SUBCOMMAND --help            every setting of the subcommand, with its value
  advbench train -q ...                 print the outcome only, in one line (eval too)
  advbench -sc install=bash             how to install completion (or zsh, fish)
  advbench --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after ``advbench``; None takes those of this process.

    Returns:
        The exit code: 0; 2 for a user's mistake; others as the subcommands say.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Let Hydra hand its errors on instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with suppress(AttributeError, ValueError):  # names of files may be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore
    try:
        return _written(_dispatch(arguments))
    except KeyboardInterrupt:
        _say("\ninterrupted; repeat the command to resume")
        return 130
    except BrokenPipeError:
        return _written(141)
    except Exception as problem:
        return _written(_refuse(problem))


def _written(status: int) -> int:
    """The exit code, once all is printed; another one where that can't be."""
    from advbench.console import discard

    try:
        sys.stdout.flush()
    except OSError as problem:  # said already where it is not of now
        discard(sys.stdout)
        closed = isinstance(problem, BrokenPipeError)
        return status or (141 if closed else _refuse(problem))
    except (AttributeError, ValueError):  # there is none, or it is closed
        pass
    return status


def _say(text: str) -> None:
    """A line on the standard error, if it can be written."""
    with suppress(AttributeError, OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _lazy(module: str, function: str) -> Callable[[list[str]], int]:
    """A subcommand whose module is imported when it runs: some of them import torch."""

    def call(arguments: list[str]) -> int:
        return getattr(import_module(f"advbench.cli.{module}"), function)(arguments)

    return call


def _refuse(problem: Exception) -> int:
    """Print a user's mistake in one line and return its exit code; raise a bug of ours again."""
    message = explain.of(problem)
    if message is None:
        raise problem
    from advbench.text import printable

    _say(f"advbench: {printable(message)}")
    return 2


def _dispatch(arguments: list[str]) -> int:
    if any(word in ("-sc", "--shell-completion", "--shell_completion") for word in arguments):
        return hydra_app.complete(arguments, list(SUBCOMMANDS))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "-V" or "--version" in arguments:  # which Hydra would answer with its own
        print(f"advbench {version('advbench')}")
        return 0
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        raise UserError(
            f"there is no subcommand '{name}'{did_you_mean(name, SUBCOMMANDS)} (advbench --help)"
        )
    return SUBCOMMANDS[name](rest)


SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": partial(hydra_app.run, "train"),
    "eval": partial(hydra_app.run, "eval"),
    "report": _lazy("report", "main"),
    "list": _lazy("options", "list_main"),
    "copy": _lazy("options", "copy_main"),
    "doctor": _lazy("doctor", "main"),
    "export": _lazy("export", "main"),
    "verify": _lazy("verify", "main"),
}


if __name__ == "__main__":
    sys.exit(main())
