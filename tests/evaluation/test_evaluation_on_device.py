"""Evaluations on a pretended device: nothing mixed, and the same records as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from components import CLASSES, DATA, DEFENSES, SHAPE, THREAT
from made_up_searches import files
from pretend_cuda import HOME, on_device, pretending
from torch import nn

from advbench.attacks.base import Attack
from advbench.backbones.convnet import convnet
from advbench.data.base import ArraySplit
from advbench.defenses.base import Defense
from advbench.defenses.chain import Chain
from advbench.defenses.hpm import HPM
from advbench.defenses.mfdv_snn import VarianceHead
from advbench.defenses.sparta import Sparta
from advbench.evaluation.adaptive import AdaptiveProtocol, MSAProtocol
from advbench.evaluation.deadline import Budget
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.express import ExpressProtocol
from advbench.evaluation.plan import Stage, Subject
from advbench.evaluation.resources import Resources
from advbench.experiments.subject import Candidate, evaluation_of
from advbench.experiments.subject import TestData as Images
from advbench.verdict.judge import Judgement
from advbench.verdict.registry import INDICATORS

BATCH = 4
HELD: dict[str, Defense] = {
    **{name: DEFENSES[name] for name in ("none", "awnet", "sparta", "jumprelu", "mfdv_snn")},
    "hpm": HPM(eval_batch=BATCH),
    "chain": Chain(members=(Sparta(share="net"), HPM(eval_batch=BATCH))),
}
FEW = {"steps": 2, "targets": 1, "restarts": 1}
N = 4


def short(stages: list[Stage]) -> list[Stage]:
    """The same stages, of a few queries each."""

    def few(attack: Attack) -> Attack:
        known = {field.name: getattr(attack, field.name) for field in fields(attack)}
        return replace(attack, **{k: min(known[k], v) for k, v in FEW.items() if k in known})

    return [
        replace(stage, attack=few(stage.attack), eot_samples=min(stage.eot_samples, 2))
        for stage in stages
    ]


@dataclass(frozen=True)
class MSA(MSAProtocol):
    def stages(self, subject: Subject) -> list[Stage]:
        return short(super().stages(subject))


@dataclass(frozen=True)
class Adaptive(AdaptiveProtocol):
    def stages(self, subject: Subject) -> list[Stage]:
        return short(super().stages(subject))


@dataclass(frozen=True)
class Express(ExpressProtocol):
    def stages(self, subject: Subject) -> list[Stage]:
        return short(super().stages(subject))

    def may_follow(self, subject: Subject) -> list[Stage]:
        return short(super().may_follow(subject))


def prepared(name: str) -> nn.Module:
    """The defense on a model that is on the device already, as a retrofit may be."""
    torch.manual_seed(0)
    defense = HELD[name]
    net = convnet(num_classes=CLASSES, input_shape=SHAPE).build()
    model = defense.apply(net.to(HOME)).eval()
    with torch.no_grad():
        defense.prepare(model, DATA)
    if isinstance(model.head, VarianceHead):  # without training all is noise
        nn.init.constant_(model.head.rho.bias, -6)
    return model


def evaluation(model: Any, name: str, protocol: Any, verdict: Any = None) -> Evaluation:
    defense, resources = HELD[name], Resources(batch_size=8)
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x.to(HOME)).argmax(1).cpu()
    subject = Candidate(name, model, defense.traits(model), defense)
    return evaluation_of(
        subject,
        Images("made", ArraySplit(x, y), tuple(SHAPE)),
        THREAT,
        protocol,
        resources,
        resources.device,
        verdict=verdict or Judgement(effort="none"),
    )


CASES = [
    *((name, Adaptive(search="express", square=2)) for name in HELD),
    ("sparta", MSA(square=2)),
    *((name, Express(audit=2)) for name in ("none", "hpm", "mfdv_snn")),
]


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_nothing_is_mixed(name: str, protocol: Any) -> None:
    with pretending():
        case = evaluation(prepared(name), name, protocol)
        assert case.job.samples.device.type == HOME.type
        assert all(map(on_device, case.job.model.state_dict().values()))
        results = case.execute(None, case.plan())
    assert results.stages[0].attacked == N


@pytest.mark.parametrize(
    ("name", "protocol", "passes"),
    [("none", MSA(square=2), 40), ("hpm", MSA(square=2, search="express"), 60)],
)
def test_resumed_with_the_same_bytes(name: str, protocol: Any, passes: int, tmp_path: Path) -> None:
    """Of single images in the middle of a search, of a batch between two stages."""
    with pretending():
        case = evaluation(prepared(name), name, protocol)
        plan = case.plan()
        case.execute(tmp_path / "whole", plan)
        cut = case.execute(tmp_path / "parts", plan, budget=Budget(passes=passes))
        assert 0 < len(cut.missing) < len(plan.stages)
        assert not case.execute(tmp_path / "parts", plan).missing
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


LONG = ("monotone", "loss_gap")
"""Searches as those of other indicators, and more of them."""


def test_indicators() -> None:
    chosen = [indicator.id for indicator in INDICATORS if indicator.id not in LONG]
    with pretending():
        case = evaluation(prepared("none"), "none", MSA(square=2), Judgement(indicators=chosen))
        results = case.execute(None, case.plan())
    signs = results.verdict.get("indicators", ())
    spent = [sign["id"] for sign in signs if sign.get("forwards")]
    assert len(spent) >= 11, spent
