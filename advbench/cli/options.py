"""``advbench list GROUP``: the shipped configs, one line each."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from advbench import config
from advbench.cli.parser import Parser
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


def own(folder: Path, group: str) -> dict[str, Path]:
    """The options of a group in a directory of the user's own, and their files."""
    files = sorted((folder / group).rglob("*.yaml"))
    return {str(file.relative_to(folder / group).with_suffix("")): file for file in files}


def show(word: str | None, folder: Path | None = None) -> None:
    """Print the options of a group, of a folder in one such as protocol/paper, or of all groups.

    folder: of the user's own options, which come first. Raises UserError for an unknown group.
    """
    console = table_console()
    word, _, inner = (word or "").partition("/")
    if folder is not None and not folder.is_dir():
        raise UserError(f"there is no directory '{folder}'")
    for group in (_group(word),) if word else GROUPS:
        options = {**config.options(group), **({} if folder is None else own(folder, group))}
        if inner:
            within = {name: f for name, f in options.items() if name.startswith(f"{inner}/")}
            folders = {name.rpartition("/")[0] for name in options} - {""}
            if not within:
                raise UserError(f"no folder '{inner}' in {group}{did_you_mean(inner, folders)}")
            options = within
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


def list_main(arguments: list[str]) -> int:
    from advbench.cli import list_runs
    from advbench.runs import directory

    parser = Parser(
        "advbench list",
        description="What there is to choose from; 'advbench list runs': what there is of runs.",
    )
    parser.add_argument(
        "group", nargs="?", help="such as defenses, or runs; without it, all groups"
    )
    parser.add_argument("paths", nargs="*", help="of 'list runs': where to look; default: outputs")
    parser.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="list options of your own too"
    )
    options = parser.parse_args(arguments)
    if options.group in ("run", "runs"):
        list_runs.show([Path(path) for path in options.paths or [directory.OUTPUTS]])
    elif options.paths:
        raise UserError(f"list {options.group} takes no paths; 'advbench list runs PATH' does")
    else:
        show(options.group, options.config_dir)
    return 0


def copy_main(arguments: list[str]) -> int:
    parser = Parser(
        "advbench copy",
        description="Copy a shipped config to a folder of your own, which --config-dir then adds.",
    )
    parser.add_argument("config", help="GROUP/NAME, such as experiment/cifar10_pgd_at")
    parser.add_argument("folder", nargs="?", default=".", help="default: here")
    options = parser.parse_args(arguments)
    print(copy(options.config, Path(options.folder)))
    return 0
