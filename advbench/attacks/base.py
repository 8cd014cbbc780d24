"""``Attack``: the base class. An attack proposes points, an oracle returns logits and gradients.

A search over a batch of rows, in pseudo-code (the evaluation engine refills finished rows):

    rows = attack.start(oracle, clean, threat, random, restart)
    repeat attack.queries times:
        answer = attack.ask(oracle, rows, threat)    # logits, loss, gradient at rows.point
        <referee: is rows.point a success?>
        attack.advance(rows, answer, threat, random) # moves rows.point
        if attack.peeks:
            logits = oracle.peek(rows)               # a forward pass alone, at the new rows.point
            <referee: is rows.point a success?>
            attack.settle(rows, logits, threat)      # may move rows.point once more
    <referee: is rows.point a success?>

All state of a search is row-wise, so that rows can leave and enter between any two queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advbench.attacks import losses
from advbench.attacks.random import Random
from advbench.attacks.rows import Answer, Clean, Rows
from advbench.attacks.rows import started as started  # which custom attacks import from here
from advbench.attacks.threat import Threat
from advbench.attacks.waits import must_wait
from advbench.devices import kept
from advbench.errors import UserError, did_you_mean


class Counted(nn.Module):
    """A model that counts the rows it passes forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor, *clean: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.forwards += len(x)
        answer = kept(self.model(x, *clean))
        logits = answer[0] if isinstance(answer, tuple) else answer
        if logits.requires_grad:
            logits.register_hook(self._count)
        return answer

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Oracle:
    """Answers an attack's queries to one victim model, and counts them.

    Args:
        model: returns logits (N, K), or a pair of logits and an auxiliary loss (N,) that is added
            to the attack's loss.
        check: look at every gradient. Training does not: its loss shows it soon enough.
        needs_clean_input: the model takes the clean images too, ``model(x, clean)``.
    """

    samples = 1
    """Evaluations of the model for each answer: EOT samples."""

    def __init__(
        self, model: nn.Module, check: bool = True, needs_clean_input: bool = False
    ) -> None:
        self.model = Counted(model)
        self.check = check
        self.needs_clean_input = needs_clean_input

    def _forward(self, x: Tensor, clean: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits (N, K) and the auxiliary loss of each row, (N,) or 0."""
        answer = self.model(x, clean) if self.needs_clean_input else self.model(x)
        logits, auxiliary_loss = answer if isinstance(answer, tuple) else (answer, 0.0)
        return logits.float(), auxiliary_loss

    @torch.no_grad()
    def logits(self, x: Tensor, clean: Tensor | None = None) -> Tensor:
        """A forward pass that belongs to no query; ``rows.forwards`` does not count it.

        Args:
            x: images in [0, 1], (N, C, H, W).
            clean: the clean images, (N, C, H, W), for a model that takes them too; None if ``x``
                are the clean images.

        Returns:
            Logits (N, K), float32, without gradient.
        """
        return self._forward(x, x if clean is None else clean)[0]

    def query(self, attack: Attack, rows: Rows, gradient: bool = True) -> Answer:
        """One query at ``rows.point``, counted in ``rows.forwards`` and ``rows.backwards``.

        Args:
            attack: whose loss is meant.
            rows: the state of the search, N rows.
            gradient: whether to spend a backward pass.
        """
        with torch.set_grad_enabled(gradient):
            point = rows.point.detach().requires_grad_(gradient)
            logits, auxiliary_loss = self._forward(point, rows.x)
            loss = attack.loss(logits, rows) + auxiliary_loss
            grad = torch.autograd.grad(loss.sum(), point)[0] if gradient else None
        if grad is not None:  # a layout other than the point's makes all that follows slower
            grad = grad.clone(memory_format=torch.contiguous_format)
        usable = None
        if grad is not None and self.check:
            grad, usable = _finite(grad)
        rows.forwards += 1
        rows.backwards += int(gradient)
        return Answer(logits.detach(), loss.detach(), grad, usable)

    def peek(self, rows: Rows) -> Tensor:
        """Logits at ``rows.point``, (N, K), for one forward pass on each of ``rows``."""
        rows.forwards += 1
        return self.logits(rows.point, rows.x)

    def boundaries(self, rows: Rows) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
        """All decision boundaries at ``rows.point``, for one backward pass per wrong class.

        Args:
            rows: the state of the search, N rows.

        Returns:
            Logits (N, K); the margin of each wrong class, its logit minus the true one, (N, K - 1);
            and one after the other each margin's gradient (N, C, H, W), with the rows where it is
            usable, (N,) bool.
        """
        point = rows.point.detach().requires_grad_()
        with torch.enable_grad():
            logits, _ = self._forward(point, rows.x)
            wrong = torch.arange(logits.shape[1] - 1, device=logits.device)
            wrong = wrong + (wrong >= rows.y[:, None])
            margins = logits.gather(1, wrong) - logits.gather(1, rows.y[:, None])
        rows.forwards += 1

        def gradients() -> Iterator[tuple[Tensor, Tensor]]:
            for column in range(margins.shape[1]):
                retain = column < margins.shape[1] - 1
                gradient = torch.autograd.grad(
                    margins[:, column].sum(), point, retain_graph=retain
                )[0]
                rows.backwards += 1
                yield _finite(kept(gradient))

        return logits.detach(), margins.detach(), gradients()


def _finite(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with zeros where it is not finite, and which rows are finite somewhere."""
    if not must_wait(gradient):  # a sum is finite where all entries are, and costs one pass
        usable = gradient.flatten(1).sum(1).isfinite()
        if usable.all():
            return gradient, usable
    finite = gradient.nan_to_num(0.0, 0.0, 0.0)
    return finite, (finite == gradient).flatten(1).any(1)


@dataclass(frozen=True)
class Attack(ABC):
    """A search for x' inside the threat around x. Subclasses propose; the referee alone decides.

    Example:
        >>> import torch
        >>> from advbench.attacks import PGD, Clean, Threat, craft
        >>> from advbench.attacks.random import TorchRandom
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> threat = Threat("linf", "8/255")
        >>> images = craft(PGD(steps=3), model, Clean(torch.arange(5), x, y), threat, TorchRandom())
        >>> threat.contains(images, x).tolist()
        [True, True, True, True, True]
    """

    gradient: ClassVar[bool] = True
    """Whether a query needs the gradient; a black-box attack does with the loss."""
    peeks: ClassVar[bool] = False
    """Whether ``settle`` wants to see the logits at the point that ``advance`` moved to."""
    joint: ClassVar[bool] = True
    """Whether it makes sense on a whole batch at once, where each row's loss depends on others."""

    @property
    def averages(self) -> bool:
        """Whether its queries may be means over EOT samples."""
        return True

    @property
    @abstractmethod
    def starts(self) -> int:
        """Searches per sample, one after the other: restarts, times targets if it is targeted."""

    def stays_inside(self, threat: Threat) -> bool:
        """Whether every point that it queries lies inside ``threat``."""
        return True

    @property
    @abstractmethod
    def queries(self) -> int:
        """Queries per search that ``advance`` uses; the point after the last one counts too."""

    @abstractmethod
    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        """Begin a search.

        Args:
            oracle: answers queries to the victim model.
            clean: the images, with ids and classes.
            threat: where the search may go.
            random: draws for these rows.
            restart: which search of each sample this is, (N,), from 0 and below ``starts``.

        Returns:
            The rows, each at its starting point; ``started`` fills the common fields.
        """

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        """What the search raises; the gradient of a query is that of this loss.

        Args:
            logits: at ``rows.point``, (N, K), float32.
            rows: the state of the search, N rows.

        Returns:
            (N,), larger is closer to an error; by default the margin.
        """
        return losses.margin(logits, rows.y)

    def ask(self, oracle: Oracle, rows: Rows, threat: Threat) -> Answer:
        """Query the oracle at ``rows.point``, once by default.

        Args:
            oracle: answers queries to the victim model.
            rows: the state, N rows; the oracle adds to ``forwards`` and ``backwards``.
            threat: where the search may go.
        """
        return oracle.query(self, rows, self.gradient)

    def advance(self, rows: Rows, answer: Answer, threat: Threat, random: Random) -> Tensor | None:
        """Use the answer, move ``rows.point`` and increase ``rows.iteration``, in place.

        Args:
            rows: the state, N rows.
            answer: of the oracle at ``rows.point``.
            threat: where the search may go.
            random: draws for these rows; a search that draws here gives ``rows.iteration`` as the
                iteration, so that its draws are its own.

        Returns:
            None if every row's iteration counted up by one; else ``rows.iteration`` on the host.
        """
        raise NotImplementedError

    def settle(self, rows: Rows, logits: Tensor, threat: Threat) -> None:
        """Use the logits at the point that ``advance`` moved to; for an attack that ``peeks``.

        Args:
            rows: the state, N rows, changed in place.
            logits: at ``rows.point``, (N, K).
            threat: where the search may go.
        """
        raise NotImplementedError

    @abstractmethod
    def check(self, num_classes: int, threat: Threat) -> None:
        """Check that the attack is defined, before anything runs.

        Args:
            num_classes: of the victim model, K.
            threat: its norm and radius.

        Raises:
            UserError: if it can't run with so many classes, or in that norm.
        """


def untargeted(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The untargeted loss of that name.

    Raises:
        UserError: for another name.
    """
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


def need_targets(targets: int, num_classes: int) -> None:
    """Raise UserError if there are fewer wrong classes than targets."""
    if targets > num_classes - 1:
        raise UserError(f"{targets} targets need {targets + 1} classes and there are {num_classes}")


def wrong_class(oracle: Oracle, rows: Rows, rank: Tensor) -> Tensor:
    """Each row's wrong class of that rank, at the cost of a forward pass.

    Args:
        oracle: answers queries to the victim model.
        rows: the state of the search, N rows.
        rank: (N,), zero for the largest wrong logit on the clean image.

    Returns:
        Classes, (N,).
    """
    logits = oracle.logits(rows.x)
    # The true class ranks last, also below a class that the model masks.
    logits = logits.clamp_min(torch.finfo(logits.dtype).min).scatter(1, rows.y[:, None], -torch.inf)
    rows.forwards += oracle.samples
    return logits.argsort(dim=1, descending=True).gather(1, rank[:, None]).squeeze(1)


@contextmanager
def attackable(*models: nn.Module) -> Iterator[None]:
    """Parameters frozen inside: an attack needs gradients of inputs alone."""
    trainable = [p for model in models for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def craft(attack: Attack, model: nn.Module, clean: Clean, threat: Threat, random: Random) -> Tensor:
    """One search for every row, to its last point, without a referee: for training.

    Args:
        attack: whose points all lie inside the threat (``attack.stays_inside``).
        model: the victim model; (N, C, H, W) to logits (N, K).
        clean: images in [0, 1], ids and classes, N of each.
        threat: where the search may go.
        random: such as ``TorchRandom()``.

    Returns:
        x' (N, C, H, W) inside the threat. The model's mode and parameters are left alone.
    """
    oracle = Oracle(model, check=False)
    rows = attack.start(oracle, clean, threat, random, torch.zeros_like(clean.ids))
    for _ in range(attack.queries):
        attack.advance(rows, attack.ask(oracle, rows, threat), threat, random)
    return rows.point.detach()
