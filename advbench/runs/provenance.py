"""Provenance: the versions, commit and device that made a number."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def code() -> dict[str, str | None]:
    """Versions of advbench and torch, and the commit if advbench runs from a checkout."""
    return {"advbench": version("advbench"), "git": _commit(), "torch": torch.__version__}


def drivers(device: torch.device) -> dict[str, str | int | None]:
    """What runs a GPU: the versions of driver, CUDA and cuDNN. Nothing of a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(command) or "").partition("\n")[0] or None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    return _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])


def _output(command: list[str]) -> str | None:
    """What a program prints; None without it, and where it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
