"""What a search may claim: no success invented, on honest models and on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from made_up_searches import EPS, SHAPE, net, samples
from torch import Tensor, nn

import advbench
from advbench.attacks.apgd import APGD
from advbench.attacks.base import Clean
from advbench.attacks.pgd import PGD
from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation.engine import Engine
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.protocols import CurveProtocol, PGDProtocol
from advbench.evaluation.resources import Resources
from advbench.evaluation.store import Store
from advbench.runs.fingerprint import model_sha256


class Liar(nn.Module):
    """Calls every image misclassified."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 5) + 0 * x.flatten(1)[:, :5]


def test_a_surrogate_is_searched_and_the_model_is_scored() -> None:
    model = net()
    case = samples(model)
    stages = [
        Stage("lies", PGD(steps=5), "nothing is broken because a surrogate says so", "liar"),
        Stage("twin", APGD(steps=10), "the same weights", "twin"),
    ]
    surrogates = {
        name: Surrogate(model, exact=False, loss="ce", why="")
        for name, model in {"liar": Liar().eval(), "twin": net()}.items()
    }
    store = Store(None)
    threat = Threat("linf", EPS)
    assert Engine(Job(model, case, threat, batch_size=16, surrogates=surrogates)).run(stages, store)
    assert store.records("lies").broken.sum() <= 5  # a random start may be lucky
    direct = Store(None)
    assert Engine(Job(model, case, threat, batch_size=16)).run(
        [Stage("twin", APGD(steps=10), "")], direct
    )
    broken = [set(s.records("twin").sample[s.records("twin").broken]) for s in (store, direct)]
    lucky = set(store.records("lies").sample[store.records("lies").broken])
    assert broken[0] | lucky == broken[1] | lucky and len(broken[1]) > 3


class Noisy(nn.Module):
    """Right by a margin of ``edge``, under noise of the logits of size one."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        right = torch.full((len(x), 1), self.edge) + torch.randn(len(x), 1)
        return torch.cat([right, torch.zeros(len(x), 1)], 1) + 0 * x.flatten(1)[:, :2]


def test_noise_is_judged_by_the_majority() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(300, *SHAPE), torch.zeros(300, dtype=torch.int64)
    for edge, low, high in ((1.5, 0.0, 0.01), (-1.5, 0.99, 1.0), (0.0, 0.01, 0.2)):
        judged = Referee(Noisy(edge), Threat("linf", 0.1), draws=10).judge(x, y, x)
        share = judged.broken.float().mean()
        assert low <= share <= high, (edge, share)
        assert torch.equal(judged.broken, judged.margin < 0)
        assert torch.equal(judged.broken, judged.label != y)


def test_expectation_sees_through_noise() -> None:
    """The gradient of a noisy model points the right way only on average."""

    class Shaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 6 * (torch.randn_like(x) * x).flatten(1)[:, :5]

    model, plain = Shaky(), net()
    case, threat = samples(plain), Threat("linf", EPS)
    broken = []
    for draws in (1, 30):
        store = Store(None)
        stage = Stage("apgd", APGD(steps=10), "", eot_samples=draws)
        engine = Engine(Job(model, case, threat, batch_size=40, traits=Traits(stochastic=True)))
        assert engine.run([stage], store)
        records = store.records("apgd")
        broken.append(int(records.broken.sum()) / max(len(records), 1))
        assert (records.backwards % draws == 0).all() and records.backwards.max() > 0
    assert broken[1] >= broken[0]


# --- the curve, and what earlier evaluations know -----------------------------------------------


def test_a_curve_falls_and_is_right_on_a_linear_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()
    x = torch.rand(80, *SHAPE) * 0.4 + 0.3
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()  # pyright: ignore
    reach = (logits[:, 0] - logits[:, 1]).abs() / weight.abs().sum()
    eps = float(reach.quantile(0.8))
    results = advbench.evaluate(
        model, x, y, threat=Threat("linf", eps), protocol=CurveProtocol(points=5, steps=20)
    )
    shares = [stage.robust_acc for stage in results.stages]
    truth = [float((reach > eps * i / 5).float().mean()) for i in range(1, 6)]
    assert shares == pytest.approx(truth) and shares == sorted(shares, reverse=True)
    assert len(set(shares)) > 3 and results.robust.acc == shares[-1]
    attacked = [stage.attacked for stage in results.stages]
    assert attacked == sorted(attacked, reverse=True)
    radii: list[float | str] = ["1/255", eps / 2]
    own = CurveProtocol(eps=radii)
    assert own.radii(Threat("linf", eps)) == pytest.approx([1 / 255, eps / 2, eps])
    for factor in (0.0, 2.0):
        bad: list[float | str] = [factor * eps]
        with pytest.raises(UserError, match=r"protocol\.eps must lie"):
            CurveProtocol(eps=bad).radii(Threat("linf", eps))


class Plain(nn.Module):
    """Keeps its normalisation as a plain tensor, which no state_dict knows."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.inner, self.mean, self.scales = net(), torch.full((1, 1, 1), mean), (mean, 1.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - self.mean)


