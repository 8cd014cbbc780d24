"""Every attack in the engine on a pretended device: nothing mixed, and few waits per query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from made_up_searches import SHAPE, net
from pretend_cuda import HOME, Waits, on_device, pretending
from torch import nn

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.express import Express
from advbench.attacks.fab import FAB
from advbench.attacks.ifgsm import IFGSM
from advbench.attacks.pgd import PGD
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.data.base import ArraySplit
from advbench.defenses.base import Traits
from advbench.evaluation.engine import Engine
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.samples import Samples
from advbench.evaluation.search import Search
from advbench.evaluation.store import Store

N = 10
RADII = {"linf": 0.004, "l2": 0.015, "l1": 0.04}  # so small that most samples withstand


@dataclass
class Count:
    """Waits of the queries in which no sample was judged or left, and of all queries."""

    quiet: list[int]
    busy: list[int]
    waits: Waits


def attacked(attack: Attack, norm: str, tmp_path: Path, eot: int = 1) -> Count:
    """The engine with one stage, on the pretended device."""
    count, judged = Count([], [], Waits()), [0]

    def counting(real: Callable, also: list[int]) -> Callable:
        def stand_in(search: Search, *args: object, **kwargs: object) -> object:
            also[0] += 1
            return real(search, *args, **kwargs)

        return stand_in

    with pretending() as waits:
        model = net().to(HOME)
        assert all(map(on_device, model.parameters()))
        if eot > 1:
            model = Noisy(model).eval()
        x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = model(x.to(HOME)).argmax(1).cpu()
        samples = Samples(ArraySplit(x, y), torch.arange(N), HOME)
        traits = Traits(stochastic=eot > 1)
        job = Job(model, samples, Threat(norm, RADII[norm]), traits=traits, batch_size=8)
        stage = Stage("stage", attack, "a test", eot_samples=eot)
        real = Search._query

        def round_(search: Search) -> None:
            before, judged_before = waits.total(), judged[0]
            real(search)
            found = count.quiet if judged[0] == judged_before else count.busy
            found.append(waits.total() - before)
            if found is count.quiet:
                count.waits = waits

        with (
            mock.patch.object(Search, "_query", round_),
            mock.patch.object(Search, "_judge", counting(Search._judge, judged)),
            mock.patch.object(Search, "_release", counting(Search._release, judged)),
        ):
            assert Engine(job).run([stage], Store(tmp_path))
    assert len(count.quiet) > 2, "no query to count"
    return count


class Noisy(nn.Module):
    """A model with noise on its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x + 0.001 * torch.randn_like(x))


CASES: dict[str, tuple[Attack, int, int]] = {  # waits per query, and in l1
    "express": (Express(steps=4, targets=2), 1, 1),
    "pgd": (PGD(steps=8), 1, 1),
    "ifgsm": (IFGSM(steps=8), 1, 1),
    "apgd-ce": (APGD(steps=12, loss_name="ce"), 1, 1),
    "apgd-t": (APGD(steps=12, loss_name="dlr_targeted", targets=2), 1, 1),
    "apgd-phases": (APGD(steps=12, loss_name="ce", large_radius=True), 1, 1),
    "fab-t": (FAB(steps=6, targets=2), 2, 2),
    "fab": (FAB(steps=5, targeted=False), 2, 2),
    "square": (Square(steps=25), 2, 4),  # the l1 projection packs the pixels that differ
}


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("name", CASES)
def test_few_waits_per_query(name: str, norm: str, tmp_path: Path) -> None:
    attack, most, most_l1 = CASES[name]
    if name == "apgd-phases" and norm != "l1":
        attack = replace(attack, large_radius=False)
    count = attacked(attack, norm, tmp_path)
    most = most_l1 if norm == "l1" else most
    usual = sorted(count.quiet)[len(count.quiet) * 3 // 4]
    assert usual <= most, (usual, count.waits.most_common(8))


def test_eot(tmp_path: Path) -> None:
    count = attacked(APGD(steps=8, loss_name="ce"), "linf", tmp_path, eot=3)
    assert max(count.quiet) <= 1, count.waits.most_common(8)


def test_the_pretended_device_raises_and_counts() -> None:
    with pretending() as waits:
        x, index = torch.rand(4, device="cuda"), torch.arange(2)
        assert x.device == HOME and (x[1:] + 1).device == HOME and x.cpu().device.type == "cpu"
        for bad in (
            lambda: x + torch.rand(4),
            lambda: torch.cat([x, torch.rand(4)]),
            lambda: torch.rand(4)[index.to("cuda")],
            lambda: x.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError), match="pretended"):
                bad()
        for kind, action in {
            "scalar": lambda: bool(x.sum() > 0),
            "d2h": lambda: x.cpu(),
            "h2d": lambda: index.to("cuda"),
            "shape": lambda: x[x > 0.5],
            "equal": lambda: torch.equal(x, x.clone()),
        }.items():
            waits.clear()
            action()
            assert [found for found, _ in waits] == [kind]
        waits.clear()
        assert index.pin_memory().to("cuda", non_blocking=True).device == HOME and not waits
        y = x.clone().requires_grad_()
        assert torch.autograd.grad((y.relu() * x).sum(), y)[0].device == HOME
