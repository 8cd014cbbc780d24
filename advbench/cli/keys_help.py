"""The top-level keys of a subcommand, and the options of each group, for its ``--help``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, wrap

from omegaconf import OmegaConf

from advbench import config
from advbench.cli.options import own

COLUMN, WIDTH = 18, 98


def register(subcommand: str, folder: Path | None) -> None:
    """Let a template of Hydra's say ``${keys_help:}``.

    folder: of the user's own options.
    """
    OmegaConf.register_new_resolver("keys_help", lambda: text(subcommand, folder), replace=True)


def text(subcommand: str, folder: Path | None = None) -> str:
    """A line for each key that the subcommand takes; for a group, its options below."""
    lines = []
    for key, description in documented(config.SCHEMAS[subcommand]).items():
        group = key in config.GROUPS
        lines += _wrapped(f"{key}=NAME" if group else key, description)
        lines += _wrapped("", ", ".join(_options(subcommand, key, folder))) if group else ()
    presets = _experiments(subcommand, folder)
    if presets:
        lines += _wrapped("experiment=NAME", "Several of these at once.")
        lines += _wrapped("", ", ".join(presets))
    return "\n".join(lines)


def _wrapped(name: str, description: str) -> list[str]:
    indent = " " * COLUMN
    return wrap(description, WIDTH, initial_indent=name.ljust(COLUMN), subsequent_indent=indent)


def documented(schema: type) -> dict[str, str]:
    """The fields of a schema, and the line below each."""
    (node,) = ast.parse(dedent(inspect.getsource(schema))).body
    assert isinstance(node, ast.ClassDef)
    descriptions = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            descriptions[ast.unparse(field.target)] = ast.literal_eval(below.value)
    return descriptions


def _options(subcommand: str, group: str, folder: Path | None) -> Iterator[str]:
    """The options of a group that the subcommand takes, and all of the user's own."""
    fields = {field.name: field for field in dataclasses.fields(config.SCHEMAS[subcommand])}
    home = fields[group].metadata.get("home", "")
    mine = {} if folder is None else own(folder, group)
    for name in sorted({*config.options(group), *mine}):
        if name in mine:
            yield name
            continue
        target = config.shipped(group, name).get("_target_")
        if str(target).startswith(home) if target else subcommand == "eval" or group == "logger":
            yield name


def _experiments(subcommand: str, folder: Path | None) -> list[str]:
    """The shipped ones are for ``train``."""
    mine = {} if folder is None else own(folder, "experiment")
    shipped = config.options("experiment") if subcommand == "train" else {}
    return sorted({*shipped, *mine})
