"""What sets two models apart shows in their hash, and nothing else does."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from advbench.runs.fingerprint import model_sha256


@dataclass(frozen=True)
class How:
    levels: int


class Kind(Enum):
    ROUND = 1
    FLOOR = 2


VALUES: dict[str, Callable[[int], Any]] = {
    "dataclass": How,
    "namespace": lambda n: types.SimpleNamespace(levels=n),
    "partial": lambda n: functools.partial(torch.clamp, min=n),
    "enum": Kind,
    "set": lambda n: {"a", str(n)},
    "slice": lambda n: slice(0, n),
    "complex": lambda n: complex(0, n),
    "bytes": lambda n: bytes([n]),
    "dtype": lambda n: (torch.float32, torch.float64)[n - 1],
    "builtin": lambda n: (torch.relu, torch.tanh)[n - 1],
    "class": lambda n: (nn.ReLU, nn.Tanh)[n - 1],
    "numpy scalar": np.float32,
    "numpy objects": lambda n: np.array([How(n), None], dtype=object),
    "list of dicts": lambda n: [{"a": How(n)}],
    "module in a dict": lambda n: {"net": nn.Sequential(nn.Dropout(n / 10))},
    "tensor": lambda n: [torch.tensor(n)],
}


def model(value: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    net.how = value
    return net


@pytest.mark.parametrize("what", VALUES)
def test_values_of_every_kind_are_seen(what: str) -> None:
    assert len(VALUES) == 16
    make = VALUES[what]
    one, again, other = (model_sha256(model(make(n))) for n in (1, 1, 2))
    assert one == again != other


def test_hooks_are_seen() -> None:
    """That there are some; what they do shows in the logits."""
    found = set()
    for hooks in (0, 1, 2, 2):
        net = model(0)
        for _ in range(hooks):
            net.register_forward_hook(lambda module, args, out: out)
        found.add(model_sha256(net))
    assert len(found) == 3
    net = model(0)
    net.register_forward_pre_hook(lambda module, args: None)
    assert model_sha256(net) not in found


def test_what_holds_itself_has_a_hash() -> None:
    holder: list[Any] = [1]
    holder.append(holder)
    assert model_sha256(model(holder)) == model_sha256(model(holder)) != model_sha256(model([1]))


def test_another_process_says_the_same() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r}\n"
        "from test_fingerprint import VALUES, model, model_sha256\n"
        "print(*[model_sha256(model(make(1))) for make in VALUES.values()])"
    )
    ours = [model_sha256(model(make(1))) for make in VALUES.values()]
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ours
