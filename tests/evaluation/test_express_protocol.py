"""The protocol express: its plan, what follows from an audit, and that it is AutoAttack's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_evaluation import evaluation
from torch import Tensor, nn

from advbench.attacks.apgd import APGD
from advbench.attacks.express import Express
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.data.base import ArraySplit
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation.adaptive import AdaptiveProtocol, MSAProtocol
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.express import ExpressProtocol
from advbench.evaluation.job import Job
from advbench.evaluation.phases import Findings, extended
from advbench.evaluation.plan import Plan, Stage, Subject
from advbench.evaluation.protocol import Protocol
from advbench.evaluation.protocols import APGDProtocol, AutoAttackProtocol
from advbench.evaluation.samples import Samples
from advbench.evaluation.stage_state import StageState
from advbench.evaluation.store import Records, read_samples
from advbench.runs.results import Results

N, LEFT = 120, 100


def records(ids: np.ndarray, broken: int) -> Records:
    """Of these samples, of which the first few are broken."""
    state = StageState(torch.from_numpy(ids), torch.zeros(len(ids), dtype=torch.int64))
    found = state.records(range(len(ids)))[0]
    flags = np.arange(len(ids)) < broken
    return replace(found, broken=flags, alone=flags)


def planned(protocol: ExpressProtocol, traits: Traits | None = None, classes: int = 10) -> Plan:
    subject = Subject(traits or Traits(), classes, Threat("linf", 0.1))
    stages = protocol.plan(subject)
    return Plan({}, (), stages, tuple(protocol.may_follow(subject)))


def played(
    protocol: ExpressProtocol, broken: int = 0, signs: tuple[Any, ...] = ()
) -> tuple[list[tuple[int | None, str]], Findings, Plan]:
    """The follow-ups, as their size and reason, where AutoAttack breaks ``broken`` in its first
    stage. Express leaves 100 of 120."""
    plan, everyone = planned(protocol), np.arange(N)
    express = records(everyone, N - LEFT)
    findings = Findings(
        plan.stages, {"clean": records(everyone, 0), "express": express}, indicators=signs
    )
    said: list[tuple[int | None, str]] = []
    while (follow_up := protocol.follow_up(plan, findings)) is not None:
        first = follow_up.stages[0]
        said.append((None if first.only is None else len(first.only), follow_up.reason))
        assert len(said) <= 2, said
        ids = everyone[N - LEFT :] if first.only is None else np.array(first.only)
        found = {first.name: records(ids, broken)}
        found |= {stage.name: records(ids[broken:], 0) for stage in follow_up.stages[1:]}
        stages = extended(findings.stages, follow_up.stages)
        findings = replace(findings, stages=stages, records={**findings.records, **found})
    return said, findings, plan


SIGN = {"id": "zero_gradient", "triggered": True}


@pytest.mark.parametrize(
    ("values", "broken", "signs", "sizes"),
    [
        ({}, 0, (), [64]),
        ({}, 1, (), [64]),  # one odd sample
        ({}, 2, (), [64, None]),
        ({"tolerance": 0.04}, 2, (), [64]),
        ({}, 10, (), [64, None]),
        ({"tolerance": 0.2}, 10, (), [64]),
        ({"escalate": False}, 10, (), [64]),
        ({"audit": 0}, 10, (), []),
        ({"audit": "all"}, 10, (), [None]),
        ({"audit": 1000}, 10, (), [None]),
        ({"audit": "±2"}, 0, (), [52]),
        ({"audit": "+-2"}, 0, (), [52]),
        ({"audit": "10"}, 0, (), [10]),
        ({}, 0, (SIGN,), [None]),
        ({"audit": 0}, 0, (SIGN,), [None]),
        ({"escalate": False}, 0, (SIGN,), [64]),
        ({}, 0, ({"id": "zero_gradient", "triggered": False},), [64]),
        ({}, 0, ({"id": "weak_attack", "triggered": True},), [64]),
    ],
)
def test_what_follows(
    values: dict[str, Any], broken: int, signs: tuple[Any, ...], sizes: list[int | None]
) -> None:
    said, findings, plan = played(ExpressProtocol(**values), broken, signs)
    assert [size for size, _ in said] == sizes
    estimate = ExpressProtocol(**values).estimate(plan, findings)
    if not sizes:
        assert estimate is None
        return
    last = LEFT if sizes[-1] is None else sizes[-1]
    assert estimate is not None and (estimate.survivors, estimate.audited) == (LEFT, last)
    assert estimate.broken == broken
    assert estimate.acc == pytest.approx(LEFT / N * (1 - broken / last))
    if sizes[-1] is None:
        assert estimate.ci95 == ((LEFT - broken) / N, (LEFT - broken) / N)
    assert all(stage.why.startswith(said[-1][1][len("AutoAttack follows: ") :])
               for stage in findings.stages[1:])  # fmt: skip


def test_reasons_are_sentences() -> None:
    (_, first), (_, second) = played(ExpressProtocol(), 10)[0]
    assert first == "AutoAttack follows: audit of 64 of 100 survivors"
    assert "the audit broke 10 of 64" in second and second.endswith("so on all survivors")
    ((_, sign),) = played(ExpressProtocol(), 0, (SIGN,))[0]
    assert "zero_gradient was triggered" in sign


def test_the_plan_is_autoattacks_own() -> None:
    seen = 0
    for traits, classes in (
        (Traits(), 10),
        (Traits(), 2),
        (Traits(), 3),
        (Traits(), 100),
        (Traits(stochastic=True), 10),
        (Traits(batch_dependent=True, batch_size=4), 10),
    ):
        plan = planned(ExpressProtocol(), traits, classes)
        suite = "rand" if traits.stochastic else "standard"
        subject = Subject(traits, classes, Threat("linf", 0.1))
        assert list(plan.follow_ups) == AutoAttackProtocol(suite).stages(subject)
        (stage,) = plan.stages
        assert stage.attack == Express(targets=min(3, classes - 1))
        assert stage.eot_samples == (20 if traits.stochastic else 1)
        seen += 1
    assert seen == 6


@pytest.mark.parametrize(
    "values", [{"audit": "some"}, {"audit": -1}, {"audit": "±x"}, {"steps": 1}, {"tolerance": 1.5},
               {"targets": 0}, {"draws": 0}, {"audit": 0.3}]
)  # fmt: skip
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ExpressProtocol(**values)


def quick(subject: Subject) -> list[Stage]:
    """A suite with names of AutoAttack's stages, and few queries."""
    targeted = APGD(steps=8, loss_name="margin_targeted", targets=2)
    return [
        Stage("apgd-ce", APGD(steps=8), ""),
        Stage("apgd-t", targeted, ""),
        Stage("square", Square(steps=300), ""),
    ]


