"""A small net, its images and an evaluation of it, which the tests of searches share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.fab import FAB
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.data.base import ArraySplit
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.samples import Samples
from advbench.progress import NullProgress

SHAPE = (1, 6, 6)
EPS = 0.06


class Net(nn.Module):
    """Convolutions, batch norm, two kinds of layers whose kernels depend on the batch's size."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 32),
            nn.ReLU(),
            nn.Linear(32, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def net(classes: int = 5) -> nn.Module:
    torch.manual_seed(3)
    model = Net(classes).eval()
    batch_norm = model.body[1]
    assert isinstance(batch_norm, nn.BatchNorm2d)
    nn.init.uniform_(batch_norm.running_var, 0.5, 2)  # pyright: ignore
    nn.init.normal_(batch_norm.running_mean, std=0.1)  # pyright: ignore
    return model


def samples(model: nn.Module, n: int = 40) -> Samples:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return Samples(ArraySplit(x, y), torch.arange(n), torch.device("cpu"))


@dataclass(frozen=True)
class Mixed(Protocol):
    """One stage of each kind of attack, short enough for a test."""

    name = "mixed"

    def stages(self, subject: Subject) -> list[Stage]:
        attacks: dict[str, Attack] = {
            "apgd": APGD(steps=12, loss_name="ce"),
            "apgd-t": APGD(steps=8, loss_name="dlr_targeted", targets=3),
            "fab-t": FAB(steps=6, targets=2),
            "square": Square(steps=90),
        }
        return [Stage(name, attack, "a test") for name, attack in attacks.items()]


def evaluation(protocol: Protocol | None = None, batch_size: int = 16, n: int = 40) -> Evaluation:
    model = net()
    threat = Threat("linf", EPS)
    case = samples(model, n)
    return Evaluation(
        "net", "made", protocol or Mixed(), Job(model, case, threat, batch_size=batch_size)
    )


def changed(case: Evaluation, **changes: Any) -> Evaluation:
    """The same evaluation but for some fields, its own or those of its job."""
    own = {name: changes.pop(name) for name in list(changes) if name in vars(case)}
    return replace(case, **{"job": replace(case.job, **changes), **own})


def files(folder: Path) -> bytes:
    return (folder / "samples.parquet").read_bytes()


# --- the same bytes -----------------------------------------------------------------------------


class Cut(Exception):
    pass


def impatient(after: int) -> Callable[[], bool]:
    """A clock that stops an evaluation, as a kill would, after so many looks."""
    looks = itertools.count()

    def deadline() -> bool:
        if next(looks) >= after:
            raise Cut
        return False

    return deadline


def cut_engine(case: Evaluation, after: int) -> Engine:
    return Engine(replace(case.job, deadline=impatient(after)))


class Notes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Every(Mixed):
    """And untargeted FAB, whose answers are many gradients."""

    def stages(self, subject: Subject) -> list[Stage]:
        return [*super().stages(subject), Stage("fab", FAB(steps=3, targeted=False), "a test")]


def records(case: Evaluation, folder: Path) -> tuple[bytes, list[str]]:
    """With what was noted, such as the batch sizes that can't be used."""
    notes = Notes()
    assert not case.execute(folder, case.plan(), notes).missing
    return files(folder), notes.notes


@dataclass(frozen=True)
class Parts(Protocol):
    """Some of the stages of ``Mixed``."""

    name = "parts"
    wanted: tuple[str, ...] = ()

    def stages(self, subject: Subject) -> list[Stage]:
        stages = Mixed().stages(subject)
        return [stage for stage in stages if stage.name in self.wanted]
