"""Each indicator triggers where it should and is quiet where it should."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_looks import BLIND, liar, look, net, stage
from torch import Tensor, nn

from advbench.attacks.fab import FAB
from advbench.attacks.pgd import PGD
from advbench.defenses.base import Surrogate, Traits
from advbench.evaluation.plan import Stage
from advbench.evaluation.protocols import AutoAttackProtocol
from advbench.evaluation.store import Images
from advbench.verdict.gradients import after_all, median_interval
from advbench.verdict.look import Look
from advbench.verdict.reading import of_share
from advbench.verdict.registry import INDICATORS
from advbench.verdict.words import table

NOISY = Traits(stochastic=True)
EOT = [stage("eot20", draws=20), stage("eot40", draws=40)]


class Scaled(nn.Module):
    """The net with logits that are too large for the softmax of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return 30 * self.net(x)


class Keyed(nn.Module):
    """The net with noise on its logits that a checksum of the image decides."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        keys = [zlib.crc32(row.detach().numpy().tobytes()) for row in x]
        drawn = [np.random.default_rng(key).normal(0, 3, 10) for key in keys]
        return self.net(x) + torch.from_numpy(np.stack(drawn).astype(np.float32))


class Blurred(nn.Module):
    """The net with a gradient that is smoothed, and about right."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        seen = x.view_as(x)
        if seen.requires_grad:
            seen.register_hook(lambda gradient: nn.functional.avg_pool2d(gradient, 3, 1, 1))
        return self.net(seen)


class Band(nn.Module):
    """Is wrong in a narrow shell around the image alone, which long steps jump over."""

    def forward(self, x: Tensor) -> Tensor:
        shift = x.flatten(1).mean(1) - 0.5
        hit = (shift.abs() > 0.0135) & (shift.abs() < 0.0145)
        return torch.stack([torch.zeros_like(shift), hit * 2.0 - 1.0 + 1e-3 * shift], 1)


def surrogate(transfer: bool = False) -> dict[str, Surrogate]:
    return {"other": Surrogate(net(), exact=False, loss="ce", why="", transfer=transfer)}


def kept(shift: float) -> Look:
    """Images that were kept: the clean ones of samples that are wrong, moved by ``shift``."""
    found = look(net(), n=200)
    wrong = np.setdiff1d(found.job.samples.ids.numpy(), found.correct)
    x = found.job.samples.fetch(torch.from_numpy(wrong)).x
    found.images = Images(wrong, (x + shift).numpy())
    return found


def band() -> Look:
    images = np.full((12, 8, 8, 1), 0.5, np.float32)
    return look(Band().eval(), data=(images, np.zeros(12, np.int64)))


def audited(broken: int) -> Look:
    """Express, and a suite that attacks 12 of its survivors."""
    return look(net(), [stage("express"), replace(BLIND, only=tuple(range(12)))], [2, broken])


def right_again() -> Look:
    """Images that were kept and that the model classifies right."""
    found = look(net())
    x = found.job.samples.fetch(torch.from_numpy(found.correct)).x
    found.images = Images(found.correct, x.numpy())
    return found


