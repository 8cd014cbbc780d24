"""Means over the steps of an epoch, and the table of all epochs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advbench.files import read_rows, write_text
from advbench.runs.manifest import checked
from advbench.training.processes import gather

Row = dict[str, float]


class Means:
    """Running means of named scalars over steps and processes; summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """One step's values. A name that a step leaves out is averaged over the others."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, fabric: Fabric) -> Row:
        """The means over all processes; waits for the device once. Empty before the first step."""
        sums = self._gathered(fabric).mean(0).tolist()
        return {
            name: value / self._counts[name] for name, value in zip(self._sums, sums, strict=True)
        }

    def last(self, name: str) -> float:
        """The mean of this process alone."""
        return float(self._sums[name]) / self._counts[name]

    def state(self, fabric: Fabric) -> dict[str, Any]:
        """The state of all processes, from which ``load`` continues with the same bits."""
        return {"counts": dict(self._counts), "sums": self._gathered(fabric).cpu()}

    def load(self, state: Mapping[str, Any], fabric: Fabric) -> None:
        sums = state["sums"][fabric.global_rank].to(fabric.device)
        self._counts = dict(state["counts"])
        self._sums = dict(zip(self._counts, sums.unbind(), strict=True))

    def _gathered(self, fabric: Fabric) -> Tensor:
        """(processes, names)."""
        if not self._sums:  # then in no process
            return torch.zeros(fabric.world_size, 0)
        return gather(torch.stack(list(self._sums.values())), fabric)


def write_table(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """A CSV file with one line per row, whole or not at all; a value that a row lacks is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_printed(row[name]) if name in row else "" for name in columns])
    write_text(path, text.getvalue())


def _printed(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def read_table(path: Path) -> list[Row]:
    """The rows of a table that ``write_table`` wrote; none where there is no file."""
    if not path.exists():
        return []
    return [{k: float(v) for k, v in row.items() if v} for row in read_rows(checked(path))]
