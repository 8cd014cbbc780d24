"""Commands to type: values in Hydra's grammar, words quoted for the shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any


def command(subcommand: str, settings: Mapping[str, Any]) -> str:
    """``advbench SUBCOMMAND KEY=VALUE ...``, without values that are None or empty."""
    nonempty = {key: value for key, value in settings.items() if value not in (None, [], "")}
    return " ".join(
        ["advbench", subcommand, *(word(key, value) for key, value in nonempty.items())]
    )


def word(key: str, value: Any) -> str:
    """``KEY=VALUE`` for the shell."""
    return shlex.quote(setting(key, value))


def setting(key: str, value: Any) -> str:
    """``KEY=VALUE`` for Hydra: one value, whatever is in it."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(part)}" for key, part in value.items()) + "}"
    text = str(value)
    if isinstance(value, int | float) or _bare(text):
        return text
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'"{escaped}"'


def _bare(text: str) -> bool:
    """Whether Hydra reads the text without quotes as this text."""
    plain = re.fullmatch(r"(?!\.\d)[A-Za-z_/.][\w/.+@:-]*", text, re.ASCII)
    return bool(plain) and text.lower() not in ("null", "true", "false", "inf", "nan", ".")
