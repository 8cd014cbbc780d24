"""What would make a number look better than it is, or pass for another's."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import advbench
from advbench.attacks.base import Clean, Oracle, Rows, started, wrong_class
from advbench.attacks.libraries import ReferenceAutoAttack
from advbench.attacks.pgd import PGD
from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat, norm_of, unit
from advbench.backbones.base import Classifier
from advbench.data.base import ArraySplit
from advbench.defenses.base import Defense, Surrogate, Traits, surrogates_of
from advbench.defenses.jumprelu import JumpReLU
from advbench.errors import UserError
from advbench.evaluation.adaptive import AdaptiveProtocol, MSAProtocol
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.fast_model import FastModel, FastModelOptions, fast_copy
from advbench.evaluation.identity import differences
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.protocols import (
    AutoAttackProtocol,
    CleanProtocol,
    PGDProtocol,
    SquareProtocol,
)
from advbench.evaluation.samples import Samples
from advbench.files import code_sha256
from advbench.runs.fingerprint import model_sha256

SHAPE, N = (1, 4, 4), 60


class Linear(nn.Module):
    """Two classes; ``scale`` times the difference of the image's halves."""

    def __init__(self, scale: float = 1.0, output: str = "logits", frozen: bool = False) -> None:
        super().__init__()
        self.scale, self.output, self.frozen = scale, output, frozen
        self.register_buffer("weight", torch.tensor([1.0, -1.0]).repeat_interleave(8))
        self.weight: Tensor
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = self.scale * (x.flatten(1) @ self.weight)
        logits = torch.stack((score, -score), 1)
        logits = logits.softmax(1) if self.output == "probabilities" else logits
        return logits.detach() if self.frozen else logits


def case(model: nn.Module, protocol: Protocol, traits: Traits | None = None, **more: Any) -> Any:
    """An evaluation of images whose halves differ by 4 units: within reach of an eps above 0.25."""
    x = torch.full((N, *SHAPE), 0.25)
    x[:, :, :2] += 0.5
    y = torch.zeros(N, dtype=torch.int64)
    samples = Samples(ArraySplit(x, y), torch.arange(N), y.device)
    job = Job(model, samples, Threat("linf", 0.3), traits=traits or Traits(), batch_size=8, **more)
    return Evaluation("net", "made", protocol, job)


class OneMember(Protocol):
    """APGD on the cross-entropy by the authors' code."""

    name = "one-member"

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("apgd-ce", ReferenceAutoAttack(member="apgd-ce"), "a test")]


# --- images that nobody looked at ---------------------------------------------------------------


@pytest.mark.parametrize("protocol", [CleanProtocol(), PGDProtocol(steps=2)])
def test_images_that_were_not_scored_are_not_counted_as_right(
    protocol: Protocol, tmp_path: Path
) -> None:
    wrong = case(Linear(-1.0), protocol)  # misclassifies every image
    results = wrong.execute(tmp_path, wrong.plan(), budget=1e-9)
    assert results.missing[0] == "clean" and results.clean.acc is results.robust.acc is None
    assert wrong.execute(tmp_path, wrong.plan()).missing == ()
    assert wrong.execute(tmp_path, wrong.plan()).clean.acc == 0


# --- models whose gradient says little ----------------------------------------------------------


def test_the_search_on_a_softmax_sees_its_logits() -> None:
    said, saturated = Traits(output="probabilities"), Linear(4.0, "probabilities")
    with pytest.raises(UserError, match=r"returns probabilities.*traits.output=probabilities"):
        case(saturated, PGDProtocol()).plan()
    evaluation = case(saturated, PGDProtocol(steps=20, restarts=1, loss="margin"), said)
    x = evaluation.job.samples.fetch(torch.arange(8)).x
    for traits, margin in ((said, 32.0), (Traits(), 1.0)):
        engine = Engine(replace(evaluation.job, traits=traits))
        logits = engine._fast_model("model")(x)
        torch.testing.assert_close(logits[:, 0] - logits[:, 1], torch.full((8,), margin))
    results = evaluation.execute(None, evaluation.plan())
    assert (results.clean.acc, results.robust.acc) == (1, 0)


