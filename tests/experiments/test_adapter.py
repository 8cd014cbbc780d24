"""Models as people have them are evaluated, or refused with the cure."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from odd_models import AS_PLAIN, REFUSED, Around, plain
from torch import Tensor, nn

import advbench
from advbench.attacks.threat import Threat
from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation.protocols import PGDProtocol
from advbench.experiments.adapter import adapted, in_evaluation_mode, initialise_lazy
from advbench.progress import NullProgress

SHAPE = (1, 8, 8)


def images(n: int = 40) -> tuple[Tensor, Tensor]:
    """Images on the grid of digits, with the plain net's own labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 17, (n, *SHAPE), generator=generator) / 16
    with torch.no_grad():
        return x, plain()(x).argmax(1)


def ready(model: nn.Module) -> tuple[nn.Module, list[str]]:
    return adapted(in_evaluation_mode(model), SHAPE, 3)


class Notes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def measure(model: nn.Module, progress: Notes | None = None) -> advbench.Results:
    x, y = images()
    protocol = PGDProtocol(steps=2)
    return advbench.evaluate(
        model, x, y, threat=Threat("linf", 0.02), protocol=protocol, progress=progress
    )


@pytest.mark.parametrize("name", AS_PLAIN)
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of scripting and exporting
def test_it_is_evaluated_as_the_plain_model(name: str) -> None:
    build, told = AS_PLAIN[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, notices = ready(build())
    assert told in " ".join(notices) and bool(notices) >= bool(told)
    x, _ = images()
    before = x.clone()
    with torch.no_grad():
        logits, wanted = model(x).float(), plain()(x)
    assert torch.equal(x, before)
    tolerance = 0.05 if name in ("bfloat16", "half", "casts", "clamp_") else 1e-4
    offset = 1e3 if name == "offset" else 0.0
    torch.testing.assert_close(logits - offset, wanted, rtol=0, atol=tolerance)
    results = measure(model)
    assert results.clean.acc == pytest.approx(measure(plain()).clean.acc, abs=0.03)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_cure(name: str) -> None:
    build, cure = REFUSED[name]
    with pytest.raises(UserError, match=cure) as refusal, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(ready(build())[0])
    assert "\n" not in str(refusal.value)


def test_the_tables_are_whole() -> None:
    assert len(AS_PLAIN) + len(REFUSED) >= 32


def test_a_large_offset_is_no_noise() -> None:
    """Rounding at 1e5 is a hundredth of a logit, and nobody's noise."""
    assert measure(Around(after=lambda z: z + 1e5).eval()).clean.acc > 0.9


def test_sigmoids_a_dead_gradient_and_silent_noise_are_noted() -> None:
    for model, traits, words in (
        (Around(after=torch.sigmoid), None, "independent sigmoids"),
        (
            Around(lambda x: x + 0 * x.sum()),
            Traits(stochastic=True),
            "declared stochastic",
        ),
        (Around(lambda x: x.round().detach() + 0 * x), None, "gradient is zero on all 16"),
    ):
        notes = Notes()
        x, y = images()
        advbench.evaluate(
            model.eval(), x, y, threat="linf_8", protocol=PGDProtocol(steps=1), traits=traits,
            progress=notes,
        )  # fmt: skip
        assert words in " ".join(notes.notes)


@pytest.mark.parametrize(("shift", "told"), [(0, False), (1, True)])
def test_clean_accuracy_at_chance_is_noted(shift: int, told: bool) -> None:
    x, y = images(60)
    notes = Notes()
    advbench.evaluate(
        plain(), x, (y + shift) % 3, threat="linf_8", protocol="clean", progress=notes
    )
    assert ("no better than guessing" in " ".join(notes.notes)) == told


def test_lazy_modules_get_shapes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    assert initialise_lazy(net, SHAPE) and not initialise_lazy(net, SHAPE)
    assert net[1].weight.shape == (3, 64)
    with pytest.raises(UserError, match="lazy modules can't take images"):
        initialise_lazy(nn.Sequential(nn.LazyConv2d(2, 99)), SHAPE)


def test_compiled_models_are_unwrapped() -> None:
    model, notices = ready(torch.compile(plain()))  # pyright: ignore
    assert isinstance(model, nn.Sequential) and "OptimizedModule" in notices[0]


def test_what_has_the_form_is_left_as_it_is() -> None:
    net = plain()
    assert ready(net) == (net, [])
    assert np.isclose(measure(net).clean.acc, 1.0)
