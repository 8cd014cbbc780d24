"""The state of one stage, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from advbench.evaluation.store import Records

PROGRESS = ("attempt", "margin", "wrong", "forwards", "backwards")


class StageState:
    """Columns over the samples of a stage; a *position* is an index into ``samples``.

    ``attempt`` is the search that a sample is in, or waits for. The other columns are as in
    ``Records``.

    Args:
        samples: ids, (N,), sorted.
        labels: true classes, (N,).
    """

    def __init__(self, samples: Tensor, labels: Tensor) -> None:
        n = len(samples)
        self.samples = samples
        self.attempt = torch.zeros(n, dtype=torch.int64)
        self.broken = torch.zeros(n, dtype=torch.bool)
        self.label = labels.clone()
        self.margin = torch.full((n,), torch.inf)
        self.distance = torch.full((n,), torch.nan)
        self.wrong = torch.zeros(n)
        self.forwards = torch.zeros(n, dtype=torch.int64)
        self.backwards = torch.zeros(n, dtype=torch.int64)
        self._images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def add_cost(self, at: Tensor, margin: Tensor, forwards: Tensor, backwards: Tensor) -> None:
        """Add the cost of a search of these positions that ended or was interrupted."""
        self.margin[at] = torch.minimum(self.margin[at], margin)
        self.forwards[at] += forwards
        self.backwards[at] += backwards

    def mark_robust(self, at: Tensor, wrong: Tensor) -> None:
        """These samples stayed correct; ``wrong`` is the share of evaluations that were wrong."""
        self.wrong[at] = torch.maximum(self.wrong[at], wrong)

    @property
    def alone(self) -> Tensor:
        return self.broken

    def mark_broken(
        self, at: Tensor, label: Tensor, margin: Tensor, distance: Tensor, wrong: Tensor
    ) -> None:
        """Record a success that the referee confirmed.

        Args:
            at: positions, (M,).
            label: the predicted class, (M,).
            margin: the true logit minus the best wrong one, (M,).
            distance: of the image from the clean one, in the threat's norm, (M,).
            wrong: the share of evaluations that are wrong, (M,).
        """
        self.broken[at], self.label[at] = True, label
        self.margin[at], self.distance[at], self.wrong[at] = margin, distance, wrong

    def keep_images(self, at: Tensor, images: Tensor) -> None:
        for position, image in zip(at.tolist(), images.cpu().numpy(), strict=True):
            self._images[position] = image

    def records(self, positions: Sequence[int]) -> tuple[Records, np.ndarray | None]:
        """The records of finished samples, and the images of the broken ones if they are kept."""
        at = torch.tensor(positions, dtype=torch.int64)
        records = Records(
            sample=self.samples[at].numpy(),
            **{
                name: getattr(self, name)[at].numpy() for name in Records.DTYPES if name != "sample"
            },
        )
        images = [self._images.pop(p) for p in positions if p in self._images]
        return records, np.stack(images) if images else None

    def progress(self) -> dict[str, Tensor]:
        """The columns that resuming needs, of samples that have started."""
        started = ((self.attempt > 0) | (self.forwards > 0)).nonzero().flatten()
        columns = {name: getattr(self, name)[started] for name in PROGRESS}
        return {"sample": self.samples[started], **columns}

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Restore saved progress, except for samples that have come further since.

        Args:
            progress: columns that ``progress`` returned, of this process or another.
        """
        shared = torch.isin(progress["sample"], self.samples)
        at = torch.searchsorted(self.samples, progress["sample"][shared])
        attempt, forwards = progress["attempt"][shared], progress["forwards"][shared]
        same_attempt = attempt == self.attempt[at]
        newer = (attempt > self.attempt[at]) | (same_attempt & (forwards > self.forwards[at]))
        for name in PROGRESS:
            getattr(self, name)[at[newer]] = progress[name][shared][newer]

    def newest_rows(self, saved: dict[str, Tensor]) -> dict[int, int]:
        """Of saved rows, the one of each sample that is furthest in the sample's current search.

        Args:
            saved: columns of ``Rows``, of this process and of others.

        Returns:
            Row of ``saved`` by position.
        """
        rows = {}
        for row in saved["iteration"].argsort(stable=True).tolist():
            position = int(torch.searchsorted(self.samples, saved["ids"][row]))
            if position == len(self) or self.samples[position] != saved["ids"][row]:
                continue  # another process's
            if saved["restart"][row] == self.attempt[position]:
                rows[position] = row
        return rows


def within(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The columns whose names begin with the prefix, without it."""
    return {n.removeprefix(prefix): part for n, part in state.items() if n.startswith(prefix)}