def test_a_model_without_a_gradient_is_not_attacked_along_it() -> None:
    stuck, none = Linear(frozen=True), Traits(gradient="none")
    for protocol in (AutoAttackProtocol(), PGDProtocol()):
        with pytest.raises(UserError, match=r"follows the model's gradient.*protocol=square"):
            case(stuck, protocol, none).plan()
    with pytest.raises(UserError, match=r"no gradient in its input.*traits.gradient=none"):
        case(stuck, PGDProtocol()).plan()
    for traits in (none, Traits()):
        evaluation = case(stuck, SquareProtocol(steps=300), traits)
        assert evaluation.execute(None, evaluation.plan()).robust.acc == 0
    assert [stage.name for stage in case(stuck, MSAProtocol(), none).plan().stages] == ["square"]


# --- models that draw ---------------------------------------------------------------------------


class Moody(nn.Module):
    """Right in a whole batch of evaluations, or wrong in ``share`` of them, by the image's first
    pixel: the points of a search differ in it."""

    def forward(self, x: Tensor) -> Tensor:
        moved = (x[:, 0, 0, 0] != 0.75).float()
        score = torch.where(torch.rand(len(x)) < 0.3 * moved, -1.0, 1.0)
        return torch.stack((score, -score), 1) + 0 * x.flatten(1)[:, :2]


def test_the_worst_draw_is_the_worst_of_all_that_were_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluation = case(Moody().eval(), PGDProtocol(steps=10, restarts=1), Traits(stochastic=True))
    results = evaluation.execute(None, evaluation.plan())
    assert results.robust.acc > 0.5, "three in ten are no majority"
    assert results.measures["worst_draw"] < 0.05, "and yet each was wrong somewhere on the way"


def test_a_group_of_a_model_that_draws_is_not_filled_up_with_others() -> None:
    split = ArraySplit(torch.rand(600, *SHAPE), torch.zeros(600, dtype=torch.int64))
    everyone = Samples(split, torch.arange(600), torch.device("cpu"))
    for traits, rows in ((Traits(), 500), (Traits(stochastic=True), 64)):
        engine = Engine(Job(Linear(), everyone, Threat("linf", 0.1), batch_size=500, traits=traits))
        assert engine.batch_sizes.largest == rows


def test_draws_are_doubled_as_long_as_that_breaks_somebody() -> None:
    subject = Subject(Traits(stochastic=True), 10, Threat("linf", 0.1))
    names = {s.name: s.only_if for s in AdaptiveProtocol(draws=20).more_eot_samples(subject)}
    draws = [20, 40, 80, 160, 320]
    assert list(names) == [f"apgd-margin-eot{n}" for n in draws]
    assert list(names.values())[2:] == list(names)[1:-1]


# --- one model taken for another ----------------------------------------------------------------


def test_what_a_file_imports_from_beside_it_belongs_to_it(tmp_path: Path) -> None:
    mine, helper = tmp_path / "mine.py", tmp_path / "helper.py"
    mine.write_text("import torch\nimport helper\nfrom tools import clean\n")
    alone = code_sha256(mine)
    package = tmp_path / "tools"
    package.mkdir()
    seen = [alone]
    for path, text in (
        (helper, "from deep import y"),
        (tmp_path / "deep.py", "y = 1"),
        (tmp_path / "deep.py", "y = 2"),
        (package / "__init__.py", "from . import inner"),
        (package / "inner.py", "clean = 1"),
        (package / "inner.py", "clean = 2"),
    ):
        path.write_text(text)
        seen.append(code_sha256(mine))
    assert len(set(seen)) == len(seen)
    (tmp_path / "other.py").write_text("a stranger")
    assert code_sha256(mine) == seen[-1]


