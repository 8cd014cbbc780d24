"""What a defense is: hyper-parameters, hooks into training, and what an attacker must know of it.

A defense is a frozen dataclass. All state lives in the modules that it puts into the model, so
that ``model.state_dict()`` holds the whole defense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.errors import UserError

if TYPE_CHECKING:
    from advbench.data.base import Splits

PartName = Literal["clean", "adversarial"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an attacker must know. Evaluation plans from this and from nothing else."""

    stochastic: bool = False
    gradient: Literal["exact", "discontinuous", "straight_through", "none"] = "exact"
    batch_dependent: bool = False
    """A prediction depends on the other rows of the batch."""
    batch_size: int | None = None
    """Rows of the fixed batches in which a batch-dependent model is to be judged."""
    retrofit: bool = False
    """May be put on a finished undefended model."""
    output: Literal["logits", "probabilities"] = "logits"


GRADIENTS = ("exact", "straight_through", "discontinuous", "none")
"""From the best to the worst for an attacker who follows the gradient."""


def worst(traits: Sequence[Traits]) -> Traits:
    """What an attacker must know of a model that has all these traits.

    Raises UserError if two of them are to be judged in batches of different sizes.
    """
    sizes = sorted({t.batch_size for t in traits if t.batch_dependent and t.batch_size})
    if len(sizes) > 1:
        raise UserError(
            f"parts of the model are judged in batches of {' and of '.join(map(str, sizes))} "
            "rows: give them one size"
        )
    return Traits(
        stochastic=any(t.stochastic for t in traits),
        gradient=max(traits, key=lambda t: GRADIENTS.index(t.gradient)).gradient,
        batch_dependent=any(t.batch_dependent for t in traits),
        batch_size=sizes[0] if sizes else None,
        retrofit=all(t.retrofit for t in traits),
        output="probabilities" if any(t.output == "probabilities" for t in traits) else "logits",
    )


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
    """The record of one training step. A part that nobody asked for is None.

    y: (N,) true classes.  epoch and step count from 0; step counts over all epochs.
    borrowed: parts that are there because the defense asked for them, and the recipe did not.
    memory: what the recipe remembers from step to step, see ``Recipe.memory``.
    targets: (N, K) soft labels of images that were mixed; y is then the class with most of each.
    """

    y: Tensor
    clean: Part | None
    adversarial: Part | None
    epoch: int
    step: int
    borrowed: tuple[PartName, ...] = ()
    memory: nn.Module | None = None
    targets: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """What cross-entropy is taken against: (N,) classes, or (N, K) where images were mixed."""
        return self.y if self.targets is None else self.targets

    @property
    def parts(self) -> dict[PartName, Part]:
        """The parts that there are, by name."""
        both: dict[PartName, Part | None] = {"clean": self.clean, "adversarial": self.adversarial}
        return {name: part for name, part in both.items() if part is not None}


@dataclass(frozen=True)
class Surrogate:
    """A model that shares the defended model's weights and has friendlier gradients."""

    model: nn.Module
    """Takes x (N, C, H, W), and the clean images too if ``needs_clean_input``; returns logits
    (N, K). In evaluation mode; ``advbench.surgery.twin`` makes one."""
    exact: bool
    """Its logits equal those of the defended model."""
    loss: str
    """The untargeted loss that suits it, a name of ``advbench.attacks.losses``."""
    why: str
    """One line on why an attacker would use it."""
    needs_clean_input: bool = False
    """Some of its parts stay as they are at the clean image: ``model(x, clean)``."""
    auxiliary_loss: bool = False
    """It returns a pair: logits, and (N,) what the attacker adds to the loss of each row."""
    stochastic: bool = False
    """It draws, as the model does, so its gradients are means over EOT samples too."""
    transfer: bool = False
    """A model of other weights, whose adversarial images may transfer."""


def surrogates_of(defense: Defense, model: Any, traits: Traits) -> dict[str, Surrogate]:
    """The defense's, of a model with these traits: noise that is not the defense's is in all."""
    found = dict(defense.surrogates(model))
    if traits.stochastic and not defense.traits(model).stochastic:
        return {name: replace(one, stochastic=True) for name, one in found.items()}
    return found


@dataclass(frozen=True)
class Defense:
    """The undefended model, and the base of every defense: each hook is a no-op."""

    def traits(self, model: nn.Module) -> Traits:
        """What an attacker must know of the defended model."""
        return Traits()

    def apply(self, model: Classifier) -> Classifier:
        """Surgery: before the optimizer, before compile or DDP. Returns the defended model.

        Raises UserError for a model that it does not fit.
        """
        return model

    def prepare(self, model: Classifier, data: Splits) -> None:
        """One pass over the training set, before the first step (prototypes).

        The model is in evaluation mode, on its device. A retrofit is prepared at evaluation.
        """

    @property
    def parts(self) -> tuple[PartName, ...]:
        """Parts of the batch that the defense needs to see, whatever the recipe trains on.

        A clean part can always be had; an adversarial one only from a recipe that makes one.
        """
        return ()

    def before_part(self, model: Any, part: PartName) -> None:
        """Just before the training step forwards a part of the batch, in training mode."""

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        """Named scalar terms that are added to the recipe's; a duplicate name raises."""
        return {}

    def after_step(self, model: Any, step: Step) -> None:
        """After the optimizer's step, without gradients (moving averages).

        With several devices each calls this with its own rows, and all end with the buffers of the
        first: what is averaged over rows has to be summed over devices here.
        """

    def after_epoch(self, model: Any, data: Splits) -> None:
        """On the weights that are about to be validated and kept, in evaluation mode, no_grad."""

    def finish(self, model: Any, data: Splits) -> dict[str, Any]:
        """Choose what is chosen on a finished model, from validation data (an automatic jump).

        Called in evaluation mode, without gradients: at the end of a training on its best and on
        its last weights, and at evaluation on a model that a retrofit was put on. An interrupted
        run calls it again, so a second call must choose the same.

        Returns:
            What was chosen, by parameter, for summary.json; {} if the model is as it was.
        """
        return {}

    def adopt(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Take parts of another run's weights, where the config names ``defense.weights=RUN``."""
        raise UserError(f"{type(self).__name__} takes no weights from another run")

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        """Models that an adaptive attacker would also use, by name. ``model`` is not changed."""
        return {}
