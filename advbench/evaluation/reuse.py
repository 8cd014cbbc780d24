"""What earlier evaluations have found already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from advbench.errors import UserError
from advbench.evaluation.protocol import Stage
from advbench.evaluation.store import Records, Store, read_samples
from advbench.results import Results

ALWAYS = ("model_sha256", "batch_size", "code", "device", "versions")
UNDER_ATTACK = (*ALWAYS, "threat", "seed", "speed")


def reuse(
    store: Store,
    archive: Path,
    identity: dict[str, Any],
    stages: Sequence[Stage],
    samples: Tensor,
    clean: str,
) -> list[str]:
    """Put records of other evaluations in ``archive`` into a new ``store``.

    Only what this evaluation would find itself, bit for bit, is taken: the same stage with the same
    keyed draws on the same model and image. Returns a line for each stage that was found.
    """
    wanted = {clean: None, **{stage.name: essence(stage.to_json()) for stage in stages}}
    lines = []
    for folder, plan in _plans(archive):
        theirs = plan["identity"]
        if folder == store.folder or not _same(identity, theirs, ALWAYS):
            continue
        attacked = _same(identity, theirs, UNDER_ATTACK)
        offered = {s["name"]: essence(s) for s in plan["stages"]} if attacked else {}
        names = [n for n, what in wanted.items() if n == clean or offered.get(n) == what]
        for name, (records, seconds) in _records(folder, names).items():
            known = np.union1d(store.records(name).sample, [])
            new = np.isin(records.sample, samples.numpy()) & ~np.isin(records.sample, known)
            if new.any():
                store.append(name, records.where(new), seconds * float(new.mean()))
                lines.append(f"{name}: {int(new.sum())} samples known from {folder}")
    return lines


def essence(stage: dict[str, Any]) -> dict[str, Any]:
    """What decides a stage's outcome, as it stands in a plan."""
    return {key: value for key, value in json.loads(json.dumps(stage)).items() if key != "why"}


def _same(ours: dict[str, Any], theirs: dict[str, Any], keys: Sequence[str]) -> bool:
    ours = json.loads(json.dumps(ours))
    data = all(ours["data"][k] == theirs.get("data", {}).get(k) for k in ("split", "sha256"))
    return data and all(key in theirs and theirs[key] == ours[key] for key in keys)


def _plans(archive: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(archive.glob("*/plan.json")):
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            _ = plan["identity"]["data"], [stage["name"] for stage in plan["stages"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody else's, or damaged: nothing to be had
        yield path.parent, plan


def _records(folder: Path, names: Sequence[str]) -> dict[str, tuple[Records, float]]:
    """The records of some stages of an evaluation, finished or not, with the seconds they took."""
    try:
        if (folder / "samples.parquet").exists():
            found = read_samples(folder)
            seconds = {s.name: s.seconds for s in Results.load(folder / "results.json").stages}
            return {n: (found[n], seconds.get(n, 0.0)) for n in names if n in found}
        store = Store(folder)
    except (UserError, OSError):
        return {}
    return {n: (store.records(n), store.seconds(n)) for n in names if len(store.records(n))}
