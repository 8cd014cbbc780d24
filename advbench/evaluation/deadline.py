"""The deadline of an evaluation (``budget=``)."""

from __future__ import annotations

import re
import time

from advbench.errors import UserError

_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """Seconds of a duration such as 90s, 10min, 1.5h or 1h30min.

    Raises UserError for anything else, and for zero.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    total = sum(float(number) * _UNITS.get(unit, 0) for number, unit in parts)
    said = re.sub(r"\s", "", text.lower())
    if total <= 0 or "".join(f"{n}{u}" for n, u in parts) != said or any(
        unit not in _UNITS for _, unit in parts
    ):  # fmt: skip
        raise UserError(f"budget={text} is not a duration: write 90s, 10min or 2h")
    return total


class Deadline:
    """Passes ``budget`` seconds after it was made; never for None."""

    def __init__(self, budget: float | None) -> None:
        self.end = None if budget is None else time.monotonic() + budget

    def __call__(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end
