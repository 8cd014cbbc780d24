"""What several of these scripts do."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advbench.devices import processors
from advbench.files import write_text


def advbench(verb: str, settings: Sequence[str], folder: Path) -> None:
    """Run one command in a directory of its own, unless it is finished."""
    done = folder / ("summary.json" if verb == "train" else "results.json")
    if done.exists():
        return
    print("advbench", verb, *settings, flush=True)
    command = [sys.executable, "-m", "advbench", verb, *settings, f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def machine(device: str) -> str:
    """The processor that does the work."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if named := processors("model name"):
        return f"{len(named)} x {named[0]}"
    return platform.processor() or platform.machine()


def append(path: Path, record: Mapping[str, Any]) -> None:
    """A line of JSON more."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, before + json.dumps(record) + "\n")
