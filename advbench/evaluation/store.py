"""The store: per-sample records of an evaluation, written as they come.

While an evaluation runs, each batch of finished samples is one small file in ``journal/``, written
atomically; what is under way is there too, now and then. A killed evaluation reads them back and
goes on. When all stages are done the records become ``samples.parquet``, sorted, so that its bytes
do not depend on the order of work. Several processes share a journal; each has its own files.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load, save_file
from torch import Tensor

from advbench.errors import UserError, describe
from advbench.files import write_atomic
from advbench.runs.manifest import (
    Damaged,
    belongs,
    checked,
    plan_key,
    read_sealed,
    write_sealed,
)

JOURNAL = "journal"
SAMPLES = "samples.parquet"
IMAGES = "adversarial.safetensors"
UNREADABLE = (
    RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError, BadZipFile,
    SafetensorError, struct.error, zlib.error,
)  # fmt: skip
"""What reading a damaged file of an earlier version, which has no checksum, may raise."""


@dataclass(frozen=True)
class Records:
    """The results of one stage for some samples; arrays of length N."""

    sample: np.ndarray
    """Ids."""
    broken: np.ndarray
    """Whether the real model misclassifies a point inside the threat."""
    label: np.ndarray
    """The class predicted there; the true class of a robust sample."""
    margin: np.ndarray
    """The true logit minus the best wrong one, at that point; of a robust sample the smallest one
    of the search."""
    distance: np.ndarray
    """The size of the perturbation, in the threat's norm; NaN for a robust sample."""
    wrong: np.ndarray
    """The share of evaluations that are wrong there, of which a stochastic model has several."""
    alone: np.ndarray
    """Whether its own image breaks it among clean ones; differs from ``broken`` only for a
    batch-dependent model."""
    forwards: np.ndarray
    """Forward passes spent."""
    backwards: np.ndarray
    """Backward passes spent."""

    DTYPES = {  # noqa: RUF012  (a constant of the class, not a field)
        "sample": np.int64,
        "broken": np.bool_,
        "label": np.int64,
        "margin": np.float32,
        "distance": np.float32,
        "wrong": np.float32,
        "alone": np.bool_,
        "forwards": np.int64,
        "backwards": np.int64,
    }

    def __len__(self) -> int:
        return len(self.sample)

    def where(self, mask: np.ndarray) -> Records:
        """The records where ``mask`` (N,) is true."""
        return Records(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    @classmethod
    def joined(cls, parts: list[Records]) -> Records:
        """All records of the parts, sorted by sample."""
        columns = {
            f.name: np.concatenate(
                [getattr(part, f.name) for part in parts] or [np.empty(0, cls.DTYPES[f.name])]
            )
            for f in fields(cls)
        }
        order = np.argsort(columns["sample"], kind="stable")
        return cls(**{name: column[order] for name, column in columns.items()})


@dataclass(frozen=True)
class Images:
    """Adversarial images of the samples that they broke."""

    ids: np.ndarray
    """(K,) sample ids, sorted."""
    x: np.ndarray
    """(K, C, H, W) floats in [0, 1]."""

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The images of samples that all have one, in their order."""
        return self.x[np.searchsorted(self.ids, ids)]


class Store:
    """The records of one evaluation, stage by stage.

    Args:
        folder: of the evaluation; None keeps the records in memory.
        rank: of this process among those that share the evaluation.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self._parts: dict[str, list[Records]] = {}
        self._images: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._seconds: dict[str, float] = {}
        self._written = 0
        self._key = "" if folder is None else plan_key(folder)
        self.unchecked = False
        """Whether a part is of an earlier version, which kept no checksums."""
        self.read_journal()

    @classmethod
    def finished(cls, folder: Path) -> Store:
        """The store of a finished evaluation, to read from.

        Raises:
            Damaged, OSError, ValueError: as ``read_samples``.
            UserError: as ``read_images``.
        """
        store = cls(None)
        store._parts = {stage: [records] for stage, records in read_samples(folder).items()}
        if (images := read_images(folder)) is not None:
            store._images = {"": [(images.ids, images.x)]}
        return store

    def read_journal(self) -> None:
        """Take in what all processes have written."""
        if self.folder is None:
            return
        self._parts, self._images, self._seconds = {}, {}, {}
        for path in sorted(self._journal.glob("[0-9]*-[0-9]*.npz")):
            try:
                content, sealed = read_sealed(path, self._key)
                with np.load(content) as part:
                    records = Records(**{name: part[name] for name in Records.DTYPES})
                    seconds, images = float(part["seconds"]), part.get("images")
                    self._keep(str(part["stage"]), records, seconds, images)
                rank, number = map(int, path.stem.split("-"))
            except (Damaged, *UNREADABLE):
                raise UserError(
                    f"'{path}' is damaged or another run's: remove it to attack its samples again"
                ) from None
            self.unchecked |= not sealed
            if rank == self.rank:
                self._written = max(self._written, number + 1)

    @property
    def _journal(self) -> Path:
        assert self.folder is not None
        return self.folder / JOURNAL

    def _keep(
        self, stage: str, records: Records, seconds: float, images: np.ndarray | None
    ) -> None:
        self._parts.setdefault(stage, []).append(records)
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if images is not None:
            alone = records.sample[records.alone]
            self._images.setdefault(stage, []).append((alone, images))

    def append(
        self, stage: str, records: Records, seconds: float, images: np.ndarray | None = None
    ) -> None:
        """Keep the records, on disk before this returns.

        Args:
            stage: its name.
            records: of N samples.
            seconds: time spent on them.
            images: adversarial images of those broken alone, in order, (K, C, H, W); None if they
                are not kept.
        """
        if self.folder is not None:
            arrays = {name: getattr(records, name) for name in Records.DTYPES}
            if images is not None:
                arrays["images"] = images
            self._journal.mkdir(exist_ok=True)

            def write(path: Path) -> None:
                with path.open("wb") as file:
                    np.savez(file, stage=stage, seconds=seconds, **arrays)

            name = f"{self.rank:03d}-{self._written:06d}.npz"
            write_sealed(self._journal / name, write, self._key)
            self._written += 1
        self._keep(stage, records, seconds, images)

    def save_in_progress(self, stage: str, state: dict[str, Tensor]) -> None:
        """Save the in-progress state of this process's searches, in place of earlier ones."""
        if self.folder is None:
            return
        self._journal.mkdir(exist_ok=True)
        content = {name: part.detach().cpu().contiguous() for name, part in state.items()}
        write_sealed(
            self._journal / f"flight-{self.rank:03d}.safetensors",
            lambda path: save_file(content, path, metadata={"stage": stage}),
            self._key,
        )

    def in_progress_states(self, stage: str) -> Iterator[dict[str, Tensor]]:
        """The in-progress state of a stage's searches, of each process."""
        if self.folder is None:
            return
        for path in sorted(self._journal.glob("flight-*.safetensors")):
            try:
                content = read_sealed(path, self._key)[0].getvalue()
                state = load(content) if _metadata(content)["stage"] == stage else None
            except (Damaged, *UNREADABLE):
                raise UserError(
                    f"'{path}' is damaged or another run's: remove it to restart its searches"
                ) from None
            if state is not None:
                yield state

    def in_progress(self, stage: str) -> tuple[int, int, int]:
        """Samples of a stage that were started and have no record; their forwards and backwards."""
        max_passes: dict[int, tuple[int, int]] = {}
        for state in self.in_progress_states(stage):
            state_passes: dict[int, tuple[int, int]] = {}
            for part, ids in (("ledger", "sample"), ("rows", "ids")):
                columns = (state.get(f"{part}.{c}") for c in (ids, "forwards", "backwards"))
                values = [[] if column is None else column.tolist() for column in columns]
                for sample, forwards, backwards in zip(*values, strict=True):
                    previous = state_passes.get(sample, (0, 0))
                    state_passes[sample] = previous[0] + forwards, previous[1] + backwards
            for sample, passes in state_passes.items():  # an earlier process may have left its own
                max_passes[sample] = max(max_passes.get(sample, (0, 0)), passes)
        stored = set(self.records(stage).sample.tolist())
        started = [
            passes for sample, passes in max_passes.items() if sample not in stored and any(passes)
        ]
        return len(started), sum(p[0] for p in started), sum(p[1] for p in started)

    def records(self, stage: str) -> Records:
        """The records of a stage so far, sorted by sample."""
        return Records.joined(self._parts.get(stage, []))

    def passes(self, ids: np.ndarray) -> int:
        """Forwards + 2 x backwards in the records of these samples, of all stages."""
        total = 0
        for part in (part for parts in self._parts.values() for part in parts):
            total += passes(part, np.isin(part.sample, ids))
        return total

    def seconds(self, stage: str) -> float:
        """Time spent on a stage so far, over all sittings."""
        return self._seconds.get(stage, 0.0)

    def images(self) -> Images | None:
        """The adversarial images of all samples that were broken alone; None if none were kept."""
        parts = [part for stage in self._images.values() for part in stage]
        if not parts:
            return None
        samples = np.concatenate([ids for ids, _ in parts])
        images = np.concatenate([images for _, images in parts])
        order = np.argsort(samples, kind="stable")
        return Images(samples[order], images[order])

    def finish(self, stages: list[str]) -> None:
        """Write ``samples.parquet``, a row per stage and sample, in that order, and the images."""
        assert self.folder is not None
        tables = [self.records(stage) for stage in stages]
        columns: dict[str, pa.Array] = {
            "stage": pa.array(
                [
                    stage
                    for stage, table in zip(stages, tables, strict=True)
                    for _ in range(len(table))
                ],
                pa.string(),
            )
        }
        for name in Records.DTYPES:
            columns[name] = pa.array(np.concatenate([getattr(table, name) for table in tables]))
        write_atomic(
            self.folder / SAMPLES,
            lambda path: pq.write_table(pa.table(columns), path, compression="zstd"),
        )
        if (images := self.images()) is not None:
            content = {"sample": images.ids, "x": images.x.astype(np.float32)}
            write_atomic(self.folder / IMAGES, lambda path: save_arrays(content, path))


def passes(of: Any, at: Any = slice(None)) -> int:
    """Forwards + 2 x backwards.

    Args:
        of: has columns ``forwards`` and ``backwards``: records, rows, or a stage's state.
        at: which rows; an index or a mask.
    """
    return int((of.forwards[at] + 2 * of.backwards[at]).sum())


def clear_journal(folder: Path) -> None:
    """Remove the journal of a finished evaluation: everything in it is in the finished files."""
    shutil.rmtree(folder / JOURNAL, ignore_errors=True)


def read_images(folder: Path) -> Images | None:
    """The adversarial images of a finished evaluation; None where it kept none, or broke nothing.

    Raises:
        UserError: for a file that is not what the evaluation wrote, or is damaged.
    """
    path = folder / IMAGES
    if not path.is_file() and not belongs(path):
        return None
    try:
        content = load_arrays(checked(path))
        ids, x = content["sample"].astype(np.int64), content["x"]
        if x.ndim != 4 or ids.shape != x.shape[:1] or (np.diff(ids) <= 0).any():
            raise ValueError(f"shapes {ids.shape} and {x.shape}, or samples that are not sorted")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"'{path}' is damaged: {describe(problem)}") from None
    return Images(ids, x)


def _metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says of itself."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def read_samples(folder: Path) -> dict[str, Records]:
    """The records of a finished evaluation, by stage.

    Raises Damaged for a file that is not what the evaluation wrote; OSError and ValueError for a
    damaged one of an evaluation without checksums.
    """
    table = pq.read_table(checked(folder / SAMPLES))
    stage = np.array(table["stage"].to_pylist())
    columns = {name: table[name].to_numpy() for name in Records.DTYPES}
    return {
        str(name): Records(**{key: column[stage == name] for key, column in columns.items()})
        for name in dict.fromkeys(stage.tolist())
    }
