"""Decides by the clock when to synchronise and when to save, equally in all processes."""

from __future__ import annotations

import time

from lightning_fabric import Fabric

GLANCE = 1.0
"""Seconds between two looks at the device: often enough for a display, rare enough to be free."""


class Pace:
    """Plans after how many steps the processes meet; the first one's clock decides for all.

    Reading a clock in each process would let them disagree, and the ones that meet would wait for
    ever for those that do not.

    Args:
        save_every: seconds; 0 saves at every step.
    """

    def __init__(self, fabric: Fabric, save_every: float) -> None:
        self._fabric = fabric
        self._save_every = save_every
        self._steps = self._left = 1
        self._met = self._saved = time.perf_counter()

    def due(self) -> bool:
        """Whether to meet now; call it after every step."""
        self._left -= 1
        return self._left <= 0

    def meet(self) -> bool:
        """Whether to save now. Plans the next meeting. Call it after waiting for the device."""
        now = time.perf_counter()
        per_step = max(now - self._met, 1e-9) / self._steps
        ahead = max(1, int(min(GLANCE, self._save_every) / per_step))
        self._met = now
        save, self._steps = self._fabric.broadcast((now - self._saved >= self._save_every, ahead))
        self._left = self._steps
        return save

    def saved(self) -> None:
        """Starts the time to the next save."""
        self._saved = time.perf_counter()
