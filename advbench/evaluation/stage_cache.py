"""What earlier evaluations have found already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from advbench.errors import UserError
from advbench.evaluation.identity import behaves_otherwise, essence
from advbench.evaluation.protocol import Plan
from advbench.evaluation.store import Records, Store, read_samples
from advbench.files import read_json
from advbench.runs.results import RESULTS, Results

ALWAYS = ("model_sha256", "traits", "batch_size", "code", "device", "versions")
UNDER_ATTACK = (*ALWAYS, "threat", "seed", "speed")


class Archive:
    """Records of other evaluations that are what this one would find itself, up to rounding.

    Bit for bit on the same machine, with as many threads, in batches as full.

    A stage of theirs is used if it is the same attack with the same keyed random numbers on the
    same model and images. A library's attack draws by the batch, so its records are not used.

    Args:
        folder: holds the evaluations.
        own: this evaluation's directory, left out.
        plan: of this evaluation.
    """

    def __init__(self, folder: Path, own: Path | None, plan: Plan) -> None:
        self._offers: dict[str, list[Path]] = {}
        self._finished: dict[Path, dict[str, tuple[Records, float]]] = {}
        planned = plan.to_json()
        identity = planned["identity"]
        wanted = {
            stage.name: essence(known)
            for stage, known in zip(plan.stages, planned["stages"], strict=True)
            if stage.attack.queries and not identity["keep_images"]
        }
        for other, theirs in _plans(folder):
            if other == own or not _same(identity, theirs["identity"], ALWAYS):
                continue
            if "behaviour" not in theirs or behaves_otherwise(planned, theirs):
                continue
            names = ["clean"]
            if _same(identity, theirs["identity"], UNDER_ATTACK):
                offered = {stage["name"]: essence(stage) for stage in theirs["stages"]}
                known = theirs["identity"].get("surrogates", {})
                names += [
                    name
                    for name, what in wanted.items()
                    if offered.get(name) == what
                    and known.get(what["target"]) == identity["surrogates"].get(what["target"])
                ]
            for name in names:
                self._offers.setdefault(name, []).append(other)

    def records(self, stage: str, pending: Tensor) -> Iterator[tuple[Records, float, Path]]:
        """What is known of the samples ``pending``, the seconds it took, and who knows it."""
        left = pending.numpy()
        for folder in self._offers.get(stage, []):
            records, seconds = self._read(folder, stage)
            wanted = np.isin(records.sample, left)
            if wanted.any():
                left = np.setdiff1d(left, records.sample)
                yield records.where(wanted), seconds * float(wanted.mean()), folder

    def _read(self, folder: Path, stage: str) -> tuple[Records, float]:
        """The records of a stage of an evaluation, finished or not, with the seconds they took."""
        nothing = Records.joined([]), 0.0
        try:
            if folder not in self._finished and (folder / "samples.parquet").exists():
                self._finished[folder] = _finished(folder)
            if folder in self._finished:
                return self._finished[folder].get(stage, nothing)
            store = Store(folder)  # read anew: another process may be at work there
        except (UserError, OSError, ValueError, KeyError):
            return nothing  # damaged: nothing to reuse
        return store.records(stage), store.seconds(stage)


def _same(ours: dict[str, Any], theirs: dict[str, Any], keys: Sequence[str]) -> bool:
    data = all(ours["data"][k] == theirs.get("data", {}).get(k) for k in ("split", "sha256"))
    return data and all(key in theirs and theirs[key] == ours[key] for key in keys)


def _plans(archive: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(archive.glob("*/plan.json")):
        try:
            plan = read_json(path)
            _ = plan["identity"]["data"], [stage["name"] for stage in plan["stages"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody else's, or damaged: nothing to reuse
        yield path.parent, plan


def _finished(folder: Path) -> dict[str, tuple[Records, float]]:
    """The records of a finished evaluation, by stage, with the seconds they took."""
    results = Results.load(folder / RESULTS)
    seconds = {stage.name: stage.seconds for stage in results.stages}
    return {name: (part, seconds.get(name, 0.0)) for name, part in read_samples(folder).items()}
