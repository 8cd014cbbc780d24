"""The table of backbones, defenses and recipes that feeds the generic tests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from advbench.attacks.threat import Threat
from advbench.backbones.base import Backbone, Classifier
from advbench.backbones.convnet import convnet
from advbench.backbones.lenet import lenet
from advbench.backbones.mobilenet import STAGES, mobilenet_v2
from advbench.backbones.preact_resnet import preact_resnet18
from advbench.backbones.resnet import resnet20
from advbench.data.arrays import array_split
from advbench.data.base import Info
from advbench.defenses.awnet import AWNet
from advbench.defenses.base import Defense
from advbench.defenses.chain import Chain
from advbench.defenses.hpm import HPM
from advbench.defenses.jumprelu import JumpReLU
from advbench.defenses.mfdv_snn import MFDVSNN
from advbench.defenses.sparta import Sparta
from advbench.recipes.awp import AWP
from advbench.recipes.base import Recipe
from advbench.recipes.fgsm_rs import FGSMRS
from advbench.recipes.mart import MART
from advbench.recipes.mixed import Mixed
from advbench.recipes.mtard import MTARD
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES

CLASSES, SHAPE, BATCH = 5, [3, 16, 16], 12
THREAT = Threat("linf", "8/255")


class thin(preact_resnet18):
    stem, widths = 8, (8, 16, 32, 64)


class slim(mobilenet_v2):
    stem, last = 8, 64
    stages = tuple((t, max(c // 8, 4), n, s) for t, c, n, s in STAGES)


BACKBONES: dict[str, type[Backbone]] = {
    "convnet": convnet,
    "lenet": lenet,
    "resnet20": resnet20,
    "preact_resnet18": thin,
    "mobilenet_v2": slim,
}
DEFENSES: dict[str, Defense] = {
    "none": Defense(),
    "hpm": HPM(eval_batch=BATCH),
    "hpm-context": HPM(eval_batch=BATCH, inference="context"),
    "hpm-static": HPM(eval_batch=BATCH, mix=1.0),
    "awnet": AWNet(),
    "awnet-hard": AWNet(switch="hard"),
    "sparta": Sparta(),
    "sparta-relu": Sparta(form="relu"),
    "jumprelu": JumpReLU(jump=0.01),
    "mfdv_snn": MFDVSNN(features=8),
    "chain": Chain(members=(Sparta(share="net"), HPM(eval_batch=BATCH))),
}
REFUSED = {("awnet", "lenet"), ("awnet-hard", "lenet")}
PAIRS = [pair for pair in itertools.product(DEFENSES, BACKBONES) if pair not in REFUSED]


def backbone(name: str) -> Classifier:
    torch.manual_seed(0)
    return BACKBONES[name](num_classes=CLASSES, input_shape=SHAPE).build()


SMALL: dict[str, Recipe] = {
    "fgsm_rs": FGSMRS(THREAT),
    "mart": MART(THREAT, steps=1),
    "mixed": Mixed(THREAT),
    "awp": AWP(of=PGDAT(THREAT, steps=1)),
}


def recipes() -> dict[str, Recipe]:
    teacher = convnet(num_classes=CLASSES, input_shape=SHAPE).build().eval()
    return {
        "standard": Standard(THREAT),
        "pgd_at": PGDAT(THREAT, steps=1),
        "trades": TRADES(THREAT, steps=1),
        "mtard": MTARD(THREAT, steps=1, robust_teacher=teacher, standard_teacher=teacher),
        **SMALL,
    }


RECIPES = list(recipes())


def chosen(defense: str, net: str) -> list[str]:
    """Recipes to try on a pair: all on one backbone, on the others one in turn."""
    if net == "convnet":
        return RECIPES
    turn = [pair for pair in PAIRS if pair[1] == net].index((defense, net))
    return [RECIPES[turn % len(RECIPES)]]


class Made:
    """A small data set: the redder an image, the higher its class."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        x = random.integers(0, 256, (60, *SHAPE[1:], SHAPE[0]), np.uint8)
        y = np.arange(60) % CLASSES
        x[..., 0] = np.minimum(x[..., 0], 50 * y[:, None, None] + 20)
        self.train = self.val = self.test = array_split(x, y, "x", "y")
        self.info = Info("made", CLASSES, (3, 16, 16), (0.5,), (0.25,), tuple("abcde"))


DATA: Any = Made()
