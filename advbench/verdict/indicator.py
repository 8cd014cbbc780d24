"""``Indicator``: one entry of the registry, with its function, cost, question and source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from advbench.evaluation.identity import versions
from advbench.files import file_sha256, short_hash
from advbench.runs.judgement import Indicator as Entry
from advbench.runs.judgement import Question
from advbench.verdict.look import Finding, Look
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
    rests_on: tuple[Finding, ...] = ()
    """What it reads of an evaluation's findings; unless they change, it is not computed again."""

    def basis(self, look: Look) -> str:
        """Hash of all that the entry depends on, beside what is attacked: the findings of ``look``
        that it ``rests_on``, and the code.
        """
        return short_hash([self.id, *map(look.finding, self.rests_on), _code()])

    def entry(self, look: Look) -> Entry | None:
        """Measure it.

        Args:
            look: the evaluation; passes of the model are counted there.

        Returns:
            The entry for ``results.json``; None where the indicator does not apply.
        """
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
            "settles": reading.settles or self.settles,
            "forwards": look.forwards - before[0],
            "backwards": look.backwards - before[1],
        }
        return entry | ({"data": dict(reading.data)} if reading.data else {})


@cache
def _code() -> dict[str, str]:
    """Versions, and hashes of the code that decides what an indicator measures."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {**versions(), "verdict": short_hash([file_sha256(file) for file in files])}
