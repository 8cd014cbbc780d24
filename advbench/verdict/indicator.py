"""``Indicator``: one entry of the registry, with its function, cost, question and source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from advbench.runs.judgement import Indicator as Entry
from advbench.runs.judgement import Question
from advbench.verdict.look import Look
from advbench.verdict.reading import Class, Reading

Cost = Literal["free", "cheap", "dear"]
"""Free: no passes, from the records and the plan. Cheap: a keyed look at a few samples. Dear:
searches of its own."""


@dataclass(frozen=True)
class Indicator:
    """One reason to trust a number or not to."""

    id: str
    """Unique; the name under which it is stored and chosen."""
    weight: Class
    """Its class: proof, evidence or thin."""
    kind: str
    """Two pieces of evidence count as two only if their kinds differ: ``gradient``, ``search``,
    ``black box``, ``outputs``, ``records``."""
    question: Question
    """Which of the two questions it answers."""
    cost: Cost
    """What it takes to compute it."""
    about: str
    """What is measured and when it triggers, in words for a newcomer."""
    source: str
    """A paper, or where the definition is from."""
    settles: str
    """What settles the doubt that it raises, in words; a protocol or a stage."""
    measure: Callable[[Look], Reading | None]
    """Measures it; None where it does not apply."""

    def entry(self, look: Look) -> Entry | None:
        """What stands in ``results.json``; None where the indicator does not apply."""
        before = look.forwards, look.backwards
        reading = self.measure(look)
        if reading is None:
            return None
        entry: Any = {
            "id": self.id,
            "class": reading.weight or self.weight,
            "kind": self.kind,
            "question": reading.question or self.question,
            "value": reading.value,
            "threshold": reading.threshold,
            "interval": None if reading.interval is None else list(reading.interval),
            "triggered": reading.triggered,
            "why": reading.why,
            "source": self.source,
            "settles": self.settles,
            "forwards": look.forwards - before[0],
            "backwards": look.backwards - before[1],
        }
        return entry | ({"data": dict(reading.data)} if reading.data else {})
