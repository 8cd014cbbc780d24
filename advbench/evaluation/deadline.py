"""The budget of an evaluation (``budget=``): time of one sitting, or passes of all sittings."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from advbench.errors import UserError

_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


class Budget(NamedTuple):
    """What ``budget=`` says; one of the two is given."""

    seconds: float | None = None
    """Of a sitting."""
    passes: float | None = None
    """Of the whole evaluation: forwards + 2 x backwards, of single images."""

    def spent(self) -> str:
        """Why an evaluation stopped, in words that ``before`` follows."""
        return "time was up" if self.passes is None else f"{self.passes:,.0f} passes were spent"

    def resume(self) -> str:
        """How to resume that evaluation, in words."""
        more = "" if self.passes is None else " with a larger budget"
        return f"repeat the command{more} to resume"


def parse(text: str) -> Budget:
    """The budget that a text such as 90s, 10min, 1h30min or 2e6passes means.

    Raises:
        UserError: for anything else, and for zero.
    """
    compact = re.sub(r"\s", "", text.lower())
    if match := re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)passes", compact):
        if float(match[1]) >= 1:
            return Budget(passes=float(match[1]))
    elif re.fullmatch(r"(\d+(\.\d+)?(s|sec|min|m|h))+", compact):
        parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", compact)
        total = sum(float(number) * _UNITS[unit] for number, unit in parts)
        if total > 0:
            return Budget(seconds=total)
    raise UserError(
        f"budget={text} is no time and no number of passes: write 90s, 10min, 2h or 2e6passes"
    )


class Deadline:
    """Passes ``budget`` seconds after it was made; never for None."""

    def __init__(self, budget: float | None) -> None:
        self.end = None if budget is None else time.monotonic() + budget

    def __call__(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end


class PassCounter:
    """The passes of one process, and its share of a budget of them.

    A count waits for a GPU, so it is made only where the share may be spent by then.

    Args:
        most: forwards + 2 x backwards, over all sittings.
    """

    def __init__(self, most: float = math.inf) -> None:
        self.most = most
        self.begin(0)

    @property
    def limited(self) -> bool:
        """Whether there is a budget of passes."""
        return self.most < math.inf

    def begin(self, before: int) -> None:
        """Passes that were made before the search that begins."""
        self.before = before
        self._last_total: int | None = None
        self._queries, self._interval = 0, 1

    def spent(self, passes: Callable[[], int] = lambda: 0) -> bool:
        """Whether the share is spent; called after each query.

        Args:
            passes: counts those of the search that is under way.
        """
        self._queries += 1
        if not self.limited or self._queries < self._interval:
            return False
        total = self.before + passes()
        new_passes = 0 if self._last_total is None else total - self._last_total
        # A later query takes less than twice as many, so half of the way can be gone unseen.
        queries_left = (self.most - total) * self._queries / new_passes if new_passes > 0 else 0
        self._last_total, self._queries, self._interval = total, 0, max(int(queries_left / 2), 1)
        return total >= self.most
