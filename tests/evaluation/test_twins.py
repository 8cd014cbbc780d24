"""Surrogates that are made for a model of which nothing is known but its answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import LIARS, THREAT, Zoo, data

import advbench
from advbench.attacks.apgd import APGD
from advbench.backbones.base import Classifier
from advbench.data.arrays import array_split
from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation import student
from advbench.evaluation.adaptive import AdaptiveProtocol
from advbench.evaluation.samples import Samples
from advbench.evaluation.twins import STUDENT, TWIN, StraightThrough, made_for, straight_through
from advbench.runs.fingerprint import model_sha256

N = 24


@pytest.fixture
def net(once: Callable[[str, Callable[[], None]], Path]) -> Classifier:
    return Zoo(once, epochs=3).net("standard", 0)


@pytest.fixture
def samples() -> Samples:
    return Samples(data().test, torch.arange(N), torch.device("cpu"))


CURED = {
    "Quantised": "round",
    "RoundedLogits": "round",
    "DCT": "round",
    "HardLabels": "argmax",
    "Detached": "detach",
    "Negated": "_Negate.backward",
    "RandomGradient": "a gradient hook",
    "GradMode": "is_grad_enabled",
}


@pytest.mark.parametrize("trick", CURED)
def test_the_gradient_of_a_twin_leads_to_what_breaks_the_model(
    trick: str, net: Classifier, samples: Samples
) -> None:
    model = LIARS.TRICKS[trick](net).eval()
    surrogate = straight_through(model, samples, THREAT)
    assert surrogate is not None and surrogate.exact and CURED[trick] in surrogate.why
    _, x, y = samples.fetch(samples.ids)
    twin = surrogate.model
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
    images = advbench.attack(twin, x, y, THREAT, APGD(steps=20, loss_name="margin"))
    with torch.no_grad():
        left = (model(images).argmax(1) == y).float().mean()
    assert left < 0.5, left


class Cast(LIARS.Liar):
    """Integers, as a camera has them, and a switched-off gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = (255 * x).to(torch.uint8)
        return self.net(pixels.float().div(64, rounding_mode="floor") / 4)


def test_casts_and_no_grad_pass_straight_through(net: Classifier, samples: Samples) -> None:
    twin = StraightThrough(Cast(net), harsh=True)
    x = samples.fetch(samples.ids).x.requires_grad_()
    (gradient,) = torch.autograd.grad(twin(x)[:, 0].sum(), x)
    assert gradient.flatten(1).any(1).all()
    assert {"no_grad", "a cast to torch.uint8", "div"} <= set(twin.replaced)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        torch.testing.assert_close(twin(x), Cast(net)(x))
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("trick", [None, "Loud", "Sine"])
def test_a_student_stands_in_where_no_twin_leads_farther(
    trick: str | None, net: Classifier, samples: Samples
) -> None:
    model = net if trick is None else LIARS.TRICKS[trick](net)
    assert straight_through(model.eval(), samples, THREAT) is None


def test_a_student_learns_the_models_answers_and_always_the_same(
    net: Classifier, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "STEPS", 60)
    made = made_for(net, samples, THREAT, Traits(), data().train)
    assert set(made) == {STUDENT} and made[STUDENT].transfer and not made[STUDENT].exact
    _, x, y = samples.fetch(samples.ids)
    learned = made[STUDENT].model
    with torch.no_grad():
        assert (learned(x).argmax(1) == net(x).argmax(1)).float().mean() > 0.8
        images = advbench.attack(learned, x, y, THREAT, APGD(steps=20))
        assert (net(images).argmax(1) == y).float().mean() < 0.8
    torch.manual_seed(5)
    again = student.learn(net, samples, THREAT, data().train)
    assert model_sha256(again) == model_sha256(learned)


def test_a_student_fits_odd_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "STEPS", 2)
    for shape in ((3, 2, 5), (1, 40, 36)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 4)).eval()
        images, labels = torch.rand(9, *shape).movedim(1, -1), torch.zeros(9, dtype=torch.int64)
        split = array_split(images.numpy(), labels.numpy(), "x", "y")
        odd = Samples(split, torch.arange(9), torch.device("cpu"))
        learned = student.learn(model, odd, THREAT, None)
        assert learned(odd.fetch(odd.ids).x).shape == (9, 4)


def test_nothing_is_made_for_a_model_that_depends_on_its_batch(samples: Samples) -> None:
    assert made_for(nn.Flatten(), samples, THREAT, Traits(batch_dependent=True)) == {}


def test_adaptive_brings_a_liar_down(net: Classifier, samples: Samples) -> None:
    _, x, y = samples.fetch(samples.ids[:8])
    protocol = AdaptiveProtocol(square=0, steps=10, restarts=1)
    liar = LIARS.HardLabels(net).eval()
    results = advbench.evaluate(liar, x, y, threat=THREAT, protocol=protocol)
    broken = {stage.name: stage.broken for stage in results.stages}
    assert broken["apgd-ce"] <= 1 and broken[f"apgd-margin@{TWIN}"] >= 3
    (why,) = {s.why for s in results.stages if s.name == f"apgd-margin@{TWIN}"}
    assert "passes straight through: argmax" in why
    with pytest.raises(UserError, match="stochastic"):
        advbench.evaluate(LIARS.Noise(net).eval(), x, y, threat=THREAT, protocol=protocol)
