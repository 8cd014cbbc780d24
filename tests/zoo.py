"""Liars and honest models on embedded data, with what is true of each: what tests the verdict.

A net is trained from a seed through advbench's own recipes, once per ``Zoo``, which keeps it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.backbones.convnet import convnet
from advbench.backbones.lenet import lenet
from advbench.data.arrays import array_split
from advbench.data.base import Source, Split, Splits
from advbench.data.sources import DigitsSource, digits
from advbench.defenses.base import Defense, Traits
from advbench.defenses.hpm import HPM
from advbench.defenses.mfdv_snn import MFDVSNN
from advbench.defenses.sparta import Sparta
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.base import Recipe
from advbench.recipes.fgsm_rs import FGSMRS
from advbench.recipes.mart import MART
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES
from advbench.training.optimizers import SGD
from advbench.training.trainer import Trainer

Kind = Literal["too_high", "hides_but_right", "honest"]
Place = Callable[[str, Callable[[], None]], Path]

THREAT = Threat("linf", 0.15)


def _docs_liars() -> Any:
    path = Path(__file__).parent.parent / "docs" / "liars.py"
    spec = importlib.util.spec_from_file_location("docs_liars", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LIARS = _docs_liars()


# --- data ----------------------------------------------------------------------------------------


class Fewer(Source):
    """The digits below ``classes``."""

    def __init__(self, classes: int) -> None:
        self.name = f"digits-{classes}"
        self.count = classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.count)))

    def open(self, part: Any) -> Split:
        split = DigitsSource().open(part)
        return split.subset((split.labels < self.count).nonzero().squeeze(1))


class Pairs(Source):
    """Two digits side by side: a hundred classes."""

    name = "digit-pairs"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 16

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"{number:02}" for number in range(100))

    def open(self, part: Any) -> Split:
        split = DigitsSource().open(part)
        x, y = split.fetch(torch.arange(len(split)), torch.device("cpu"))
        left, right = np.random.default_rng(0).integers(0, len(y), (2, 6000 * len(y) // 1437))
        images = torch.cat([x[left], x[right]], 3).movedim(1, -1).numpy()
        return array_split(images, (10 * y[left] + y[right]).numpy(), "x", "y")


@cache
def data(classes: int = 10) -> Splits:
    """The splits with so many classes: 2 to 10, or 100."""
    if classes == 10:
        return digits().build()
    source = Pairs() if classes == 100 else Fewer(classes)
    return Splits(source, val=0.1, split_seed=0, mean=None, std=None, augment=digits().augment)


# --- nets ----------------------------------------------------------------------------------------


class convnet_without_norm(convnet):
    """No batch normalisation."""

    def body(self, act: type[nn.Module]) -> tuple[dict[str, nn.Module], int]:
        body, channels = super().body(act)
        return {name: m for name, m in body.items() if not name.startswith("norm")}, channels


class doubled_lenet(lenet):
    """Takes images of half the size, each pixel of which it sees four times."""

    def build(self) -> Classifier:
        channels, height, width = self.input_shape
        inner = lenet(
            num_classes=self.num_classes,
            input_shape=[channels, 2 * height, 2 * width],
            mean=self.mean,
            std=self.std,
        ).build()
        inner.trunk = nn.Sequential(nn.Upsample(scale_factor=2), inner.trunk)
        inner.input_shape = (channels, height, width)
        return inner


@dataclass(frozen=True)
class Net:
    """How a net is made."""

    recipe: Callable[..., Recipe] = Standard
    """Is given the threat."""
    defense: Defense = field(default_factory=Defense)
    backbone: type[Any] = convnet
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 10
    epochs: int = 5
    lr: float = 0.1

    def build(self, seed: int) -> Classifier:
        """The defended net with the fresh weights of a seed."""
        torch.manual_seed(seed)
        info = data(self.classes).info
        backbone = self.backbone(
            num_classes=info.num_classes,
            input_shape=list(info.input_shape),
            mean=list(info.mean),
            std=list(info.std),
            **self.settings,
        )
        return self.defense.apply(backbone.build())


ROBUST = partial(PGDAT, steps=3)
NETS: dict[str, Net] = {
    "standard": Net(),
    "pgd_at": Net(ROBUST, epochs=12),
    "trades": Net(partial(TRADES, steps=3), epochs=12),
    "mart": Net(partial(MART, steps=3), epochs=12),
    "fgsm_rs": Net(FGSMRS, epochs=12),
    "silu": Net(ROBUST, settings={"activation": "silu"}, epochs=12),
    "sparta": Net(ROBUST, Sparta(), epochs=12),
    "no_norm": Net(ROBUST, backbone=convnet_without_norm, epochs=15, lr=0.02),
    "lenet": Net(ROBUST, backbone=doubled_lenet, epochs=15, lr=0.02),
    "two_classes": Net(ROBUST, classes=2, epochs=12),
    "three_classes": Net(ROBUST, classes=3, epochs=12),
    "hundred_classes": Net(ROBUST, classes=100, epochs=8),
    "mfdv_snn": Net(defense=MFDVSNN(features=32), epochs=8),
    "hpm": Net(defense=HPM(eval_batch=50)),
}


@dataclass
class Zoo:
    """Nets that are trained on first use.

    Args:
        place: makes a directory of a name once, as the fixture ``once`` does.
        epochs: at most so many; None is as many as the net needs.
    """

    place: Place
    epochs: int | None = None

    def net(self, name: str, seed: int) -> Classifier:
        """A net of ``NETS`` in evaluation mode, on the CPU."""
        how = NETS[name]
        epochs = how.epochs if self.epochs is None else min(self.epochs, how.epochs)
        model = how.build(seed)

        def train() -> None:
            Trainer(epochs=epochs, batch_size=64, val_steps=2).fit(
                model,
                data(how.classes),
                how.recipe(THREAT),
                how.defense,
                SGD(lr=how.lr),
                threat=THREAT,
                seed=seed,
                folder=Path(),
                identity={"net": name},
            )

        folder = self.place(f"net-{name}-{seed}-{epochs}", train)
        load_weights(model, folder / "model.safetensors")
        return model.eval()


# --- entries -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A model, and what is true of it."""

    name: str
    kind: Kind
    """``too_high``: a white box reports too much; ``hides_but_right``: it hides its gradient, or
    part of it, and the number is right all the same; ``honest``."""
    net: str = "standard"
    """Of ``NETS``: what it is made of. Its images break a liar."""
    disguise: Callable[[nn.Module], nn.Module] | None = None
    """What a liar makes of the net."""
    traits: Traits = field(default_factory=Traits)
    """What is declared of it."""
    refused: bool = False
    """No evaluation begins: the checks find it."""

    def build(self, zoo: Zoo, seed: int) -> nn.Module:
        """The model of a seed, in evaluation mode."""
        net = zoo.net(self.net, seed)
        return net if self.disguise is None else self.disguise(net).eval()

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels (N,) that it was not trained on."""
        split = data(NETS[self.net].classes).test
        return split.fetch(torch.arange(len(split)), torch.device("cpu"))


REFUSED = {"Softmax", "Noise", "NoiseOffGrid", "Crowd"}
RIGHT = {"Loud", "Detector", "KWTA", "Jump", "Sigmoid"}
ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *(
            Entry(
                name,
                "hides_but_right" if name in RIGHT else "too_high",
                disguise=trick,
                refused=name in REFUSED,
            )
            for name, trick in LIARS.TRICKS.items()
        ),
        Entry("mfdv_snn", "hides_but_right", net="mfdv_snn", traits=Traits(stochastic=True)),
        Entry("hpm", "too_high", net="hpm", refused=True),
        *(Entry(name, "honest", net=name) for name in NETS if name not in ("mfdv_snn", "hpm")),
    )
}
