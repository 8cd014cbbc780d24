"""What is installed with advbench: nothing of the user's is downgraded, and extras resolve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = ["zoo", "slurm", "ray", "sweep", "track"]


def test_no_dependency_is_held_to_one_version() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    words = [word for group in groups for word in group]
    assert len(words) > 20
    assert not [word for word in words if "==" in word or "~=" in word]
    capped = sorted(word for word in words if "<" in word)
    assert capped == ["joblib<1.6", "torchattacks>=3.3,<3.4"]


def resolved(folder: Path, extras: str) -> dict[str, str]:
    """What pip would install into an empty environment, by name; nothing is installed."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--report", str(report), f"{ROOT}{extras}"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    items = [item["metadata"] for item in json.loads(report.read_text("utf-8"))["install"]]
    return {item["name"].lower(): item["version"] for item in items}


@pytest.mark.network
@pytest.mark.parametrize("extras", ["", *(f"[{name}]" for name in EXTRAS), f"[{','.join(EXTRAS)}]"])
def test_everything_resolves(extras: str, tmp_path: Path) -> None:
    found = resolved(tmp_path, extras)
    assert {"advbench", "torch", "torchattacks", "pyautoattack"} <= found.keys()
    new = tuple(map(int, re.findall(r"\d+", found.get("requests", "9.9"))[:2]))
    assert new >= (2, 31), "an old requests is what downgrades the user's"