@dataclass(frozen=True)
class Suite(Protocol):
    """The quick suite alone."""

    name: ClassVar[str] = "suite"

    def stages(self, subject: Subject) -> list[Stage]:
        return quick(subject)


@dataclass(frozen=True)
class QuickExpress(ExpressProtocol):
    """Express, audited by the quick suite."""

    def may_follow(self, subject: Subject) -> list[Stage]:
        return quick(subject)


SUITE = ("apgd-ce", "apgd-t", "square")


class Quantised(nn.Module):
    """Rounds its input, so that its gradient is zero: the plainest way to mask one."""

    def __init__(self, model: nn.Module, levels: float) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * self.levels).round() / self.levels)


class KWTA(nn.Module):
    """k winners take all: a gradient that says little a step away (Xiao et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= x.topk(3).values[:, -1:], x, 0.0)


MASKED: dict[str, Callable[[], nn.Module]] = {
    "quantised": lambda: Quantised(perceptron(32, nn.ReLU()), levels=4.0),
    "k-WTA": lambda: perceptron(256, KWTA()),
}


def perceptron(width: int, activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), activation, nn.Linear(width, 10))


def mlp(protocol: Any, n: int = 24, masked: str = "", eps: float = 0.1) -> Evaluation:
    torch.manual_seed(0)
    model = (MASKED[masked]() if masked else perceptron(32, nn.ReLU())).eval()
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = model(x).argmax(1)
    samples = Samples(ArraySplit(x, y), torch.arange(n), torch.device("cpu"))
    return Evaluation("mlp", "made", protocol, Job(model, samples, Threat("linf", eps)))


def run(case: Evaluation, folder: Path) -> tuple[Results, dict[str, Records]]:
    results = case.execute(folder, case.plan())
    return results, read_samples(folder)


def same(ours: Records, theirs: Records) -> None:
    """Of the samples of ``ours``, bit for bit."""
    theirs = theirs.where(np.isin(theirs.sample, ours.sample))
    for field in dataclasses.fields(Records):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_an_audits_records_are_autoattacks_own(tmp_path: Path) -> None:
    results, ours = run(mlp(QuickExpress(audit=5, escalate=False)), tmp_path / "express")
    whole, theirs = run(mlp(Suite()), tmp_path / "suite")
    assert len(ours["apgd-ce"]) == 5 and len(ours["square"])
    for stage in SUITE:
        same(ours[stage], theirs[stage])
    estimate = results.estimate
    assert estimate is not None and estimate.audited == 5
    assert estimate.ci95[0] <= whole.robust.acc <= estimate.ci95[1] <= results.robust.acc + 1e-9
    assert Results.load(tmp_path / "express" / "results.json") == results
    assert f"at most {100 * results.robust.acc:.1f} % proven" in (results.estimated() or "")


@pytest.mark.parametrize(("masked", "eps"), [("quantised", 0.35), ("k-WTA", 0.05)])
def test_where_gradients_are_masked_it_ends_no_higher_than_autoattack(
    masked: str, eps: float, tmp_path: Path
) -> None:
    case = mlp(QuickExpress(audit=8), masked=masked, eps=eps)
    results, ours = run(case, tmp_path / "express")
    whole, theirs = run(mlp(Suite(), masked=masked, eps=eps), tmp_path / "suite")
    assert 0.2 < whole.robust.acc < 0.9  # and express alone leaves more
    assert results.stages[0].robust_acc > whole.robust.acc + 0.2
    assert results.robust.acc <= whole.robust.acc
    assert "the audit broke" in results.stages[-1].why
    for stage in SUITE:
        same(ours[stage], theirs[stage])
    estimate = results.estimate
    assert estimate is not None and estimate.acc == results.robust.acc == estimate.ci95[1]


def test_audit_all_leaves_what_autoattack_leaves(tmp_path: Path) -> None:
    results, _ = run(mlp(QuickExpress(audit="all"), n=12), tmp_path / "express")
    whole, _ = run(mlp(Suite(), n=12), tmp_path / "suite")
    assert results.robust.acc <= whole.robust.acc


def test_without_survivors_there_is_nothing_to_estimate() -> None:
    protocol, everyone = ExpressProtocol(), np.arange(N)
    plan = planned(protocol)
    found = {"clean": records(everyone, 0), "express": records(everyone, N)}
    assert protocol.estimate(plan, Findings(plan.stages, found)) is None


def test_without_an_audit_nothing_is_claimed(tmp_path: Path) -> None:
    results, _ = run(mlp(QuickExpress(audit=0)), tmp_path)
    assert results.estimate is None and results.estimated() is None
    assert [stage.name for stage in results.stages] == ["express"]


def test_a_linear_model_gets_its_exact_robust_accuracy() -> None:
    express = evaluation(ExpressProtocol(audit=0))
    exact = evaluation(APGDProtocol())
    assert express.execute(None).robust == exact.execute(None).robust


def test_its_passes_are_a_thirtieth_of_autoattacks() -> None:
    attack = Express()
    passes = 3 * attack.queries + 1  # a backward is two forwards
    autoattack = 3 * (APGD().queries + 9 * 100) + 9 * 2 * 100 * 2 + 5000
    assert attack.queries == 80 and passes * 30 < 1.1 * autoattack


def test_msa_and_adaptive_may_search_by_express() -> None:
    net = nn.Linear(1, 1)
    surrogates = {
        "own": Surrogate(net, True, "ce", ""),
        "aux": Surrogate(net, False, "ce", "", auxiliary_loss=True),
        "twin": Surrogate(net, False, "ce", "", transfer=True),
    }
    subject = Subject(Traits(), 10, Threat("linf", 0.1), surrogates=surrogates)
    msa = ["express", "express@own", "apgd-ce@aux", "fab-t", "square"]
    names = [stage.name for stage in MSAProtocol(search="express").plan(subject)]
    assert names == msa
    adaptive = AdaptiveProtocol(search="express").plan(subject)
    assert [stage.name for stage in adaptive][: len(msa)] == msa
    assert adaptive[-1].name == "express@twin" and adaptive[-1].victim == "twin"
    masked = replace(subject, traits=Traits(gradient="none"))
    assert MSAProtocol(search="express").plan(masked)[0].name == "express@own"
    assert "search" not in MSAProtocol().to_json()
    assert MSAProtocol(search="express").to_json()["search"] == "express"
    with pytest.raises(UserError, match=r"no protocol\.search"):
        MSAProtocol(search="fast")
