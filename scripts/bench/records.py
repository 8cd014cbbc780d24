#!/usr/bin/env python
"""Hashes of what the engine records: the same before and after a change, or it changed a bit.

    python scripts/bench/records.py > before.json      # at one commit
    python scripts/bench/records.py > after.json       # at another, on the same machine
    diff before.json after.json

A small net of the digits, trained here; each attack alone in each norm, two batch sizes, and
untargeted FAB, restarts and EOT of a stochastic net. Less than two minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import advbench
from advbench import config
from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.fab import FAB
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.defenses.base import Traits
from advbench.evaluation.protocol import Protocol, Stage, Subject

RADII = {"linf": 0.12, "l2": 0.6, "l1": 1.5}


@dataclass(frozen=True)
class Alone(Protocol):
    """One attack."""

    name = "alone"
    attack: Attack
    eot_samples: int = 1

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("alone", self.attack, "a check", eot_samples=self.eot_samples)]


class Noisy(nn.Module):
    """A model with noise on its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.02 * torch.randn_like(x))


def attacks(norm: str) -> dict[str, Attack]:
    """By name, with few steps."""
    l1 = norm == "l1"
    return {
        "apgd-ce": APGD(steps=40, loss_name="ce", large_radius=l1, restarts=2),
        "apgd-t": APGD(steps=20, loss_name="dlr_targeted", targets=4, large_radius=l1),
        "fab-t": FAB(steps=15, targets=3, restarts=2),
        "fab": FAB(steps=8, targeted=False),
        "square": Square(steps=400),
    }


def trained() -> nn.Module:
    """A net of the digits after a few steps, so that some samples break and some do not."""
    torch.manual_seed(0)
    node = config.shipped("backbone", "convnet")
    node.update({"num_classes": 10, "input_shape": [1, 8, 8], "mean": [0.3], "std": [0.4]})
    model = config.build(node, "backbone").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = digits("train")
    for step in range(150):
        at = torch.arange(step * 64, step * 64 + 64) % len(x)
        loss = nn.functional.cross_entropy(model(x[at] + 0.1 * torch.randn_like(x[at])), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    data = getattr(config.build(config.shipped("data", "digits"), "data"), split)
    clean = data.fetch(torch.arange(len(data)), torch.device("cpu"))
    return clean[0], clean[1]


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    model, (x, y) = trained(), digits("test")
    x, y = x[:100], y[:100]
    cases = [
        (f"{norm} {name} {batch}", model, norm, Alone(attack), batch, Traits())
        for norm in RADII
        for name, attack in attacks(norm).items()
        for batch in (64, 24)
    ]
    noisy, eot = Noisy(model).eval(), Alone(APGD(steps=10, loss_name="ce"), eot_samples=3)
    cases.append(("linf eot 32", noisy, "linf", eot, 32, Traits(stochastic=True)))
    hashes = {}
    for name, victim, norm, protocol, batch, traits in cases:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            results = advbench.evaluate(
                victim, x, y, threat=Threat(norm, RADII[norm]), protocol=protocol,
                batch_size=batch, traits=traits, adversarial=True, folder=folder,
            )  # fmt: skip
            parts = ("samples.parquet", "adversarial.safetensors")
            found = [(Path(folder) / part).read_bytes() for part in parts]
        digest = hashlib.sha256(b"".join(found)).hexdigest()[:16]
        hashes[name] = [round(results.robust.acc * len(y)), digest]
    print(json.dumps(hashes, indent=1))


if __name__ == "__main__":
    main()
