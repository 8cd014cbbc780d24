"""What ``adaptive`` runs by itself where an indicator is triggered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from made_up_looks import look, net

from advbench.evaluation.adaptive import AdaptiveProtocol
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.phases import Findings
from advbench.evaluation.plan import Plan, Stage, Subject
from advbench.verdict.judge import Judgement

PROTOCOL = AdaptiveProtocol(steps=3, restarts=1, square=5)


def sign(kind: str, triggered: bool = True) -> Any:
    return {"id": kind, "class": "evidence", "kind": kind, "question": "gradient",
            "triggered": triggered, "why": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], []),
        (["gradient"], ["square-long"]),
        (["black box", "noise"], ["square-long"]),
        (["effort"], ["apgd-margin-longest"]),
        (["effort", "gradient"], ["square-long", "apgd-margin-longest"]),
        (["outputs", "records"], []),
    ],
)
def test_what_follows(kinds: list[str], expected: list[str]) -> None:
    job = look(net(), n=4).job
    subject = Subject(job.traits, 10, job.threat)
    plan = Plan({}, (), PROTOCOL.plan(subject), tuple(PROTOCOL.may_follow(subject)))
    said = (*map(sign, kinds), sign("gradient", triggered=False))
    asked = PROTOCOL.follow_up(plan, Findings(plan.stages, {}, 0, said))
    assert [stage.name for stage in (asked.stages if asked else ())] == expected
    if asked:  # each comes once
        more = (*plan.stages, *asked.stages)
        assert PROTOCOL.follow_up(plan, Findings(more, {}, 0, said)) is None


def test_adaptive_asks_its_indicators() -> None:
    job = dataclasses.replace(look(net(), n=6).job, batch_size=6)
    judge = Judgement(indicators=["black_box"]).of(PROTOCOL)

    class Suspicious:
        """Finds a gradient that misleads."""

        only = False

        def indicators(
            self, job: Any, stages: Sequence[Stage], store: Any, measured: Any
        ) -> list[Any]:
            assert judge is not None
            return [*(judge.indicators(job, stages, store, measured) or ()), sign("gradient")]

        def adds_to(self, verdict: Any) -> bool:
            return False

        def verdict(self, indicators: Any, passes: Any, nothing_left: bool) -> Any:
            return {"label": "inconclusive", "indicators": list(indicators)}

    case = Evaluation("net", "digits", PROTOCOL, job, judge=Suspicious())
    names = [stage.name for stage in case.execute(None, case.plan()).stages]
    assert names[-1] == "square-long" and "apgd-margin-longest" not in names
    calm = dataclasses.replace(case, judge=judge)
    names = [stage.name for stage in calm.execute(None, calm.plan()).stages]
    assert "square-long" not in names
