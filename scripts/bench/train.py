#!/usr/bin/env python
"""A PGD-10 training step: ours, a plain loop around torchattacks' PGD, and the floor.

    python scripts/bench/train.py --models convnet resnet18 --out benchmarks/data/train.jsonl

The floor is what the passes of a step cost at the least: 10 times a forward pass with an input
gradient, and once a forward pass with all gradients, on the same model and batch, frozen where it
can be, in the better of two memory layouts. It is for the model as it is: ours may fall below it,
because its attack passes through a copy with folded batch norm. All three take turns within one
process; what is printed are medians, and the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchattacks
import torchvision
from lightning_fabric import Fabric
from shared import append, machine
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.attacks.threat import Threat
from advbench.backbones.base import Backbone
from advbench.backbones.convnet import convnet
from advbench.backbones.resnet import resnet18
from advbench.backbones.wide_resnet import wide_resnet
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Source, Split, Splits
from advbench.defenses.base import Defense
from advbench.recipes.base import frozen
from advbench.recipes.pgd_at import PGDAT
from advbench.training.learner import Learner
from advbench.training.optimizers import SGD
from advbench.training.settings import Settings

MODELS: dict[str, Callable[..., Backbone]] = {
    "convnet": convnet,
    "resnet18": resnet18,
    "wrn_28_10": partial(wide_resnet, depth=28, width=10),
}
SHAPE = {"num_classes": 10, "input_shape": [3, 32, 32], "mean": [0.5], "std": [0.25]}
STEPS, EPS, STEP = 10, 8 / 255, 2 / 255


class Noise(Source):
    """Random images: what a step costs does not depend on them."""

    name = "noise"

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, 32, 32

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def open(self, part: str) -> Split:
        return ArraySplit(torch.rand(self.count, *self.shape), torch.arange(self.count) % 10)


class Bench:
    """The three candidates on one kind of model.

    Each has a model and an optimizer of its own, so that all train.
    """

    def __init__(self, name: str, batch: int, device: str, bf16: bool, compile: str | None) -> None:
        self.device, self.bf16, self.name = device, bf16, name
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(batch, *SHAPE["input_shape"], generator=generator).to(device)
        self.y = (torch.arange(batch) % 10).to(device)

        settings = Settings(
            batch_size=batch, precision="bf16-mixed" if bf16 else "32-true", compile=compile
        )
        splits = Splits(
            Noise(2 * batch),
            val=batch,
            split_seed=0,
            mean=[0.5] * 3,
            std=[0.25] * 3,
            augment=Augment(),
        )
        fabric = Fabric(accelerator=device, devices=1)
        recipe = PGDAT(threat=Threat("linf", EPS), steps=STEPS, step_size=STEP)
        self.learner = Learner(
            settings, fabric, self.model(), splits, recipe, Defense(), SGD(), seed=0, fresh=True
        )
        for note in self.learner.notes:
            print(note)
        self.learner.forward.train()
        self.count = 0

        self.plain = self.model().to(device)
        self.optimizer = torch.optim.SGD(
            self.plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
        )
        self.attack = torchattacks.PGD(self.plain, eps=EPS, alpha=STEP, steps=STEPS)
        self.attack.set_device(device)

        self.bare = [
            self.model().to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
            for layout in (torch.channels_last, torch.contiguous_format)
        ]

    def model(self) -> Any:
        torch.manual_seed(0)
        return MODELS[self.name](**SHAPE).build()

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def ours(self) -> float:
        begin = self.now()
        self.learner.step(self.x, self.y, 0, self.count, 0.1)
        self.count += 1
        return self.now() - begin

    def torchattacks(self) -> float:
        begin = self.now()
        self.plain.eval()
        with self.cast():
            point = self.attack(self.x, self.y)
        self.plain.train()
        self.optimizer.zero_grad()
        with self.cast():
            loss = F.cross_entropy(self.plain(point), self.y)
        loss.backward()
        self.optimizer.step()
        return self.now() - begin

    def floor(self) -> float:
        return min(self._passes(model) for model in self.bare)

    def _passes(self, model: nn.Module) -> float:
        """Seconds of the passes of one step."""
        first = next(p for p in model.parameters() if p.dim() == 4)
        last = first.is_contiguous(memory_format=torch.channels_last) and first.shape[2] > 1
        layout = torch.channels_last if last else torch.contiguous_format
        x = self.x.contiguous(memory_format=layout)
        begin = self.now()
        with frozen(model):
            for _ in range(STEPS):
                point = x.detach().requires_grad_()
                self._backward(model, point, [point])
        model.train()
        self._backward(model, x, list(model.parameters()))
        return self.now() - begin

    def _backward(self, model: nn.Module, x: Tensor, wanted: list[Any]) -> None:
        with self.cast():
            loss = F.cross_entropy(model(x), self.y)
        torch.autograd.grad(loss, wanted)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(bench: Bench, turns: int, warm_up: int) -> dict[str, list[float]]:
    candidates: dict[str, Callable[[], float]] = {
        "ours": bench.ours,
        "torchattacks": bench.torchattacks,
        "floor": bench.floor,
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + turns):
        for name, run in candidates.items():
            spent = run()
            if turn >= warm_up:
                seconds[name].append(spent)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["convnet", "resnet18"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="autocast, for all three")
    parser.add_argument("--compile", help="trainer.compile of ours, such as default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append a line of JSON for each model")
    given = parser.parse_args()
    logging.disable()
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.benchmark = True

    print("| model | ours, s | torchattacks, s | floor, s | ours / floor | theirs / floor |")
    print("|---|---|---|---|---|---|")
    for name in given.models:
        bench = Bench(name, given.batch, given.device, given.bf16, given.compile)
        seconds = measure(bench, given.turns, given.warm_up)
        ratios = {
            tool: statistics.median(
                a / b for a, b in zip(seconds[tool], seconds["floor"], strict=True)
            )
            for tool in ("ours", "torchattacks")
        }
        medians = {tool: statistics.median(values) for tool, values in seconds.items()}
        print(
            f"| {name} | {medians['ours']:.3f} | {medians['torchattacks']:.3f} "
            f"| {medians['floor']:.3f} | {ratios['ours']:.2f} | {ratios['torchattacks']:.2f} |",
            flush=True,
        )
        if given.out is not None:
            record = {
                "date": time.strftime("%Y-%m-%d"), "model": name, "batch": given.batch,
                "shape": SHAPE["input_shape"], "steps": STEPS, "device": given.device,
                "bf16": given.bf16, "compile": given.compile, "threads": given.threads,
                "machine": machine(given.device), "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "folded": bench.learner.attack_model is not None,
                "ratios": ratios, "seconds": seconds,
            }  # fmt: skip
            append(given.out, record)


if __name__ == "__main__":
    main()
