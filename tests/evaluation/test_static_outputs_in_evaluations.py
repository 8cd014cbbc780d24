"""Results of a compiled model hold until its next call, and nothing relies on more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_searches import EPS, Every, changed, evaluation, files, net, records, samples
from static_outputs import Static, compiling
from torch import Tensor, nn

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Rows, started
from advbench.attacks.expectation import Expectation
from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat
from advbench.evaluation.fast_model import FastModelOptions
from advbench.evaluation.identity import behaviour
from advbench.verdict.judge import Judgement

pytestmark = pytest.mark.usefixtures("with_graphs")

SIGNS = ["probabilities", "stochastic_mismatch", "batch_mismatch", "zero_gradient",
         "gradient_mismatch", "noise"]  # fmt: skip


def test_a_compiled_search(tmp_path: Path) -> None:
    case = changed(evaluation(Every()), fast_model=FastModelOptions(compile="reduce-overhead"))
    found = []
    for fresh in (True, False):
        with compiling(fresh) as calls:
            found.append(records(case, tmp_path / str(fresh)))
        assert calls[0] == {"dynamic": False, "mode": "reduce-overhead"}
    assert found[0] == found[1]


def test_a_model_that_its_user_compiled(tmp_path: Path) -> None:
    found = []
    for fresh in (True, False):
        case = evaluation(Every())
        case = changed(case, model=Static(case.job.model, fresh).eval())
        case = replace(case, judge=Judgement(indicators=SIGNS).of(case.protocol))
        results = case.execute(tmp_path / str(fresh), case.plan())
        signs = results.verdict.get("indicators", ())
        assert [sign["id"] for sign in signs] == SIGNS
        found.append((files(tmp_path / str(fresh)), signs, case.plan().notes, behaviour(case.job)))
    assert found[0] == found[1]


class Drifting(nn.Module):
    """Another model at every call, the same ones each time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x * (1 - 0.02 * self.calls))


def test_means_of_eot_samples() -> None:
    case, attack = samples(net(), 8), APGD(steps=2, loss_name="ce")
    clean, answers = case.fetch(case.ids), []
    for fresh in (True, False):
        rows = Rows(**started(clean, clean.x, torch.zeros_like(clean.ids)))
        oracle = Expectation(Static(Drifting(net()), fresh).eval(), 3)
        answers.append((*oracle.query(attack, rows)[:3], oracle.logits(clean.x)))
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_draws_of_a_referee() -> None:
    case, judged = samples(net(), 8), []
    clean = case.fetch(case.ids)
    for fresh in (True, False):
        model = Static(Drifting(net()), fresh).eval()
        judged.append(Referee(model, Threat("linf", EPS), chunk=3, draws=4).score(clean.x, clean.y))
    assert all(torch.equal(one, other) for one, other in zip(*judged, strict=True))
