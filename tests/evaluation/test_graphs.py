"""CUDA graphs of a search, by a stand-in that computes anew into the memory of the recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_searches import Every, Mixed, changed, evaluation, net, records
from torch import Tensor, nn

from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation import graphs
from advbench.evaluation.fast_model import FastModelOptions
from advbench.evaluation.graphs import Graphs
from advbench.evaluation.plan import Stage, Subject

pytestmark = pytest.mark.usefixtures("with_graphs")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Graphs on the CPU. Returns the shapes of the results that are recorded."""
    shapes: list[torch.Size] = []

    def record(work: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], Any]]:
        memory = work().clone()
        shapes.append(memory.shape)
        return memory, lambda: memory.copy_(work())

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "warm_up", lambda work: work())
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return shapes


def test_the_same_bytes(
    recorded: list[torch.Size], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FastModelOptions(graphs=True)
    case = changed(evaluation(Every(), batch_size=8), fast_model=options)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEVICES", ())
        plain = records(case, tmp_path / "plain")
    assert not recorded
    assert records(case, tmp_path / "graphs") == plain
    assert {shape[0] for shape in recorded} == {1, 2, 4, 8}  # powers of two
    assert len(recorded) == 4 * 3, "forward, forward and backward, of each size"


class Drawing(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.001 * torch.randn_like(x))


@dataclass(frozen=True)
class One(Mixed):
    def stages(self, subject: Subject) -> list[Stage]:
        return super().stages(subject)[:1]


@pytest.mark.parametrize(
    "traits", [Traits(stochastic=True), Traits(batch_dependent=True, batch_size=8)]
)
def test_models_that_draw_or_look_at_the_batch_have_none(
    recorded: list[torch.Size], traits: Traits, tmp_path: Path
) -> None:
    case = evaluation(One(), n=16)
    model = Drawing(case.job.model).eval() if traits.stochastic else case.job.model
    options = FastModelOptions(graphs=True)
    records(changed(case, model=model, traits=traits, fast_model=options), tmp_path)
    assert not recorded


def test_what_cannot_be_recorded_runs_as_it_is(
    recorded: list[torch.Size], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = changed(evaluation(One()), fast_model=FastModelOptions(graphs=True))
    plain, notes = records(case, tmp_path / "plain")
    assert recorded and not any("graphs" in note for note in notes)

    def refuse(work: Callable[[], Tensor], pool: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", refuse)
    found, notes = records(case, tmp_path / "refused")
    assert found == plain
    told = [note for note in notes if "graphs" in note]
    assert told == ["trainer.graphs: the model runs without graphs: operation not permitted when "
                    "stream is capturing"]  # fmt: skip


def test_memory_that_runs_out_is_not_hidden(
    recorded: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(work: Callable[[], Tensor], pool: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    model = Graphs(net(), pytest.fail)
    monkeypatch.setattr(graphs, "record", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.rand(2, 1, 6, 6))
    assert not model.failed


def test_a_backward_pass_that_comes_too_late(recorded: list[torch.Size]) -> None:
    model, x = Graphs(net().requires_grad_(False), pytest.fail), torch.rand(2, 1, 6, 6)
    logits = model(x.requires_grad_())
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match="after its next forward pass"):
        logits.sum().backward()
    assert len(recorded) == 3


def test_one_kind_of_graphs() -> None:
    with pytest.raises(UserError, match=r"trainer\.graphs=true and trainer\.compile=default"):
        FastModelOptions(compile="default", graphs=True)