CASES: dict[str, tuple[list[Callable[[], Look]], list[Callable[[], Look]]]] = {
    "weak_attack": ([lambda: replace_complete(look(net()))], [lambda: look(net())]),
    "stronger_search": (
        [lambda: replace_complete(look(net(), n=12))],
        [lambda: replace_complete(look(net(), n=12, eps=0.01))],
    ),
    "probabilities": (
        [lambda: look(liar("Softmax")), lambda: look(liar("Sigmoid"))],
        [lambda: look(net())],
    ),
    "stochastic_mismatch": (
        [
            lambda: look(liar("Noise")),
            lambda: look(liar("NoiseOffGrid")),
            lambda: look(net(), traits=NOISY),
        ],
        [lambda: look(net()), lambda: look(liar("Noise"), traits=NOISY)],
    ),
    "tiny_change": (
        [lambda: look(Keyed())],
        [lambda: look(net()), lambda: look(liar("KWTA")), lambda: look(liar("Sine"))],
    ),
    "batch_mismatch": ([lambda: look(liar("Crowd"))], [lambda: look(net())]),
    "zero_gradient": (
        [lambda: look(liar("Quantised")), lambda: look(liar("Detached"))],
        [lambda: look(net()), lambda: look(liar("Loud"))],
    ),
    "gradient_mismatch": (
        [
            lambda: look(liar("Negated")),
            lambda: look(liar("RandomGradient")),
            lambda: look(Blurred()),
        ],
        [lambda: look(net()), lambda: look(liar("Loud"))],
    ),
    "unbounded": ([lambda: look(liar("Detached"))], [lambda: look(net())]),
    "one_step": ([lambda: look(net())], [lambda: look(net(), eps=0.01)]),
    "noise": ([lambda: look(net(), eps=0.5)], [lambda: look(net(), eps=0.01)]),
    "logit_scale": ([lambda: look(Scaled().eval())], [lambda: look(net())]),
    "monotone": ([band], [lambda: look(net(), n=20)]),
    "loss_gap": ([lambda: look(Scaled().eval())], [lambda: look(net(), n=20)]),
    "black_box": (
        [
            lambda: look(net(), [stage("apgd-ce"), BLIND], [5, 12]),
            lambda: look(
                net(),
                [stage("apgd-ce"), stage("apgd@other", victim="other")],
                [5, 12],
                surrogates=surrogate(transfer=True),
            ),
        ],
        [lambda: look(net(), [stage("apgd-ce"), BLIND], [5, 1])],
    ),
    "audit": (
        [lambda: audited(4), lambda: audited(2)],
        [lambda: audited(1)],
    ),
    "surrogate_gap": (
        [
            lambda: look(
                net(),
                [stage("apgd-ce"), stage("apgd@other", victim="other")],
                [5, 12],
                surrogates=surrogate(),
            )
        ],
        [
            lambda: look(
                net(),
                [stage("apgd-ce"), stage("apgd@other", victim="other")],
                [5, 0],
                surrogates=surrogate(),
            )
        ],
    ),
    "unconverged": (
        [lambda: look(net(), broken=[20], late=8)],
        [lambda: look(net(), broken=[20])],
    ),
    "eot_plateau": (
        [lambda: look(net(), EOT, [5, 8], traits=NOISY)],
        [lambda: look(net(), EOT, [5, 0], traits=NOISY)],
    ),
    "planted": (
        [
            lambda: look(liar("Negated"), n=5),
            lambda: look(liar("Detached"), n=5),
            lambda: look(liar("HardLabels"), n=5, eps=0.02),
        ],
        [lambda: look(net(), n=5)],
    ),
    "silent_success": (
        [lambda: look(net()), lambda: look(Keyed())],
        [lambda: look(net(), eps=0.01)],
    ),
    "norm": ([lambda: kept(0.3), right_again], [lambda: kept(0.0)]),
}
"""For each indicator: where it triggers, and where it does not."""


def replace_complete(found: Look) -> Look:
    return replace(found, complete=False)


BY_ID = {indicator.id: indicator for indicator in INDICATORS}


@pytest.mark.parametrize("name", sorted(CASES))
def test_it_triggers_and_is_quiet(name: str) -> None:
    loud, quiet = CASES[name]
    assert loud and quiet
    for expected, cases in ((True, loud), (False, quiet)):
        for number, case in enumerate(cases):
            entry = BY_ID[name].entry(case())
            assert entry is not None
            assert entry["triggered"] is expected, (number, entry)
            assert len(entry["why"]) > 20


def test_every_indicator_is_tried() -> None:
    assert set(CASES) == set(BY_ID) and len(INDICATORS) == len(BY_ID) >= 21


@pytest.mark.parametrize("indicator", INDICATORS, ids=lambda i: i.id)
def test_it_says_what_it_is(indicator: Any) -> None:
    assert indicator.about.endswith(".") and indicator.source and indicator.settles


def test_an_audit_is_a_proof_where_the_number_falls_by_more_than_its_interval() -> None:
    few, many = (BY_ID["audit"].entry(audited(broken)) for broken in (2, 8))
    assert few and many and (few["class"], many["class"]) == ("evidence", "proof")
    assert BY_ID["audit"].entry(look(net(), [stage("express"), BLIND], [2, 8])) is None
    assert "the audit broke 8 of " in many["why"] and "count as robust" in many["why"]


def test_the_last_quarter_of_a_single_step_says_nothing() -> None:
    single = stage("fgsm", PGD(steps=1))
    assert BY_ID["unconverged"].entry(look(net(), [single], [5], late=5)) is None


def test_a_free_one_makes_no_passes_and_a_cheap_one_counts_them() -> None:
    found = look(net(), [stage("apgd-ce"), BLIND], [2, 1], n=4)
    entries = [indicator.entry(found) for indicator in INDICATORS]
    for indicator, entry in zip(INDICATORS, entries, strict=True):
        if entry is not None:
            passes = entry.get("forwards", 0) + entry.get("backwards", 0)
            assert (passes == 0) == (indicator.cost == "free"), indicator.id


def test_the_same_look_gives_the_same_entry() -> None:
    """Whatever the order of the images in memory and of the indicators."""
    first = [BY_ID[name].entry(look(net(), n=3)) for name in ("noise", "zero_gradient", "loss_gap")]
    again = [BY_ID[name].entry(look(net(), n=3)) for name in ("loss_gap", "zero_gradient", "noise")]
    assert first == again[::-1]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms(norm: str) -> None:
    eps = {"l2": 0.02, "l1": 0.1}[norm]
    for indicator in INDICATORS:
        entry = indicator.entry(look(net(), norm=norm, eps=eps, n=2))
        assert entry is None or not entry["triggered"], entry


@pytest.mark.parametrize(
    "traits", [Traits(batch_dependent=True, batch_size=16), Traits(gradient="none")]
)
def test_what_a_model_has_not_is_not_looked_at(traits: Traits) -> None:
    found = look(net(), [BLIND], traits=traits)
    for name in ("zero_gradient", "unbounded", "one_step", "silent_success", "gradient_mismatch"):
        assert BY_ID[name].entry(found) is None
    assert not found.backwards


