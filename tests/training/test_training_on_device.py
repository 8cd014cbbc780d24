"""Trainings on a pretended device: nothing mixed, no step waits, the same bytes as on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from components import CLASSES, DEFENSES, RECIPES, SHAPE, THREAT, recipes
from pretend_cuda import HOME, Waits, on_device, pretending
from small import Planted, fit, position
from torch import Tensor

from advbench.backbones.convnet import convnet
from advbench.data.arrays import array_split
from advbench.data.augment import Augment
from advbench.data.base import Info, Source, Split, Splits
from advbench.defenses.base import Defense
from advbench.training.learner import Learner
from advbench.training.optimizers import AdamW
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer

NAMES = ("hpm", "awnet", "sparta", "jumprelu", "mfdv_snn")
TRAINER = Trainer(epochs=1, batch_size=12, val_steps=1, save_every=0)


class Red(Source):
    """24 images to train on and 12 to validate; the redder one is, the higher its class."""

    name = "red"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, 16, 16

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("abcde")

    def open(self, part: str) -> Split:
        x = np.random.default_rng(0).integers(0, 256, (36, 16, 16, 3), np.uint8)
        y = np.arange(36) % CLASSES
        x[..., 0] = np.minimum(x[..., 0], 50 * y[:, None, None] + 20)
        return array_split(x, y, "x", "y")


def data(augment: Augment | None = None, extra: bool = False) -> Splits:
    def more(info: Info) -> Split:
        return Red().open("train")

    return Splits(
        Red(), val=12, split_seed=0, mean=None, std=None, augment=augment or Augment(),
        extra=more if extra else None, extra_fraction=0.5,
    )  # fmt: skip


@contextmanager
def steps_counted(waits: Waits) -> Iterator[list[Waits]]:
    """The waits of each training step."""
    steps: list[Waits] = []
    real = Learner.step

    @functools.wraps(real)
    def step(learner: Learner, *args: Any) -> dict[str, Tensor]:
        assert all(map(on_device, learner.model.state_dict().values()))
        assert args[0].device == args[1].device == HOME
        before = Waits(waits)
        values = real(learner, *args)
        steps.append(Waits(waits - before))
        assert all(value.device == HOME for value in values.values())
        return values

    with mock.patch.object(Learner, "step", step):
        yield steps


def train(folder: Path, defense: Defense, recipe: str = "pgd_at", **changes: Any) -> Summary:
    """Train two batches."""
    torch.manual_seed(0)
    settings = {"trainer": TRAINER, "threat": THREAT, "data": data(), **changes}
    model = defense.apply(convnet(num_classes=CLASSES, input_shape=SHAPE).build())
    return fit(folder, model=model, recipe=recipes()[recipe], defense=defense, **settings)


def check(folder: Path, *args: Any, **changes: Any) -> None:
    """Train two batches on the pretended device, in steps that never wait."""
    with pretending() as waits, steps_counted(waits) as steps:
        summary = train(folder, *args, **changes)
    assert summary.device == "pretended" and summary.steps == len(steps) == 2
    first = int(args[-1:] == ("mtard",))  # whose first step fetches the teachers
    assert not any(steps[first:]), steps


@pytest.mark.parametrize(
    ("defense", "recipe"), [*((d, "pgd_at") for d in NAMES), *(("none", r) for r in RECIPES)]
)
def test_no_step_waits(defense: str, recipe: str, tmp_path: Path) -> None:
    check(tmp_path, DEFENSES[defense], recipe)


def test_no_step_of_a_chain_waits(tmp_path: Path, bfloat16: None) -> None:
    """With all that a trainer and data may add."""
    augment = Augment(crop=2, flip=True, cutout=3, cutmix=0.7)
    everything = replace(TRAINER, ema=0.9, clip_grad=0.5, precision="bf16-mixed")
    changes = {"data": data(augment, extra=True), "optimizer": AdamW(lr=0.01)}
    check(tmp_path, DEFENSES["chain"], "trades", trainer=everything, **changes)


def test_resumed_with_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    recipe, changes = "mart", {"data": data(Augment(crop=2, flip=True))}
    train(tmp_path / "cpu", Planted(), recipe, **changes)
    with pretending():
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "device", Planted(stop_at=1), recipe, **changes)
        assert position(tmp_path / "device") == (0, 1)
        train(tmp_path / "device", Planted(), recipe, **changes)
    for name in ("model.safetensors", "last.safetensors"):
        ours, theirs = ((tmp_path / place / name).read_bytes() for place in ("cpu", "device"))
        assert ours == theirs
