"""The judge: chooses the indicators, computes them, and returns the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from advbench.errors import UserError, did_you_mean
from advbench.evaluation.job import Job
from advbench.evaluation.phases import found
from advbench.evaluation.protocol import Protocol, Stage
from advbench.evaluation.store import Store
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

    effort: none, free, cheap or all; protocol leaves it to the protocol, which is cheap for a suite
        of attacks, all for adaptive and free for a single attack.
    indicators: these alone, by id, whatever they cost.
    only: attack nothing; compute the verdict anew on an evaluation that is finished.

    Raises UserError for an effort or an id that does not exist.
    """

    effort: str = "protocol"
    indicators: list[str] | None = None
    only: bool = False

    def __post_init__(self) -> None:
        known = (*COSTS, "protocol")
        if self.effort not in known:
            raise UserError(f"no verdict.effort '{self.effort}'{did_you_mean(self.effort, known)}")
        ids = [indicator.id for indicator in INDICATORS]
        for name in self.indicators or ():
            if name not in ids:
                raise UserError(f"no indicator '{name}'{did_you_mean(name, ids)}")

    def of(self, protocol: Protocol) -> IndicatorJudge | None:
        """What judges an evaluation by that protocol; None where nothing is to be computed."""
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

    def indicators(self, job: Job, stages: Sequence[Stage], store: Store) -> list[Entry]:
        look = Look(job, tuple(stages), found(stages, store), store.images(), self.complete)
        entries = (indicator.entry(look) for indicator in self.chosen)
        return [entry for entry in entries if entry is not None]

    def verdict(self, indicators: Sequence[Entry]) -> Verdict:
        return label.verdict(indicators, [indicator.id for indicator in self.chosen])

    def adds_to(self, verdict: Verdict) -> bool:
        known = set(verdict.get("looked_at", ()))
        return self.only or not {indicator.id for indicator in self.chosen} <= known
