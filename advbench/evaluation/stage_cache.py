"""Reuses the records of stages that earlier evaluations ran with the same settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from advbench.errors import UserError
from advbench.evaluation.identity import behaves_otherwise, essence, stages_of
from advbench.evaluation.job import CLEAN
from advbench.evaluation.protocol import Plan
from advbench.evaluation.store import SAMPLES, Images, Records, Store, read_images, read_samples
from advbench.runs import manifest
from advbench.runs.manifest import PLAN, RESULTS, Damaged
from advbench.runs.results import Results

IDENTITY_KEYS = ("model_sha256", "traits", "batch_size", "code", "device", "versions")
ATTACK_KEYS = (*IDENTITY_KEYS, "threat", "seed", "speed")


@dataclass(frozen=True)
class CachedStage:
    """The records of a stage in another evaluation."""

    records: Records
    """Of some samples."""
    seconds: float
    """Time that it spent on them."""
    images: Images | None = None
    """Adversarial images of those that were broken alone; None where none were kept."""

    def of(self, mask: np.ndarray) -> CachedStage:
        """The part where ``mask``, over the records, is true; with its share of the seconds."""
        return CachedStage(self.records.where(mask), self.seconds * float(mask.mean()), self.images)

    def aligned(self) -> np.ndarray | None:
        """The images of the records that were broken alone, in their order; None for none."""
        broken = self.records.sample[self.records.alone]
        return None if self.images is None or not len(broken) else self.images.of(broken)


EMPTY = CachedStage(Records.joined([]), 0.0)


class Archive:
    """Records of other evaluations that are what this one would find itself, up to rounding.

    Bit for bit on the same machine, with as many threads, in batches as full.

    A stage of theirs is used if it is the same attack with the same keyed random numbers on the
    same model and images. A library's attack draws by the batch, so its records are not used.
    Where images are kept, a broken sample's record is used only with its image.

    Args:
        folder: holds the evaluations.
        own: this evaluation's directory, left out.
        plan: of this evaluation.
    """

    def __init__(self, folder: Path, own: Path | None, plan: Plan) -> None:
        self._folders_by_stage: dict[str, list[Path]] = {}
        self._finished: dict[Path, dict[str, CachedStage]] = {}
        self._keep_images = plan.keep_images
        planned = plan.to_json()
        identity = planned["identity"]
        wanted = {
            stage.name: essence(known)
            for stage, known in zip(
                (*plan.stages, *plan.follow_ups), stages_of(planned), strict=True
            )
            if stage.attack.queries
        }
        for other, theirs in _plans(folder):
            if other == own or not _same(identity, theirs["identity"], IDENTITY_KEYS):
                continue
            if "behaviour" not in theirs or behaves_otherwise(planned, theirs):
                continue
            names = ["clean"]
            if _same(identity, theirs["identity"], ATTACK_KEYS):
                offered = {stage["name"]: essence(stage) for stage in stages_of(theirs)}
                known = theirs["identity"].get("surrogates", {})
                names += [
                    name
                    for name, what in wanted.items()
                    if offered.get(name) == what
                    and known.get(what["target"]) == identity["surrogates"].get(what["target"])
                ]
            for name in names:
                self._folders_by_stage.setdefault(name, []).append(other)

    def cached(self, stage: str, pending: Tensor) -> Iterator[tuple[CachedStage, Path]]:
        """Records of other evaluations, each with that evaluation's folder.

        Args:
            stage: its name.
            pending: ids of the samples without a record; none of them comes twice.
        """
        missing = pending.numpy()
        for folder in self._folders_by_stage.get(stage, []):
            cached = self._read(folder, stage)
            usable = np.isin(cached.records.sample, missing)
            if self._keep_images and stage != CLEAN:
                ids = cached.images.ids if cached.images else []
                usable &= ~cached.records.alone | np.isin(cached.records.sample, ids)
            if usable.any():
                cached = cached.of(usable)
                missing = np.setdiff1d(missing, cached.records.sample)
                yield cached, folder

    def _read(self, folder: Path, stage: str) -> CachedStage:
        """The records of a stage in an evaluation, finished or not."""
        try:
            if folder not in self._finished and (folder / SAMPLES).exists():
                self._finished[folder] = _finished(folder, self._keep_images)
            if folder in self._finished:
                return self._finished[folder].get(stage, EMPTY)
            store = Store(folder)  # read anew: another process may be at work there
        except (UserError, OSError, ValueError, KeyError):
            return EMPTY  # damaged: nothing to reuse
        images = store.images() if self._keep_images and stage != CLEAN else None
        return CachedStage(store.records(stage), store.seconds(stage), images)


def _same(ours: dict[str, Any], theirs: dict[str, Any], keys: Sequence[str]) -> bool:
    data = all(ours["data"][k] == theirs.get("data", {}).get(k) for k in ("split", "sha256"))
    return data and all(key in theirs and theirs[key] == ours[key] for key in keys)


def _plans(archive: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(archive.glob(f"*/{PLAN}")):
        try:
            plan = manifest.read_json(path)
            _ = plan["identity"]["data"], [stage["name"] for stage in plan["stages"]]
        except (Damaged, OSError, ValueError, KeyError, TypeError):
            continue  # somebody else's, or damaged: nothing to reuse
        yield path.parent, plan


def _finished(folder: Path, with_images: bool) -> dict[str, CachedStage]:
    """The records of a finished evaluation, by stage."""
    results = Results.load(folder / RESULTS)
    seconds = {stage.name: stage.seconds for stage in results.stages}
    images = read_images(folder) if with_images else None
    return {
        name: CachedStage(part, seconds.get(name, 0.0), None if name == CLEAN else images)
        for name, part in read_samples(folder).items()
    }
