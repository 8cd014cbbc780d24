"""Which code made a number."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def code() -> dict[str, str | None]:
    """Versions of advbench and torch, and the commit if advbench runs from a checkout."""
    return {"advbench": version("advbench"), "git": _commit(), "torch": torch.__version__}


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
