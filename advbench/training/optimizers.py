"""Optimizers and their learning rate over time, as configurations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from advbench.errors import UserError, did_you_mean
from advbench.training.schedules import SCHEDULES, warmup


@dataclass(frozen=True)
class Optimizer(ABC):
    """What all optimizers share. Weight decay acts on every parameter, as in the codes of Madry et
    al., Rice et al. and TRADES.

    Raises:
        UserError: for values out of range and for an unknown schedule.
    """

    lr: float = 0.1
    """The highest learning rate, above 0."""
    weight_decay: float = 5e-4
    """On every parameter, at least 0."""
    schedule: str = "cosine"
    """``constant``, ``cosine``, ``multistep``, ``cyclic`` or ``onecycle``, per step, see
    ``advbench.training.schedules``."""
    warmup: float = 0.0
    """Epochs of a linear rise at the start; it multiplies the schedule."""
    milestones: list[int] = field(default_factory=list)
    """For multistep, the epochs at whose start the learning rate drops."""
    gamma: float = 0.1
    """For multistep, the factor of each drop."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            hint = did_you_mean(self.schedule, SCHEDULES)
            raise UserError(f"no schedule '{self.schedule}'{hint} (optimizer.schedule=cosine)")
        if self.schedule == "multistep" and not self.milestones:
            raise UserError(
                "optimizer.schedule=multistep never drops without optimizer.milestones=[15,25]"
            )
        self._require("lr", self.lr > 0, "above 0")
        self._require("weight_decay", self.weight_decay >= 0, "at least 0")
        self._require("warmup", 0 <= self.warmup < math.inf, "a number of epochs")
        self._require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        if any(epoch < 0 for epoch in self.milestones):
            raise UserError(f"optimizer.milestones={self.milestones} has epochs below 0")

    def _require(self, name: str, valid: bool, range_: str) -> None:
        if not valid:
            raise UserError(f"optimizer.{name}={getattr(self, name):g} is not {range_}")

    def lr_at(self, step: int, epochs: int, steps_per_epoch: int) -> float:
        """The learning rate of a step.

        Args:
            step: from 0, over all epochs.
            epochs: of the whole training.
            steps_per_epoch: at least 1.
        """
        milestones = [epoch * steps_per_epoch for epoch in self.milestones]
        shape = SCHEDULES[self.schedule](step, epochs * steps_per_epoch, milestones, self.gamma)
        return self.lr * shape * warmup(step, round(self.warmup * steps_per_epoch))

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent."""

    momentum: float = 0.9
    """In [0, 1)."""
    nesterov: bool = False
    """Nesterov's momentum; needs ``momentum`` above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        if self.nesterov and not self.momentum:
            raise UserError("optimizer.nesterov=true needs optimizer.momentum above 0")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    lr: float = 1e-3
    """The highest learning rate, above 0."""
    weight_decay: float = 1e-2
    """On every parameter, at least 0."""
    beta1: float = 0.9
    """Decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the mean of its square, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("beta1", 0 <= self.beta1 < 1, "at least 0 and below 1")
        self._require("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
        )
