"""Attacks of pyautoattack and torchattacks, with our interface and our referee.

All adaptations of those libraries are in this file. Their random numbers
come from PyTorch's global generator, so what they return depends on the batch: the engine hands
them whole batches, and repeats those batches after an interruption.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from advbench.attacks.base import Attack, Clean, Oracle, Rows, started
from advbench.attacks.random import Random, hash_of
from advbench.attacks.threat import Threat
from advbench.devices import out_of_memory
from advbench.errors import UserError, did_you_mean, reason_of

_L2_BALLS = ("PGDL2", "PGDRSL2")
_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class _ContiguousGradient(torch.autograd.Function):
    """The identity, with a gradient of plain layout: pyautoattack views gradients as rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clone(memory_format=torch.contiguous_format)


class _ContiguousModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(_ContiguousGradient.apply(x))


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed PyTorch's global generators inside, and leave them as they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _library_errors(attack: str, how: str = "") -> Iterator[None]:
    """An exception of a library becomes a UserError, except for out of memory."""
    try:
        yield
    except Exception as problem:
        if isinstance(problem, UserError) or out_of_memory(problem):
            raise
        raise UserError(f"{attack} failed{how}: {reason_of(problem)}") from problem


@dataclass(frozen=True)
class LibraryAttack(Attack):
    """An attack that returns its x' in one call, at the start of the search."""

    joint = False  # it may pass over rows

    @property
    def starts(self) -> int:
        return 1

    @property
    def queries(self) -> int:
        return 0

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        counted = oracle.model
        forwards, backwards = counted.forwards, counted.backwards
        with _muted():
            point = self.perturb(_ContiguousModel(counted).eval(), clean, threat)
        rows = Rows(**started(clean, point.detach().to(clean.x), restart))
        # A library does not say which row it spent a pass on: the batch's mean, rounded.
        rows.forwards += round((counted.forwards - forwards) / len(rows))
        rows.backwards += round((counted.backwards - backwards) / len(rows))
        return rows

    def perturb(self, model: nn.Module, clean: Clean, threat: Threat) -> Tensor:
        """Run the library's attack on a whole batch.

        Args:
            model: counts its passes; (N, C, H, W) to logits (N, K), in evaluation mode.
            clean: images in [0, 1] and classes, N of each.
            threat: what the attack is given as norm and radius; the referee projects in any case.

        Returns:
            x', (N, C, H, W).
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ReferenceAutoAttack(LibraryAttack):
    """One member of AutoAttack, by its authors' code (pyautoattack)."""

    member: str = "apgd-ce"
    """``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t`` or ``square``."""
    version: str = "standard"
    """``standard``, ``plus`` or ``rand``; sets the parameters of the member."""
    targets: int = 9
    """Of the targeted members; at most the number of classes less one."""
    seed: int = 0
    """What the authors' code seeds each batch with."""

    def check(self, num_classes: int, threat: Threat) -> None:
        fewest = {"apgd-dlr": 3, "apgd-t": 4}.get(self.member, 2)
        if num_classes < fewest:
            raise UserError(
                f"the reference AutoAttack's {self.member} needs at least {fewest} classes and "
                f"there are {num_classes}; use protocol=apgd protocol.loss=margin"
            )

    def perturb(self, model: nn.Module, clean: Clean, threat: Threat) -> Tensor:
        from pyautoattack import AutoAttack

        x = clean.x
        suite = AutoAttack(
            model,
            norm=_NORMS[threat.norm],  # pyright: ignore[reportArgumentType]
            eps=threat.radius,
            seed=self.seed,
            version=self.version,  # pyright: ignore[reportArgumentType]
            device=x.device,
        )
        # pyautoattack sets the targets of l1 to five.
        suite.apgd_targeted.n_target_classes = min(
            suite.apgd_targeted.n_target_classes, self.targets
        )
        suite.fab.n_target_classes = min(suite.fab.n_target_classes, self.targets)
        suite.fab.targeted = self.member == "fab-t"
        if self.member == "fab-t":
            suite.fab.n_restarts = 1
        suite.apgd.loss = "dlr" if self.member == "apgd-dlr" else "ce"
        attack = {"apgd": suite.apgd, "apgd-t": suite.apgd_targeted, "square": suite.square}.get(
            self.member.replace("-ce", "").replace("-dlr", ""), suite.fab
        )
        attack.seed = self.seed
        seeded = _seeded(x.device, self.seed)
        with _library_errors(f"pyautoattack's {self.member}"), seeded, torch.no_grad():
            return attack.perturb(x.contiguous(), clean.y)


@dataclass(frozen=True)
class TorchAttack(LibraryAttack):
    """Any attack of torchattacks, by the name of its class.

    Raises:
        UserError: for an unknown name or parameter.
    """

    name: str = "PGD"
    """A class of torchattacks, such as ``PGD``, ``MIFGSM`` or ``CW``."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its constructor. eps, norm, n_classes and seed come from the evaluation, where
    the constructor has them and ``params`` does not."""
    num_classes: int = 10
    """Of the model."""
    seed: int = 0
    """What each batch is seeded with."""

    def __post_init__(self) -> None:
        library = _torchattacks()
        names = [n for n in library.__all__ if n not in ("MultiAttack", "LGV")]
        if self.name not in names:
            raise UserError(
                f"torchattacks has no attack '{self.name}'{did_you_mean(self.name, names)}"
            )
        wrong = set(self.params) - set(self._known())
        if wrong:
            key = sorted(wrong)[0]
            raise UserError(
                f"torchattacks' {self.name} has no parameter '{key}'"
                f"{did_you_mean(key, self._known())}"
            )

    def check(self, num_classes: int, threat: Threat) -> None:
        norm = "l2" if self.name in _L2_BALLS else "linf"
        bounded = "eps" in self._known() and "norm" not in self._known()
        if bounded and threat.norm != norm:
            raise UserError(f"torchattacks' {self.name} is for {norm} and the threat is {threat}")

    def _known(self) -> list[str]:
        parameters = inspect.signature(getattr(_torchattacks(), self.name).__init__).parameters
        return [name for name in parameters if name not in ("self", "model")]

    def perturb(self, model: nn.Module, clean: Clean, threat: Threat) -> Tensor:
        attack_class: Callable[..., Any] = getattr(_torchattacks(), self.name)
        defaults = {
            "eps": threat.radius,
            "norm": _NORMS[threat.norm],
            "n_classes": self.num_classes,
            "seed": self.seed,
        }
        names = self._known()
        params = {k: v for k, v in defaults.items() if k in names} | dict(self.params)
        x = clean.x
        # Seeded by the batch: the same random numbers after an interruption.
        seed = hash_of(f"{self.seed}/{self.name}/{clean.ids.tolist()}")
        with _library_errors(f"torchattacks' {self.name}", f" with {params}"):
            attack = attack_class(model, **params)
            attack.set_device(x.device)
            with _seeded(x.device, seed), torch.enable_grad():
                return attack(x.contiguous(), clean.y)


def _torchattacks() -> ModuleType:
    import torchattacks

    return torchattacks
