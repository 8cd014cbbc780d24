"""What an indicator is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.store import Records
from advbench.runs.judgement import Indicator as Entry

Class = Literal["proof", "evidence", "thin"]
"""How much a triggered indicator weighs, see ``label``."""

Cost = Literal["free", "cheap", "dear"]
"""Free: no passes, from the records and the plan. Cheap: a keyed look at a few samples. Dear:
searches of its own."""

Question = Literal["number", "gradient"]
"""Is the number too high, or does the model hide its gradient?"""


@dataclass(frozen=True)
class Reading:
    """What an indicator measured."""

    value: float | int | str | None
    """What was measured."""
    threshold: float | int | str | None
    """Beyond it the indicator is triggered."""
    triggered: bool
    """Whether it counts against the number, or against the gradient."""
    why: str
    """One sentence for people, whether triggered or not."""
    interval: tuple[float, float] | None = None
    """95 % interval of the value, exact where the value is a share."""
    weight: Class | None = None
    """Class of this reading, where it is another than the indicator's."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Numbers for a picture, of plain types."""


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
            "question": self.question,
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


@dataclass
class Look:
    """A finished evaluation, as indicators see it. Passes are counted."""

    job: Job
    """What was attacked."""
    stages: tuple[Stage, ...]
    """That ran."""
    records: Mapping[str, Records]
    """What they found, by the name of the stage, and ``clean``."""
    complete: bool = True
    """Whether the protocol is a whole suite of attacks."""
    forwards: int = field(default=0, init=False)
    """Rows passed forward so far."""
    backwards: int = field(default=0, init=False)
    """Rows passed backward so far."""

    @property
    def correct(self) -> np.ndarray:
        """Ids of the samples that are classified correctly without an attack, sorted."""
        clean = self.records[CLEAN]
        return clean.sample[~clean.alone]

    def survivors(self, stages: Sequence[Stage] | None = None) -> np.ndarray:
        """Ids of the samples that are correct after these stages, sorted; None is all of them."""
        left = self.correct
        for stage in self.stages if stages is None else stages:
            left = np.setdiff1d(left, self.broken(stage))
        return left

    def broken(self, stage: Stage) -> np.ndarray:
        """Ids of the samples that a stage broke, sorted."""
        records = self.records[stage.name]
        return records.sample[records.alone]

    @property
    def white_box(self) -> list[Stage]:
        """Stages that follow the gradient of the real model."""
        return [stage for stage in self.stages if stage.follows_model]