def test_models_that_differ_in_a_plain_tensor_are_two() -> None:
    assert model_sha256(Plain(0.1)) == model_sha256(Plain(0.1))
    assert model_sha256(Plain(0.1)) != model_sha256(Plain(0.2))


class Lucky(nn.Module):
    """Wrong three times in ten, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        sign = (torch.rand(len(x), 1) > 0.3).float() * 2 - 1
        return torch.cat([sign, -sign], 1) + 0 * x.flatten(1)[:, :2]


def test_luck_is_no_success() -> None:
    """A hundred chances to be wrong do not break what is right seven times in ten."""
    torch.manual_seed(0)
    x, y = torch.rand(60, *SHAPE), torch.zeros(60, dtype=torch.int64)
    results = advbench.evaluate(
        Lucky(), x, y, threat="linf_8", traits=Traits(stochastic=True),
        protocol=PGDProtocol(steps=100),
    )  # fmt: skip
    assert results.clean.acc > 0.8
    assert results.robust.acc == results.clean.acc


class Hole(nn.Module):
    """Says NaN, with a NaN gradient, a little away from the images."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.inner, self.x = net(), x
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        far = (z[:, None] - self.x).abs().flatten(2).amax(2).amin(1) > 1e-4
        return self.inner(z) * torch.where(far, torch.nan, 1.0)[:, None]


def test_a_point_without_an_answer_breaks_the_sample() -> None:
    case = samples(net())
    clean = case.fetch(case.ids)
    results = advbench.evaluate(Hole(clean.x), clean.x, clean.y, threat="linf_8", protocol="apgd")
    assert results.clean.acc > 0.9 and results.robust.acc == 0


# --- settings -----------------------------------------------------------------------------------


def test_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Resources("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert Resources("cuda").batch_size_for((1, 8, 8)) == 4096
    shapes = ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224))
    assert [cpu.batch_size_for(shape) for shape in shapes] == [512, 256, 64, 8]
    assert Resources("cpu", batch_size=7).batch_size_for((3, 32, 32)) == 7
    wrong: dict[str, Any]
    for wrong, said in (
        ({"batch_size": "large"}, "is not auto or at least 1"),
        ({"batch_size": 0}, "is not auto or at least 1"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"compile": "fast"}, "no trainer.compile 'fast'"),
    ):
        with pytest.raises(UserError, match=said):
            Resources("cpu", **wrong)


def test_rows_of_a_chunk_do_not_change_a_judgement() -> None:
    model = net()
    clean: Clean = samples(model).fetch(torch.arange(40))
    referee = Referee(model, Threat("linf", EPS))
    many = referee.judge(clean.x, clean.y, clean.x)
    for i in (0, 7, 39):
        one = referee.judge(clean.x[i : i + 1], clean.y[i : i + 1], clean.x[i : i + 1])
        assert torch.equal(one.margin[0], many.margin[i])
