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
from pyautoattack import AutoAttack
from torch import nn

from advbench.attacks.threat import Threat
from advbench.devices import processors
from advbench.files import write_text
from advbench.report.collection import Mean
from advbench.runs.accuracy import Accuracy

MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Of AutoAttack's standard suite."""

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def advbench(verb: str, settings: Sequence[str], folder: Path) -> None:
    """Run one command in a directory of its own, unless it is finished."""
    done = folder / ("summary.json" if verb == "train" else "results.json")
    if done.exists():
        return
    print("advbench", verb, *settings, flush=True)
    command = [sys.executable, "-m", "advbench", verb, *settings, f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def cell(accuracies: Sequence[Accuracy], n: int) -> str:
    """Mean over the seeds, in %, its standard deviation, and the interval for n images."""
    mean = Mean.of(accuracies, n)
    assert mean is not None and mean.ci95 is not None, "an evaluation did not finish"
    sd = "" if mean.sd is None else f" sd {100 * mean.sd:.1f}"
    low, high = (100 * end for end in mean.ci95)
    return f"{100 * mean.acc:.1f}{sd} [{low:.1f}, {high:.1f}]"


def upstream(
    model: nn.Module, threat: Threat, seed: int, classes: int, members: Sequence[str] | None = None
) -> Any:
    """pyautoattack's standard suite, or some of it, with no more targets than wrong classes."""
    norm: Any = NORMS[threat.norm]
    device = next(model.parameters()).device
    suite: Any = AutoAttack(model, norm=norm, eps=threat.radius, seed=seed, device=device)
    suite.verbose = False
    suite.attacks_to_run = list(members or suite.attacks_to_run)
    for attack in (suite.apgd_targeted, suite.fab):
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)
    return suite


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