def test_no_survivor_is_no_reason_to_stop() -> None:
    found = look(net(), broken=[3], n=3)
    for indicator in INDICATORS:
        entry = indicator.entry(found)
        assert entry is None or not entry["triggered"], entry


def test_one_odd_sample_of_sixty_convicts_nobody() -> None:
    assert not of_share(1, 60, 0.01, "").triggered
    assert of_share(9, 60, 0.01, "", proof=0.05).weight is None  # proof, as declared
    assert of_share(4, 60, 0.01, "", proof=0.05).weight == "evidence"
    assert not of_share(0, 0, 0.01, "").triggered


def test_the_interval_of_a_median_is_exact() -> None:
    ordered = torch.arange(20) / 20
    assert median_interval(ordered) == (float(ordered[5]), float(ordered[14]))  # tables: 6 and 15
    assert median_interval(ordered[:4]) == (-1.0, 1.0)


def test_a_probability_that_is_declared_is_followed_by_its_logarithm() -> None:
    declared = look(liar("Softmax"), traits=Traits(output="probabilities"), n=16)
    assert BY_ID["probabilities"].entry(declared) is None
    dead, honest = BY_ID["zero_gradient"].entry(declared), BY_ID["unbounded"].entry(declared)
    assert dead is not None and honest is not None
    assert not dead["triggered"] and not honest["triggered"]


def test_what_other_attacks_broke_too_does_not_concern_the_number() -> None:
    stages = [stage("apgd-ce"), BLIND]
    alone, both = (look(net(), stages, [0, fallen], n=12, eps=0.5) for fallen in (0, 12))
    entries = [BY_ID["noise"].entry(found) for found in (alone, both)]
    assert [entry and entry["triggered"] for entry in entries] == [True, True]
    assert [entry and entry["question"] for entry in entries] == ["number", "gradient"]
    assert [entry and entry["class"] for entry in entries] == ["proof", "evidence"]


def test_images_that_count_as_robust_and_break_prove_it_where_the_number_falls_far() -> None:
    found = look(net())
    clean = found.sample(found.survivors())
    for hits, expected in ((3, "evidence"), (12, None)):
        reading = after_all(found, clean, torch.arange(len(clean.y)) < hits, "noise")
        assert reading.triggered and reading.weight == expected
        assert f"{hits} of them count as robust" in reading.why


def test_a_single_attack_that_misses_what_was_planted_is_weak_and_the_model_is_not_accused() -> (
    None
):
    found = look(liar("Negated"), n=5)
    suite, single = (BY_ID["planted"].entry(one) for one in (found, replace_complete(found)))
    assert suite is not None and single is not None and suite["triggered"] and single["triggered"]
    assert (suite["class"], suite["question"]) == ("proof", "gradient")
    assert (single["class"], single["question"]) == ("thin", "number")


@pytest.mark.parametrize(
    ("gradient", "stages", "weight"),
    [
        ("exact", [stage("pgd")], "thin"),
        ("none", [stage("pgd")], "thin"),
        ("straight_through", [stage("pgd")], "evidence"),
        ("discontinuous", [stage("pgd"), stage("apgd")], "evidence"),
        ("discontinuous", [stage("pgd"), stage("pgd@other", victim="other")], "thin"),
        ("straight_through", [stage("pgd"), BLIND], "thin"),
    ],
)
def test_a_gradient_that_is_declared_to_mislead_is_not_followed_alone(
    gradient: Any, stages: list[Stage], weight: str
) -> None:
    found = look(net(), stages, n=4, traits=Traits(gradient=gradient), surrogates=surrogate())
    entry = BY_ID["weak_attack"].entry(replace_complete(found))
    assert entry is not None and entry["triggered"] and entry["class"] == weight


def test_a_search_that_ends_elsewhere_is_a_mistake_only_if_the_logits_are_steady() -> None:
    steady, moved = (BY_ID["silent_success"].entry(look(one)) for one in (net(), Keyed()))
    assert steady is not None and moved is not None
    assert steady["class"] == "proof" and "our records are wrong" in steady["why"]
    assert "advbench" in steady.get("settles", "")
    assert moved["class"] == "evidence" and "The record counts" in moved["why"]
    assert "% of their spread with a change of 0.0001 in each pixel" in moved["why"]
    cure = moved.get("settles", "")
    assert "traits.stochastic=true" in cure and "advbench" not in cure


def test_fab_is_not_repeated() -> None:
    assert AutoAttackProtocol().effort == "cheap"
    assert AutoAttackProtocol(attacks=["apgd-ce"]).effort == "free"
    assert BY_ID["silent_success"].entry(look(net(), [stage("fab-t", FAB())])) is None


def test_the_docs_show_every_indicator() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verdict.md").read_text()
    assert table() in text and table().count("\n") == len(INDICATORS) + 1
