"""What a defense is: hyper-parameters, hooks into training, and what an attacker must know of it.

A defense is a frozen dataclass. All state lives in the modules that it puts into the model, so
that ``model.state_dict()`` holds the whole defense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from advbench.backbones.base import Classifier

if TYPE_CHECKING:
    from advbench.data.base import Splits


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an attacker must know. Evaluation plans from this and from nothing else."""

    stochastic: bool = False
    gradient: Literal["exact", "discontinuous", "straight_through", "none"] = "exact"
    batch_dependent: bool = False
    """A prediction depends on the other rows of the batch."""
    retrofit: bool = False
    """May be put on a finished undefended model."""
    output: Literal["logits", "probabilities"] = "logits"


@dataclass(frozen=True)
class Part:
    """One part of a training batch, clean or adversarial, as the model saw it.

    x: (N, C, H, W) in [0, 1].  features: (N, D).  logits: (N, K).
    """

    x: Tensor
    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Step:
    """The record of one training step. A part that the recipe does not forward is None.

    y: (N,) true classes.  epoch and step count from 0; step counts over all epochs.
    """

    y: Tensor
    clean: Part | None
    adversarial: Part | None
    epoch: int
    step: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for part in (self.clean, self.adversarial) if part is not None)


@dataclass(frozen=True)
class Surrogate:
    """A model that shares the defended model's weights and has friendlier gradients.

    exact: its logits equal those of the defended model.
    loss: the loss that suits it (a name of ``advbench.attacks.losses``).
    why: one line on why an attacker would use it.
    """

    model: nn.Module
    exact: bool
    loss: str
    why: str


@dataclass(frozen=True)
class Defense:
    """The undefended model, and the base of every defense: each hook is a no-op."""

    def traits(self, model: nn.Module) -> Traits:
        """What an attacker must know of the defended model."""
        return Traits()

    def apply(self, model: Classifier) -> Classifier:
        """Surgery: before the optimizer, before compile or DDP. Returns the defended model."""
        return model

    def prepare(self, model: Classifier, data: Splits) -> None:
        """One pass over the training set, before the first step (prototypes, automatic jump)."""

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        """Named scalar terms that are added to the recipe's; a duplicate name raises."""
        return {}

    def after_step(self, model: Any, step: Step) -> None:
        """After the optimizer's step, without gradients (moving averages)."""

    def surrogates(self, model: nn.Module) -> Mapping[str, Surrogate]:
        """Models that an adaptive attacker would also use, by name."""
        return {}
