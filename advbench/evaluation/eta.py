"""Forecast of the time that a stage still needs."""

from __future__ import annotations

import time

import numpy as np

BINS = 64
DECAY = 0.9  # of the moving average over rounds


class Forecast:
    """Forecasts the queries of waiting samples from those of finished samples.

    A sample's work is a number of queries; it ends early if it breaks. How likely it is to come so
    far is estimated from all samples, finished or under way (Kaplan & Meier 1958).

    Args:
        queries: of a robust sample, over all its searches.
    """

    def __init__(self, queries: int) -> None:
        self.queries = max(queries, 1)
        self.reached = np.zeros(BINS + 1)  # samples that ended in the bin, whatever the reason
        self.broke = np.zeros(BINS + 1)
        self.query_seconds = 0.0  # of all slots side by side
        self._last = time.perf_counter()

    def _bin(self, queries: np.ndarray) -> np.ndarray:
        return np.minimum(queries * BINS // self.queries, BINS)

    def ended(self, queries: int, broke: bool) -> None:
        """Record that a sample ended after so many queries, broken or robust."""
        at = int(self._bin(np.array(queries)))
        self.reached[at] += 1
        self.broke[at] += broke

    def round(self, queries: float = 1.0) -> None:
        """Record a round of the batch, by so many queries per sample on average."""
        now = time.perf_counter()
        elapsed, self._last = (now - self._last) / max(queries, 0.1), now
        previous = self.query_seconds or elapsed
        self.query_seconds = DECAY * previous + (1 - DECAY) * elapsed

    def seconds(self, under_way: np.ndarray, waiting: int, slots: int) -> float:
        """The time left.

        Args:
            under_way: queries made for each sample in the batch, (B,).
            waiting: samples that have not started.
            slots: the batch size.
        """
        bins = self._bin(under_way)
        ended = self.reached + np.bincount(bins, minlength=BINS + 1)
        at_risk = np.maximum(ended[::-1].cumsum()[::-1], 1)
        alive = np.cumprod(np.concatenate([[1.0], 1 - self.broke / at_risk]))[: BINS + 1]
        # Bins still ahead of a sample at the start of each bin, given that it came there.
        ahead = np.concatenate([alive[:-1][::-1].cumsum()[::-1], [0.0]]) / np.maximum(alive, 1e-9)
        bins_left = ahead[bins].sum() + waiting * ahead[0]
        # Slots work side by side; but one sample's queries come one after the other.
        longest = (BINS - bins).max(initial=0)
        rounds = max(bins_left / slots, longest) * self.queries / BINS
        return float(rounds * self.query_seconds)
