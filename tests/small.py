"""A small data set, a small net and a short training, which the tests of training share."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Source, Split, Splits
from advbench.defenses.base import Defense, Step
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.base import Recipe
from advbench.recipes.pgd_at import PGDAT
from advbench.surgery import Kind
from advbench.training.optimizers import SGD, Optimizer
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer

THREAT = Threat("linf", 0.1)
STEPS = 6  # per epoch, at batch size 16


class Stripes(Source):
    """Three classes of noisy 4x4 images; the test part must not be opened."""

    name = "stripes"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 4, 4

    @property
    def classes(self) -> tuple[str, ...]:
        return "top", "left", "even"

    def open(self, part: str) -> Split:
        assert part == "train", "training opened the test split"
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(126) % 3
        patterns = torch.zeros(3, 4, 4)
        patterns[0, :2], patterns[1, :, :2], patterns[2] = 1, 1, 0.5
        x = 0.6 * patterns[y] + 0.4 * torch.rand(126, 4, 4, generator=generator)
        return ArraySplit(x[:, None], y)


def splits(augment: Augment | None = None) -> Splits:
    """102 images to train on, 24 to validate."""
    augment = Augment(crop=1, flip=True) if augment is None else augment
    return Splits(Stripes(), val=24, split_seed=0, mean=[0.5], std=[0.3], augment=augment)


def net(*, plain: bool = False) -> Classifier:
    """A small net with batch norm and dropout, or without both."""
    torch.manual_seed(1)
    inside = [] if plain else [nn.BatchNorm2d(4), nn.Dropout(0.2)]
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), *inside, nn.ReLU(), nn.Flatten())
    return Classifier(
        trunk, num_features=16, num_classes=3, input_shape=(1, 4, 4), mean=[0.5], std=[0.3]
    )


def fit(
    folder: Path,
    trainer: Trainer | None = None,
    *,
    model: Classifier | None = None,
    recipe: Recipe | None = None,
    defense: Defense | None = None,
    optimizer: Optimizer | None = None,
    threat: Threat | None = THREAT,
    seed: int = 0,
    identity: Mapping[str, object] | None = None,
    data: Splits | None = None,
    **report,
) -> Summary:
    folder.mkdir(exist_ok=True)
    return (trainer or Trainer(epochs=3, batch_size=16, val_steps=2)).fit(
        net() if model is None else model,
        splits() if data is None else data,
        PGDAT(threat=THREAT, steps=2) if recipe is None else recipe,
        Defense() if defense is None else defense,
        SGD() if optimizer is None else optimizer,
        threat=threat,
        seed=seed,
        folder=folder,
        identity=identity or {"run": "a"},
        **report,
    )


def table(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the column that differs between equal runs."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    return rows


def position(folder: Path) -> tuple[int, int]:
    """Finished epochs, and finished steps of the next, from which a run would go on."""
    found = []
    for name in ("epoch.pt", "resume.pt"):
        if (folder / name).exists():
            kept = torch.load(folder / name, weights_only=True)["state"]["position"]
            found.append((kept["epoch"], kept["batch"]))
    return max(found, default=(-1, 0))


def count_modules(model: nn.Module, kind: Kind) -> int:
    """How many different modules of ``kind`` are inside the model."""
    return sum(isinstance(module, kind) for name, module in model.named_modules() if name)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    model = net()
    load_weights(model, path)
    return model.state_dict()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    values = other.state_dict()
    assert values.keys() == one.state_dict().keys()
    assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


def assert_same_result(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert table(one) == table(other)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for summary in summaries:
        assert summary.pop("seconds") > 0
        assert summary.pop("checksum") and summary.pop("files")  # metrics.csv has seconds too
    assert summaries[0] == summaries[1]


@dataclass(frozen=True)
class Planted(Defense):
    """A loss term of its own, not a number from one step on; raises after another."""

    name: str = "planted"
    bad_from: int = 10**9
    stop_at: int = -1
    prepared: list[bool] = field(default_factory=list)

    def prepare(self, model: Classifier, data: Splits) -> None:
        self.prepared.append(model.training)

    def loss_terms(self, model: Classifier, step: Step) -> dict[str, Tensor]:
        value = math.inf if step.step >= self.bad_from else 2.0 + step.step
        return {self.name: next(iter(step.parts.values())).logits.sum() * 0 + value}

    def after_step(self, model: Classifier, step: Step) -> None:
        assert not any(part.features.requires_grad for part in step.parts.values())
        if step.step == self.stop_at:
            raise KeyboardInterrupt
