"""The judge: chooses the indicators, computes them, and returns the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from advbench.errors import UserError, did_you_mean
from advbench.evaluation.job import Job
from advbench.evaluation.measured import Measured
from advbench.evaluation.phases import stage_records
from advbench.evaluation.protocol import Protocol, Stage
from advbench.evaluation.store import Images, Records, Store
from advbench.runs.judgement import Indicator as Entry
from advbench.runs.judgement import Verdict
from advbench.verdict import label
from advbench.verdict.indicator import Indicator
from advbench.verdict.look import Look
from advbench.verdict.registry import INDICATORS

COSTS = {
    "none": (),
    "free": ("free",),
    "cheap": ("free", "cheap"),
    "all": ("free", "cheap", "dear"),
}
"""What each effort computes, by the cost of the indicators."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Computes indicators after the attacks, and the verdict from them.

    Raises:
        UserError: for an effort or an id that does not exist.
    """

    effort: str = "protocol"
    """``none``, ``free``, ``cheap`` or ``all``; ``protocol`` leaves it to the protocol, which is
    cheap for a suite of attacks, all for adaptive and free for a single attack."""
    indicators: list[str] | None = None
    """These alone, by id, whatever they cost."""
    only: bool = False
    """Attack nothing; compute the verdict anew on an evaluation that is finished."""

    def __post_init__(self) -> None:
        known = (*COSTS, "protocol")
        if self.effort not in known:
            raise UserError(f"no verdict.effort '{self.effort}'{did_you_mean(self.effort, known)}")
        ids = [indicator.id for indicator in INDICATORS]
        for name in self.indicators or ():
            if name not in ids:
                hint = did_you_mean(name, ids) or f"; there is: {', '.join(ids)}"
                raise UserError(f"no indicator '{name}'{hint}")

    def of(self, protocol: Protocol) -> IndicatorJudge | None:
        """What judges an evaluation by ``protocol``; None where nothing is to be computed."""
        effort = protocol.effort if self.effort == "protocol" else self.effort
        chosen = tuple(
            indicator
            for indicator in INDICATORS
            if (
                indicator.cost in COSTS[effort]
                if self.indicators is None
                else indicator.id in self.indicators
            )
        )
        return IndicatorJudge(chosen, protocol.effort != "free", self.only) if chosen else None


@dataclass(frozen=True)
class IndicatorJudge:
    """Judges an evaluation by some indicators; see ``advbench.evaluation.phases``."""

    chosen: tuple[Indicator, ...]
    """In order."""
    complete: bool
    """Whether the protocol is a whole suite of attacks."""
    only: bool = False
    """Whether nothing is to be attacked."""

    def indicators(
        self, job: Job, stages: Sequence[Stage], store: Store, measured: Measured | None = None
    ) -> list[Entry] | None:
        measured = Measured() if measured is None else measured
        records = stage_records(stages, store)
        look = Look(job, tuple(stages), records, _images(store, records), self.complete)
        entries, computed = [], False
        for indicator in self.chosen:
            if indicator.cost == "free":
                entries.append(indicator.entry(look))
                continue
            basis = indicator.basis(look)
            name = f"{indicator.id}-{basis}"
            if name not in measured:
                if computed and job.deadline():
                    return None
                before = look.forwards, look.backwards
                entry = indicator.entry(look)
                computed = True
                spent = look.forwards - before[0], look.backwards - before[1]
                measured.keep(name, None if entry is None else {**entry, "basis": basis}, *spent)
            entries.append(measured.entry(name))
        return [entry for entry in entries if entry is not None]

    def verdict(
        self, indicators: Sequence[Entry], passes: tuple[int, int], nothing_left: bool
    ) -> Verdict:
        looked_at = [indicator.id for indicator in self.chosen]
        return label.verdict(indicators, looked_at, passes, nothing_left)

    def adds_to(self, verdict: Verdict) -> bool:
        known = set(verdict.get("looked_at", ()))
        return self.only or not {indicator.id for indicator in self.chosen} <= known


def _images(store: Store, records: Mapping[str, Records]) -> Images | None:
    """The images of the samples that these records say are broken: others came in later phases."""
    images = store.images()
    if images is None:
        return None
    broken = np.concatenate([part.sample[part.alone] for part in records.values()])
    kept = np.isin(images.ids, broken)
    return Images(images.ids[kept], images.x[kept]) if kept.any() else None
