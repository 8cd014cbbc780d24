"""Checkpoints as people have them, of one small net, and what is to become of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from odd_models import plain
from torch import Tensor

State = dict[str, Tensor]


def state() -> State:
    """The weights of the plain net, not as it begins."""
    return {name: value + 0.01 for name, value in plain().state_dict().items()}


def prefixed(prefix: str) -> State:
    return {prefix + name: value for name, value in state().items()}


def other() -> State:
    return {"fc.weight": torch.zeros(2, 2)}


def optimizer() -> dict[str, Any]:
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)} for i in range(3)}
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}


def without(word: str) -> State:
    return {name: value for name, value in state().items() if word not in name}


LOADED: dict[str, tuple[Callable[[], Any], str]] = {
    "as it is": (state, ""),
    "module.": (lambda: prefixed("module."), "'module.' taken off"),
    "_orig_mod.": (lambda: prefixed("_orig_mod."), "'_orig_mod.' taken off"),
    "compiled in parallel": (lambda: prefixed("module._orig_mod."), "'module._orig_mod.' taken"),
    "any prefix": (lambda: prefixed("backbone.net."), "'backbone.net.' taken off"),
    "state_dict": (lambda: {"state_dict": state(), "epoch": 3}, "'state_dict'"),
    "net": (lambda: {"net": prefixed("module."), "acc": 91.2, "epoch": 7}, "from 'net', 'module.'"),
    "model_state_dict": (
        lambda: {"model_state_dict": state(), "optimizer_state_dict": optimizer(), "loss": 0.1},
        "'model_state_dict'",
    ),
    "lightning": (
        lambda: {
            "state_dict": prefixed("model.") | {"criterion.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.5.0",
            "global_step": 10,
            "optimizer_states": [optimizer()],
        },
        "'criterion.weight'",
    ),
    "swa": (lambda: prefixed("module.") | {"n_averaged": torch.tensor(5)}, "'n_averaged'"),
    "no counters": (lambda: without("num_batches_tracked"), "1 counters not in the file"),
    "extra state": (lambda: state() | {"1._extra_state": torch.zeros(1)}, "'1._extra_state'"),
    "profiled": (lambda: state() | {"total_ops": torch.zeros(1)}, "'total_ops'"),
    "half": (lambda: {name: value.half() for name, value in state().items()}, ""),
    "two nets": (lambda: prefixed("student.") | {"teacher.fc.weight": torch.ones(2)}, "'student.'"),
    "two levels": (lambda: {"ckpt": {"model": state()}, "args": {"lr": 0.1}}, "'ckpt.model'"),
}
"""What loads, and what is said of it."""

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two sets": (lambda: {"model": state(), "ema": state()}, "'model', 'ema'; choose one, such as"),
    "two nets that fit": (
        lambda: prefixed("online.") | prefixed("momentum."),
        "'online', 'momentum'; choose one",
    ),
    "a layer less": (lambda: without("4."), "2 missing: '4.weight', '4.bias'"),
    "a layer less inside": (lambda: {"net": without("4.weight")}, r"\(in 'net'\).*1 missing"),
    "a layer more": (lambda: state() | other(), "1 unknown: 'fc.weight'"),
    "another shape": (lambda: state() | {"4.bias": torch.zeros(7)}, r"'4.bias' is \(7,\)"),
    "no tensors": (lambda: {"epoch": 3}, "holds no state_dict"),
    "a list": (lambda: [1, 2], "holds no state_dict"),
}
"""What does not load, and what the line about it says."""
