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
    """What an attacker must know of a model. Evaluations are planned from this alone."""

    stochastic: bool = False
    """The model draws random numbers: two forward passes differ."""
    gradient: Literal["exact", "discontinuous", "straight_through", "none"] = "exact"
    """Whether the input gradient can be used: ``exact``, ``discontinuous``, ``straight_through``
    (the backward pass is not that of the forward pass) or ``none``."""
    batch_dependent: bool = False
    """A prediction depends on the other rows of the batch."""
    batch_size: int | None = None
    """Rows of the fixed batches in which a batch-dependent model is to be judged."""
    retrofit: bool = False
    """May be put on a finished undefended model."""
    output: Literal["logits", "probabilities"] = "logits"
    """What the model returns; ``probabilities`` are attacked through their logarithms."""


GRADIENTS = ("exact", "straight_through", "discontinuous", "none")
"""From the best to the worst for an attacker who follows the gradient."""


def worst(traits: Sequence[Traits]) -> Traits:
    """What an attacker must know of a model whose parts have these traits.

    Args:
        traits: of the parts, at least one.

    Raises:
        UserError: if two of them are to be judged in batches of different sizes.
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
    """One part of a training batch, clean or adversarial, as the model saw it."""

    x: Tensor
    """Images, (N, C, H, W) in [0, 1]."""
    features: Tensor
    """What the trunk made of them, (N, D)."""
    logits: Tensor
    """What the head made of these, (N, K)."""


@dataclass(frozen=True)
class Step:
    """The record of one training step. A part that is not needed is None."""

    y: Tensor
    """True classes, (N,)."""
    clean: Part | None
    """The clean images as the model saw them; None where neither recipe nor defense uses them."""
    adversarial: Part | None
    """The adversarial images as the model saw them; None where the recipe makes none."""
    epoch: int
    """From 0."""
    step: int
    """From 0, over all epochs."""
    borrowed: tuple[PartName, ...] = ()
    """Parts that the defense needs and the recipe does not train on."""
    memory: nn.Module | None = None
    """What the recipe remembers from step to step, see ``Recipe.memory``."""
    targets: Tensor | None = None
    """(N, K) soft labels of images that were mixed; y is then the class with most of each."""

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
    """Takes x (N, C, H, W) and returns logits (N, K); called as ``model(x, clean)`` if
    ``needs_clean_input``. In evaluation mode; ``advbench.surgery.twin`` makes one."""
    exact: bool
    """Its logits equal those of the defended model."""
    loss: str
    """The untargeted loss that suits it, a name of ``advbench.attacks.losses``."""
    why: str
    """One line on why an attacker would use it."""
    needs_clean_input: bool = False
    """Some of its parts stay as they are at the clean image."""
    auxiliary_loss: bool = False
    """It returns a pair: logits, and (N,) what the attacker adds to each row's loss."""
    stochastic: bool = False
    """It draws random numbers, as the model does: its gradients are means over EOT samples."""
    transfer: bool = False
    """It is a model of other weights, whose adversarial images may transfer."""


def surrogates_of(defense: Defense, model: Any, traits: Traits) -> dict[str, Surrogate]:
    """The defense's surrogates; all are stochastic if the model is by something else than it.

    Args:
        defense: which names them.
        model: the defended model, in evaluation mode.
        traits: of the model as a whole.
    """
    surrogates = dict(defense.surrogates(model))
    if traits.stochastic and not defense.traits(model).stochastic:
        return {name: replace(one, stochastic=True) for name, one in surrogates.items()}
    return surrogates


@dataclass(frozen=True)
class Defense:
    """The undefended model, and the base of every defense: each hook is a no-op.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from advbench import Defense, Traits
        >>> from advbench.backbones.convnet import convnet
        >>> from advbench.surgery import replace_modules
        >>> @dataclass(frozen=True)
        ... class Smooth(Defense):
        ...     '''SiLU in the place of every ReLU.'''
        ...
        ...     def apply(self, model):
        ...         replace_modules(model, torch.nn.ReLU, lambda old, name: torch.nn.SiLU())
        ...         return model
        >>> model = Smooth().apply(convnet(num_classes=10, input_shape=[1, 8, 8]).build())
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> Smooth().traits(model) == Traits()
        True
    """

    def traits(self, model: nn.Module) -> Traits:
        """What an attacker must know of the defended model.

        Args:
            model: as it is now: its buffers may decide, such as a jump of 0.
        """
        return Traits()

    def apply(self, model: Classifier) -> Classifier:
        """Put the defense into a model, before the optimizer, ``torch.compile`` and DDP see it.

        Args:
            model: a backbone, or what another member of a chain returned. It may be changed.

        Returns:
            The defended model.

        Raises:
            UserError: for a model that it does not fit.
        """
        return model

    def prepare(self, model: Classifier, data: Splits) -> None:
        """One pass over the training set, before the first step (prototypes).

        Args:
            model: in evaluation mode, on its device.
            data: ``data.train`` is passed over. A retrofit is prepared at evaluation.
        """

    @property
    def parts(self) -> tuple[PartName, ...]:
        """Parts of the batch that the defense needs to see, whatever the recipe trains on.

        A clean part can always be had; an adversarial one only from a recipe that makes one.
        """
        return ()

    def before_part(self, model: Any, part: PartName) -> None:
        """Just before the training step forwards a part of the batch.

        Args:
            model: the defended model, in training mode.
            part: which part comes next, ``clean`` or ``adversarial``.
        """

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        """The defense's own terms of the loss.

        Args:
            model: the defended model, in training mode.
            step: what the step forwarded, with gradients.

        Returns:
            Named scalars that are added to the recipe's. A name that the recipe uses raises
            ValueError.
        """
        return {}

    def after_step(self, model: Any, step: Step) -> None:
        """After the optimizer's step, without gradients (moving averages).

        With several devices each calls this with its own rows, and all end with the buffers of the
        first: what is averaged over rows has to be summed over devices here.

        Args:
            model: the defended model, in training mode, with the new weights.
            step: what the step forwarded, with the weights before.
        """

    def after_epoch(self, model: Any, data: Splits) -> None:
        """On the weights that are about to be validated and kept, without gradients.

        Args:
            model: the defended model, in evaluation mode.
            data: its training part may be read.
        """

    def finish(self, model: Any, data: Splits) -> dict[str, Any]:
        """Choose what is chosen on a finished model, from validation data (an automatic jump).

        Called in evaluation mode, without gradients: at the end of a training on its best and on
        its last weights, and at evaluation on a model that a retrofit was put on. An interrupted
        run calls it again, so a second call must choose the same.

        Args:
            model: the defended model; buffers may be set.
            data: choose on ``data.val``, never on ``data.test``.

        Returns:
            What was chosen, by parameter, for summary.json; {} if the model is as it was.
        """
        return {}

    def adopt(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Take parts of another run's weights, where the config names ``defense.weights=RUN``.

        Args:
            model: the defended model.
            weights: all tensors of the run, by name.

        Raises:
            UserError: if the defense takes none, or they do not fit.
        """
        raise UserError(f"{type(self).__name__} takes no weights from another run")

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        """Models that an adaptive attacker would also use.

        Args:
            model: the defended model, in evaluation mode; it is not changed.

        Returns:
            Surrogates by name, {} where the model's own gradient can be trusted.
        """
        return {}
