#!/usr/bin/env python
"""ATen operations and waits per query of each attack, counted on a pretended device.

    PYTHONPATH=tests python scripts/gpu/count.py [ATTACK ...]

No GPU is needed: ``tests/pretend_cuda.py`` tags tensors of the CPU. An attack runs in the engine
twice, with few and with more steps, at a radius at which nothing breaks; the difference, over the
further queries, is what a query costs. Views and allocations launch nothing and do not count; an
operation may still launch more than one kernel (a sort, an index). What the model's own passes cost
is taken off, and counted for a ResNet-18 apart.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pretend_cuda import HOME, on_device, pretending
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.fab import FAB
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.backbones.resnet import resnet18
from advbench.data.base import ArraySplit
from advbench.evaluation.engine import Engine
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Stage
from advbench.evaluation.samples import Samples
from advbench.evaluation.store import Store

FREE = {
    "view", "_unsafe_view", "reshape", "expand", "slice", "select", "detach", "alias", "t",
    "transpose", "permute", "unsqueeze", "squeeze", "split", "unbind", "as_strided", "empty",
    "empty_like", "empty_strided", "new_empty", "lift_fresh", "_local_scalar_dense", "diagonal",
    "split_with_sizes", "unfold", "movedim", "_reshape_alias", "new_empty_strided", "resize_",
}  # fmt: skip
ATTACKS: dict[str, Attack] = {
    "APGD-CE": APGD(loss_name="ce"),
    "APGD-T": APGD(loss_name="dlr_targeted", targets=1),
    "FAB-T": FAB(targets=1),
    "Square": Square(),
    "Square, one pixel": Square(p_init=0.001),  # as its last windows, many of which change nothing
}
STEPS = {"APGD-CE": (20, 60), "APGD-T": (20, 60), "FAB-T": (6, 16), "Square": (40, 140),
         "Square, one pixel": (40, 140)}  # fmt: skip
SHAPE, ROWS = (3, 32, 32), 64


class Operations(TorchDispatchMode):
    """Counts what launches a kernel."""

    def __init__(self, pretended: bool = False) -> None:
        super().__init__()
        self.pretended = pretended  # whether what happens on the host does not count
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.__name__.partition(".")[0]
        tensors = [part for part in tree_leaves((args, result)) if isinstance(part, Tensor)]
        if name not in FREE and (not self.pretended or any(map(on_device, tensors))):
            self.names[name] += 1
        return result


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def passes(model: nn.Module, x: Tensor, gradient: bool) -> int:
    """Operations of a forward pass, or of one with the gradient in the input."""
    point = x.clone().requires_grad_(gradient)
    with Operations() as counted, torch.set_grad_enabled(gradient):
        total = model(point).sum()
        if gradient:
            torch.autograd.grad(total, point)
    return counted.names.total() - (3 if gradient else 1)  # the sum, its gradient and a one


def run(attack: Attack, norm: str) -> tuple[int, int, int]:
    """Operations and waits of an attack, and its queries."""
    with pretending() as waits, TemporaryDirectory() as folder:
        model = net().to(HOME)
        x = torch.rand(ROWS, *SHAPE, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = model(x.to(HOME)).argmax(1).cpu()
        samples = Samples(ArraySplit(x, y), torch.arange(ROWS), HOME)
        job = Job(model, samples, Threat(norm, 1e-6), batch_size=ROWS)
        with Operations(pretended=True) as counted:
            assert Engine(job).run([Stage("stage", attack, "")], Store(Path(folder)))
        return counted.names.total(), waits.total(), attack.queries


def per_query(name: str, norm: str) -> tuple[float, float]:
    few, many = (run(replace(ATTACKS[name], steps=n), norm) for n in STEPS[name])
    queries = many[2] - few[2]
    own = passes(net(), torch.rand(1, *SHAPE), ATTACKS[name].gradient)
    return (many[0] - few[0]) / queries - own, (many[1] - few[1]) / queries


def main() -> None:
    print("| attack | norm | operations per query | waits per query |\n|---|---|---|---|")
    for name in sys.argv[1:] or ATTACKS:
        for norm in ("linf", "l2", "l1"):
            operations, waits = per_query(name, norm)
            print(f"| {name} | {norm} | {operations:.1f} | {waits:.2f} |", flush=True)
    shape: dict[str, Any] = {"num_classes": 10, "input_shape": [3, 32, 32]}
    model = fuse(resnet18(**shape).build().eval()).requires_grad_(False)
    x = torch.rand(1, 3, 32, 32)
    print(f"ResNet-18, folded: {passes(model, x, False)} operations forward, "
          f"{passes(model, x, True)} with the gradient")  # fmt: skip


if __name__ == "__main__":
    main()
