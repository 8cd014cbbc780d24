"""How an attack searches: it proposes points, an oracle answers, a driver decides what goes on.

A search over a batch of rows, in pseudo-code (the evaluation engine refills finished rows):

    rows = attack.start(oracle, clean, threat, restart)
    repeat attack.queries times:
        answer = oracle.query(attack, rows)          # logits, loss, gradient at rows.point
        <referee: is rows.point a success?>
        attack.advance(rows, answer, threat)         # moves rows.point
    <referee: is rows.point a success?>

All state of a search is row-wise, so that rows can leave and enter between any two queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat
from advbench.errors import UserError, did_you_mean

R = TypeVar("R", bound="Rows")


@dataclass
class Rows:
    """Row-wise state of a search; every field is a tensor with leading dimension N.

    ids: sample ids.  x: clean images in [0, 1].  y: true classes.  restart: which search of the
    sample this is.  point: the image to query next.  iteration: queries answered so far.
    forwards, backwards: passes spent on the row so far.
    """

    ids: Tensor
    x: Tensor
    y: Tensor
    restart: Tensor
    point: Tensor
    iteration: Tensor
    forwards: Tensor
    backwards: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self: R, index: Tensor) -> R:
        """The rows at ``index`` (integers or a mask)."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def joined(self: R, other: R) -> R:
        """These rows, then the others."""
        return replace(
            self,
            **{f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)])
               for f in fields(self)},
        )  # fmt: skip


class Clean(NamedTuple):
    """What a search starts from: sample ids (N,), images in [0, 1] (N, C, H, W), classes (N,)."""

    ids: Tensor
    x: Tensor
    y: Tensor


class Answer(NamedTuple):
    """What the oracle says of ``rows.point``.

    logits: (N, K).  loss: (N,).  gradient: of each row's loss in its point, (N, C, H, W); None
    where only a forward pass was asked for.
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor | None


class Counted(nn.Module):
    """A model that counts the rows it passes forwards and backwards, whoever calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Oracle:
    """Answers an attack's queries to one model, and counts them.

    check: look at every gradient, which waits for the device; see ``_usable``. Training does not:
    its loss tells soon enough.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        self.model = Counted(model)
        self.check = check

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self.model(x)

    def query(self, attack: Attack, rows: Rows, gradient: bool = True) -> Answer:
        """Logits, loss and, if asked for, gradient at ``rows.point``."""
        with torch.set_grad_enabled(gradient):
            point = rows.point.detach().requires_grad_(gradient)
            logits = self.model(point)
            loss = attack.loss(logits, rows)
            grad = torch.autograd.grad(loss.sum(), point)[0] if gradient else None
        if grad is not None and self.check:
            grad = _usable(grad)
        rows.forwards += 1
        rows.backwards += int(gradient)
        return Answer(logits.detach(), loss.detach(), grad)


def _usable(gradient: Tensor) -> Tensor:
    """The gradient with zeros where it is not finite: the attack goes on with the other pixels.

    Raises UserError if a row has no finite entry: an attack along it would measure nothing.
    """
    finite = gradient.isfinite()
    if finite.all():
        return gradient
    if not finite.flatten(1).any(1).all():
        raise UserError(
            "the model's gradient is NaN or infinite for whole images, so an attack along it would "
            "find nothing and its robust accuracy would mean nothing: mend the model's backward"
        )
    return torch.where(finite, gradient, 0.0)


@dataclass(frozen=True)
class Attack(ABC):
    """A search for x' inside the threat around x. Subclasses propose; the referee alone decides."""

    @property
    @abstractmethod
    def tries(self) -> int:
        """Searches per sample, one after the other: restarts, times targets if it is targeted."""

    @property
    @abstractmethod
    def queries(self) -> int:
        """Queries per search that ``advance`` learns from; the point after the last one counts."""

    @abstractmethod
    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        """The rows of a new search, at their starting points.  restart: (N,), below ``tries``."""

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        """What the search raises, (N,)."""
        return losses.margin(logits, rows.y)

    def advance(self, rows: Rows, answer: Answer, threat: Threat) -> None:
        """Learn from the answer and move ``rows.point``, in place."""
        raise NotImplementedError

    @abstractmethod
    def check(self, num_classes: int, threat: Threat) -> None:
        """Raise UserError if the attack can't run with so many classes, or in that norm."""


def started(clean: Clean, point: Tensor, restart: Tensor) -> dict[str, Tensor]:
    """The fields of ``Rows`` for a new search at ``point``."""
    zero = torch.zeros_like(clean.ids)
    return {
        "ids": clean.ids,
        "x": clean.x,
        "y": clean.y,
        "restart": restart,
        "point": point,
        "iteration": zero,
        "forwards": zero.clone(),
        "backwards": zero.clone(),
    }


def untargeted(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The untargeted loss of that name. Raises UserError for another name."""
    if name not in losses.UNTARGETED:
        raise UserError(f"no attack loss '{name}'{did_you_mean(name, losses.UNTARGETED)}")
    return losses.UNTARGETED[name]


def need_classes(loss: str, num_classes: int) -> None:
    """Raise UserError if ``loss`` is not defined for so few classes."""
    fewest = losses.FEWEST_CLASSES[loss]
    if num_classes < fewest:
        raise UserError(
            f"the {loss.replace('_', ' ')} loss needs at least {fewest} classes and there are "
            f"{num_classes}; use a margin loss"
        )


def craft(attack: Attack, model: nn.Module, clean: Clean, threat: Threat, random: Random) -> Tensor:
    """One search for every row, to its last point, without a referee: for training.

    Returns x' (N, C, H, W) inside the threat. The model's mode and parameters are left alone.
    """
    oracle = Oracle(model, check=False)
    rows = attack.start(oracle, clean, threat, random, torch.zeros_like(clean.ids))
    for _ in range(attack.queries):
        attack.advance(rows, oracle.query(attack, rows), threat)
    return rows.point.detach()
