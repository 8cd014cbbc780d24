"""A single attack is held against a stronger search, and a number of 0 is not doubted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_up_looks import look, net
from torch import Tensor, nn

from advbench.attacks.pgd import PGD
from advbench.defenses.base import Surrogate, Traits
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.express import ExpressProtocol
from advbench.evaluation.plan import Stage, Subject
from advbench.evaluation.protocols import PGDProtocol
from advbench.runs.accuracy import clopper_pearson
from advbench.verdict import stronger
from advbench.verdict.judge import Judgement
from advbench.verdict.look import Look
from advbench.verdict.reading import fall
from advbench.verdict.stronger import stronger_search


class Eights(nn.Module):
    """Is right in batches of eight images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if len(x.unique(dim=0)) == 8 else -self.net(x)


def single(*given: Any, **named: Any) -> Look:
    """A look at an evaluation by one attack."""
    return replace(look(*given, **named), complete=False)


def test_only_a_single_attack_is_held_against_a_stronger_one() -> None:
    found = single(net(), n=12)
    reading = stronger_search(found)
    assert reading is not None and reading.triggered and reading.weight is None  # a proof
    assert "points or more" in reading.why
    assert found.forwards > 12 and found.backwards > 12
    assert stronger_search(look(net(), n=12)) is None
    assert stronger_search(single(net(), n=12, traits=Traits(gradient="none"))) is None


def test_a_fall_inside_the_interval_is_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = single(net())
    assert len(found.job.samples) == 40
    monkeypatch.setattr(stronger, "_broken_by_search", lambda look, some: some[:hits])
    for hits, expected in ((1, None), (3, "evidence"), (5, "proof"), (12, "proof")):
        assert _weight(found) == expected, hits
    monkeypatch.setattr(stronger, "LOOKED_AT", 20)  # of the others, as much as is certain
    for hits, expected in ((5, "evidence"), (12, "proof")):
        assert _weight(found) == expected, hits


def test_a_fall_is_a_proof_where_it_ends_below_the_interval_of_the_number() -> None:
    assert fall(5, 50, 50, 100) == (0.05, False)  # 45 %; the interval of 50 % ends at 40.4 %
    assert fall(9, 50, 50, 100) == (0.09, False) and fall(10, 50, 50, 100) == (0.1, True)
    by, proof = fall(10, 25, 50, 100)  # of the other 25, the lower end of 10 of 25
    assert by == pytest.approx(0.5 * clopper_pearson(10, 25)[0]) and proof


def _weight(found: Look) -> str | None:
    reading = stronger_search(found)
    assert reading is not None
    return (reading.weight or "proof") if reading.triggered else None


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """The stages that an engine is given; it runs two steps in the place of each."""
    stages: list[Stage] = []
    run, short = Engine.run, PGD(steps=2, loss_name="margin")

    def seen(self: Engine, given: Any, store: Any) -> Any:
        stages.extend(given)
        return run(self, [replace(one, attack=short) for one in given], store)

    monkeypatch.setattr(Engine, "run", seen)
    return stages


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_it_searches_as_express_does(norm: str, searches: list[Stage]) -> None:
    found = single(net(), n=2, norm=norm)
    assert stronger_search(found) is not None
    express = ExpressProtocol().stages(Subject(found.job.traits, 10, found.job.threat))
    assert searches == express and len(searches) == (2 if norm == "l1" else 1)
    searches.clear()
    other = Surrogate(net(), exact=False, loss="ce", why="")
    assert stronger_search(single(net(), n=2, norm=norm, surrogates={"other": other})) is not None
    names = [one.name for one in express]
    assert [one.name for one in searches] == [*names, *(f"{name}@other" for name in names)]


@pytest.mark.usefixtures("searches")
def test_a_batch_is_searched_whole_and_its_survivors_count() -> None:
    traits = Traits(batch_dependent=True, batch_size=8)
    calm = stronger_search(single(Eights(), n=8, eps=1e-4, broken=[3], traits=traits))
    assert calm is not None and calm.value == 0
    reading = stronger_search(single(Eights(), n=8, eps=1.0, broken=[3], traits=traits))
    assert reading is not None and reading.value == 1.0 and "4 of 4 images" in reading.why


@pytest.mark.parametrize(("eps", "label"), [(1.0, "reliable"), (1e-4, "inconclusive")])
def test_where_nothing_is_left_a_weak_attack_is_strong_enough(eps: float, label: str) -> None:
    protocol = PGDProtocol(steps=5, loss="margin")
    job = replace(look(net(), n=6, eps=eps).job, batch_size=6)
    judge = Judgement(indicators=["weak_attack"]).of(protocol)
    case = Evaluation("net", "digits", protocol, job, judge=judge)
    results = case.execute(None, case.plan())
    assert (results.robust.acc == 0) == (eps == 1.0)
    sign = results.verdict.get("indicators", [])[0]
    assert sign["triggered"] and results.verdict.get("label") == label
