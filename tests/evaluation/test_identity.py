"""A model is known by how it behaves; code and rounding do not stop an evaluation from resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_searches import Notes, changed, evaluation, net
from torch import Tensor, nn

from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation import identity
from advbench.evaluation.evaluation import Evaluation, is_home
from advbench.evaluation.identity import behaves_otherwise
from advbench.evaluation.protocols import PGDProtocol

OUTSIDE: dict[str, Any] = {}


class Outside(nn.Module):
    """Its forward uses a net that is not in the module."""

    def forward(self, x: Tensor) -> Tensor:
        return OUTSIDE["net"](x) * OUTSIDE.get("scale", 1.0)


def outside(**given: Any) -> Evaluation:
    OUTSIDE.clear()
    OUTSIDE.update({"net": net(), **given})
    return changed(evaluation(PGDProtocol(steps=5, loss="margin")), model=Outside().eval())


def test_a_model_that_changed_outside_of_its_module_is_another(tmp_path: Path) -> None:
    case = outside()
    case.execute(tmp_path / "a")
    assert is_home(tmp_path / "a", case.plan())
    notes, other = Notes(), outside(scale=1.5)
    assert not is_home(tmp_path / "a", other.plan())
    with pytest.raises(UserError, match=r"behaviour of model: its logits changed by \d+% of"):
        other.execute(tmp_path / "a")
    other.execute(tmp_path / "b", None, notes, archive=tmp_path)
    assert not any("known" in note for note in notes.notes), "the stage cache asks too"
    again = Notes()
    other.execute(tmp_path / "c", None, again, archive=tmp_path)
    assert len([note for note in again.notes if "known from" in note]) == 2


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_rounding_is_no_other_behaviour(offset: float) -> None:
    class Rounded(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.net, self.noise = net(), noise

        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x) + offset
            return logits * (1 + self.noise * torch.linspace(-1, 1, 5))

    plans = [
        {"behaviour": identity.behaviour(changed(evaluation(), model=Rounded(noise).eval()).job)}
        for noise in (0.0, 1e-7, 0.1)
    ]
    assert behaves_otherwise(plans[0], plans[1]) == []
    assert behaves_otherwise(plans[0], plans[2]) != []


def test_noise_has_no_behaviour() -> None:
    job = changed(evaluation(), traits=Traits(stochastic=True)).job
    assert identity.behaviour(job) == {}


def test_a_plan_without_behaviour_counts_only_where_hashes_say_something(tmp_path: Path) -> None:
    for name, case in (("net", evaluation(PGDProtocol(steps=5))), ("outside", outside())):
        folder = tmp_path / name
        case.execute(folder)
        plan = json.loads((folder / "plan.json").read_text())
        del plan["behaviour"], plan["tensors"], plan["checksum"]  # as an earlier version wrote it
        (folder / "plan.json").write_text(json.dumps(plan))
        notes = Notes()
        if name == "net":
            case.execute(folder, None, notes)
            assert any("was not checked" in note for note in notes.notes)
        else:
            with pytest.raises(UserError, match="behaviour, of which nothing was kept"):
                case.execute(folder)
        case.execute(tmp_path / f"{name}-again", None, notes, archive=tmp_path)
        assert not any(f"known from {folder}" in note for note in notes.notes)


def test_an_evaluation_of_other_code_is_resumed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = evaluation(PGDProtocol(steps=20, restarts=3))
    whole = case.execute(tmp_path / "whole")
    folder = tmp_path / "cut"
    ours = identity.versions()
    monkeypatch.setattr("advbench.evaluation.evaluation.versions", lambda: {"advbench": "0"})
    cut = case.execute(folder, budget=1e-9)
    assert cut.missing and is_home(folder, case.plan())
    monkeypatch.setattr("advbench.evaluation.evaluation.versions", lambda: ours)
    assert is_home(folder, case.plan()), "it is to be resumed"
    notes = Notes()
    results = case.execute(folder, None, notes)
    assert (results.robust, results.clean) == (whole.robust, whole.clean)
    assert any("started by other code (advbench 0)" in note for note in notes.notes)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["identity"]["versions"] == {"advbench": "0"}
    assert [sitting["versions"] for sitting in plan["resumed"]] == [ours]
    # Finished by other code: a new evaluation by default, and no number is thrown away.
    monkeypatch.setattr("advbench.evaluation.evaluation.versions", lambda: {"advbench": "2"})
    assert not is_home(folder, case.plan())
    assert case.execute(folder, None, notes).robust == whole.robust
    assert "finished by other code" in notes.notes[-1]