class Listed(nn.Module):
    """Hides a net in a list, and a function."""

    def __init__(self, scale: float, threshold: float = 0.0) -> None:
        super().__init__()
        self.nets: list[Any] = [Linear(scale), self]
        self.change = lambda x: x - threshold * (x > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[0](self.change(x))


def test_nets_in_lists_are_seen() -> None:
    first = model_sha256(Listed(1.0))
    assert model_sha256(Listed(1.0)) == first
    assert model_sha256(Listed(2.0)) != first


def test_what_a_function_closes_over_is_seen_in_the_logits() -> None:
    first = case(Listed(1.0).eval(), PGDProtocol(steps=1)).plan().to_json()
    for other, same in ((Listed(1.0), True), (Listed(1.0, 0.5), False)):
        differs = differences(case(other.eval(), PGDProtocol(steps=1)).plan().to_json(), first)
        assert (differs == []) == same


class Chatty(Linear):
    """A model with a ``traits`` of its own, which are none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.traits = ["friendly"]


def test_a_foreign_attribute_is_not_taken_for_traits() -> None:
    x = torch.rand(4, *SHAPE)
    results = advbench.evaluate(
        Chatty(), x, torch.zeros(4, dtype=torch.int64), threat=Threat("linf", 0.1),
        protocol=PGDProtocol(steps=1),
    )  # fmt: skip
    assert results.data["n"] == 4


# --- a search that is weaker than it looks -------------------------------------------------------


def test_noise_of_ones_own_is_averaged_over_in_every_surrogate() -> None:
    trunk = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    model = Classifier(trunk, num_features=8, num_classes=10, input_shape=SHAPE)
    guard = JumpReLU(jump=0.1)
    model = guard.apply(model.eval())
    noisy = surrogates_of(guard, model, Traits(stochastic=True))
    still = surrogates_of(guard, model, Traits())
    assert len(noisy) == len(still) == 7
    assert all(one.stochastic for one in noisy.values())
    assert not any(one.stochastic for one in still.values())
    subject = Subject(Traits(stochastic=True), 10, Threat("linf", 0.1), 0, noisy)
    plan = [stage for stage in MSAProtocol().plan(subject) if stage.attack.gradient]
    assert len(plan) > 7 and {stage.eot_samples for stage in plan} == {20}
    own = {"mean": Surrogate(model, False, "ce", "")}
    defense = Mock(spec=Defense, **{"surrogates.return_value": own})
    defense.traits.return_value = Traits(stochastic=True)  # it knows which of them draw
    assert not surrogates_of(defense, model, Traits(stochastic=True))["mean"].stochastic


class Lifted(Linear):
    """Adds the same to all logits, which changes no decision."""

    def __init__(self, lift: float) -> None:
        super().__init__(scale=0.1)
        self.layer = nn.Linear(2, 2).requires_grad_(False)
        self.layer.weight.copy_(torch.eye(2))
        self.layer.bias.fill_(lift)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(super().forward(x))


@pytest.mark.parametrize(("lift", "precision"), [(0.0, "bf16"), (100.0, "32")])
def test_bf16_is_for_margins_that_it_can_see(lift: float, precision: str) -> None:
    x, y = torch.rand(8, *SHAPE), torch.zeros(8, dtype=torch.int64)
    fast = fast_copy(Lifted(lift), FastModelOptions("bf16"), Clean(torch.arange(8), x, y))
    assert isinstance(fast, FastModel) and fast.precision == precision


def test_a_surrogate_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()).eval()
    learning = copy.deepcopy(model).train()
    surrogates = {"twin": Surrogate(learning, False, "ce", "")}
    with pytest.raises(UserError, match="'twin' is in training mode"):
        case(model, MSAProtocol(), surrogates=surrogates)
    case(model, MSAProtocol(), surrogates={"twin": Surrogate(nn.Sequential(model), True, "ce", "")})


class Planned(Protocol):
    name = "planned"

    def __init__(self, **last: Any) -> None:
        self.last = last

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("first", PGD(), ""), Stage("last", PGD(), "", **self.last)]


def test_stages_that_would_measure_nothing_are_refused() -> None:
    linf = Threat("linf", 0.1)
    for last, traits, said in (
        ({"eps": 0.2}, Traits(), "beyond the threat, linf 0.1"),
        ({"only_if": "frist"}, Traits(stochastic=True), "no earlier stage; did you mean 'first'?"),
        ({"only_if": "last"}, Traits(stochastic=True), "no earlier stage"),
        ({"only_if": "first"}, Traits(), "judged in groups"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            Planned(**last).plan(Subject(traits, 10, linf))
    for last, traits in (
        ({"eps": 0.1}, Traits()),
        ({"only_if": "first"}, Traits(stochastic=True)),
    ):
        assert len(Planned(**last).plan(Subject(traits, 10, linf))) == 2


@pytest.mark.parametrize("scale", [1e-13, 1e-20, 1e-30])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_smallest_gradient_is_a_direction(norm: str, scale: float) -> None:
    delta = torch.randn(5, 3, 4, 4)
    delta[1] = 0.0
    found = unit(scale * delta, norm)
    torch.testing.assert_close(found, unit(delta, norm))
    assert torch.equal(found[1], torch.zeros(3, 4, 4))
    torch.testing.assert_close(norm_of(found, norm)[[0, 2, 3, 4]], torch.ones(4))


def test_infinite_pixels_break_nothing() -> None:
    x = torch.full((3, *SHAPE), 0.5)
    for norm in ("linf", "l2", "l1"):
        proposal = x.clone()
        proposal[0, 0, 0, 0], proposal[1, 0, 0, 0] = torch.inf, -torch.inf
        referee = Referee(Lifted(0.0), Threat(norm, 0.1))
        judged = referee.judge(x, torch.zeros(3, dtype=torch.int64), proposal)
        assert judged.point.isfinite().all() and not judged.broken.any()


def test_the_l1_budget_holds_for_large_images() -> None:
    x = torch.rand(2, 3, 224, 224)
    threat = Threat("l1", 12.0)
    referee = Referee(nn.Flatten(), threat)
    judged = referee.judge(x, torch.zeros(2, dtype=torch.int64), x + torch.randn_like(x))
    moved = (judged.point.double() - x.double()).flatten(1).abs().sum(1)
    assert (moved <= 12.0 * (1 + 1e-5)).all() and threat.contains(judged.point, x).all()


def test_a_masked_class_is_a_target_before_the_true_one() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([1.0, -torch.inf, 0.5, -torch.inf]).expand(len(x), 4)

    y = torch.tensor([0, 1, 2, 3])
    x = torch.rand(4, *SHAPE)
    for rank in range(3):
        rows = Rows(**started(Clean(torch.arange(4), x, y), x, torch.zeros_like(y)))
        assert not (wrong_class(Oracle(Masked()), rows, torch.full((4,), rank)) == y).any()


# --- libraries ----------------------------------------------------------------------------------


class Small(nn.Module):
    """Has no memory for more than 4 rows, and says it as a CPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 GiB")
        return self.inner(x)


def test_the_authors_code_goes_on_in_smaller_batches_where_memory_ends() -> None:
    evaluation = case(Small(), OneMember())
    results = evaluation.execute(None, evaluation.plan())
    assert (results.clean.acc, results.robust.acc, results.missing) == (1, 0, ())


def test_what_pyautoattack_raises_is_one_line() -> None:
    x = torch.rand(4, 1, 32, 24)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).eval()
    with torch.no_grad():
        y = flat(x).argmax(1)
    with pytest.raises(UserError, match=r"pyautoattack's square failed: ") as error:
        advbench.evaluate(
            flat, x, y, threat=Threat("l2", 1e-4), protocol=AutoAttackProtocol(engine="reference")
        )
    assert "\n" not in str(error.value)
