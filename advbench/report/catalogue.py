"""What there is to choose from: the shipped configs, one line each."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from advbench import config
from advbench.console import table_console
from advbench.errors import UserError, did_you_mean
from advbench.files import write_text

GROUPS = (*config.GROUPS, "experiment")


def _group(word: str) -> str:
    """The group that a word means, in singular or plural. Raises UserError for another word."""
    for group in GROUPS:
        if word in (group, f"{group}s"):
            return group
    raise UserError(f"no group '{word}'{did_you_mean(word, GROUPS)}")


def header(text: str) -> tuple[str, str]:
    """The command and the description in the comments that open a config."""
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
    comments = [line for line in comments if not line.startswith("@")]  # Hydra's own
    command, description = (*comments, "", "")[:2]
    return command, description


def show(word: str | None) -> None:
    """Print the options of a group, or of all groups. Raises UserError for an unknown group."""
    console = table_console()
    for group in GROUPS if word is None else (_group(word),):
        options = config.options(group)
        if not options:
            continue
        table = Table(title=group, title_justify="left", box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        table.show_header = False
        for name, file in options.items():
            table.add_row(name, escape(header(file.read_text(encoding="utf-8"))[1]))
        console.print(table)
        console.print()


def copy(name: str, folder: Path) -> Path:
    """Copy a shipped config, ``GROUP/NAME``, below ``folder``; returns the new file.

    Raises UserError for an unknown config, and rather than overwrite a file.
    """
    group, _, option = name.removesuffix(".yaml").partition("/")
    group = _group(group)
    options = config.options(group)
    if option not in options:
        raise UserError(f"no config '{name}'{did_you_mean(option, options)}")
    target = folder / group / f"{option}.yaml"
    if target.exists():
        raise UserError(f"'{target}' exists already: move it away first")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = resources.files("advbench.configs") / group / f"{option}.yaml"
    write_text(target, source.read_text(encoding="utf-8"))
    return target
