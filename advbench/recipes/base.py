"""What a recipe is: how one training step makes its inputs and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.attacks.base import Attack, Clean, attackable, craft
from advbench.attacks.random import TorchRandom
from advbench.attacks.threat import Threat
from advbench.defenses.base import Part, PartName, Step
from advbench.errors import UserError
from advbench.surgery import modes_kept


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for parameters; afterwards each module and parameter as before.

    Gradients in the input remain possible, and are all that a backward pass computes then.
    """
    with modes_kept(model), attackable(model):
        model.eval()
        yield


@dataclass(frozen=True)
class Recipe(ABC):
    """How a training step makes its inputs and its loss; hyper-parameters alone.

    Example:
        >>> import torch
        >>> from advbench import Threat
        >>> from advbench.recipes import PGDAT
        >>> recipe = PGDAT(threat=Threat("linf", "8/255"), steps=2)
        >>> recipe.parts
        ('adversarial',)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> bool((recipe.perturb(model, x, y) - x).abs().max() <= 8 / 255 + 1e-6)
        True

    Raises:
        UserError: for values out of range, and where the threat is missing.
    """

    threat: Threat | None = None
    """What an adversarial recipe trains against; handed in by the caller."""
    label_smoothing: float = 0.0
    """Of the recipe's cross-entropy, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"recipe.label_smoothing={self.label_smoothing:g} is not at least 0 and below 1"
            )
        if self.threat is None and "adversarial" in self.parts:
            raise UserError(f"{type(self).__name__} trains against a threat: give threat=linf_8")

    @property
    @abstractmethod
    def parts(self) -> tuple[PartName, ...]:
        """Which parts of the batch the training step forwards, in this order."""

    def check(self, num_classes: int) -> None:  # noqa: B027  (a hook)
        """Check the recipe before anything is trained.

        Args:
            num_classes: of the data, K.

        Raises:
            UserError: if it can't train so many classes.
        """

    def memory(self) -> nn.Module | None:
        """What the recipe remembers from step to step, as buffers: saved with the training's state,
        handed to ``loss_terms`` and ``after_step`` as ``step.memory``.
        """
        return None

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Make the adversarial part of a batch.

        It draws from PyTorch's global generator. The model comes back as it was: parameters, their
        gradients, buffers and modes.

        Args:
            model: the defended model, in training mode.
            x: clean images in [0, 1], (N, C, H, W).
            y: true classes, (N,).

        Returns:
            x', (N, C, H, W), inside the threat around x and inside [0, 1].
        """
        raise NotImplementedError

    @abstractmethod
    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        """The terms of the loss.

        Args:
            model: the defended model, in training mode.
            step: what the step forwarded, with gradients.

        Returns:
            Named scalars whose sum is the loss; they are logged one by one.
        """

    @contextmanager
    def displaced(self, model: nn.Module, loss: Callable[[], Tensor], epoch: int) -> Iterator[None]:
        """Around the forward and backward pass of a step: the weights may be elsewhere meanwhile.

        Args:
            model: the defended model, in training mode.
            loss: the loss of the step, a scalar, by a forward pass in training mode at the weights
                of that moment.
            epoch: from 0.
        """
        yield

    def after_step(self, model: nn.Module, step: Step) -> None:  # noqa: B027  (a hook)
        """After the optimizer's step, without gradients.

        Args:
            model: the defended model, with the new weights.
            step: what the step forwarded, with the weights before.
        """

    def search(self, attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """x' by one search of ``attack`` inside the threat, on the model in eval mode.

        Codes differ here: Madry et al. and Rice et al. (2020, arXiv 2002.11569) attack in train
        mode, where each attack pass moves the running statistics of batch norm; TRADES and MTARD
        attack in eval mode. Eval mode gains clean accuracy at comparable robustness (Pang et al.
        2021, arXiv 2010.00467), and it attacks the function that will be deployed.

        Args:
            attack: whose points all lie inside the threat.
            model: the defended model, in any mode; it comes back in the same.
            x: clean images in [0, 1], (N, C, H, W).
            y: true classes, (N,).

        Returns:
            x', (N, C, H, W).
        """
        assert self.threat is not None
        ids = torch.arange(len(x), device=x.device)
        with frozen(model):
            return craft(attack, model, Clean(ids, x, y), self.threat, TorchRandom())

    def cross_entropy(self, part: Part | None, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a part that the recipe forwards, with label smoothing; a scalar.

        Args:
            part: clean or adversarial.
            labels: ``Step.labels``, (N,) classes or (N, K) soft labels.
        """
        assert part is not None
        return F.cross_entropy(part.logits, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class AdversarialRecipe(Recipe):
    """A recipe whose x' is the last point of one search inside the threat.

    Raises:
        UserError: for values that the search does not take, and for l1 threats.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threat is not None and self.threat.norm == "l1":
            raise UserError("PGD's step is not defined for l1: train with threat=linf_8 or l2_05")
        self.attack()  # raises for values that it does not take, before anything is trained

    def check(self, num_classes: int) -> None:
        assert self.threat is not None
        self.attack().check(num_classes, self.threat)

    @abstractmethod
    def attack(self) -> Attack:
        """The search that makes x'."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.search(self.attack(), model, x, y)
