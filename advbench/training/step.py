"""The differentiable part of a training step, as one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.defenses.base import Defense, Part, PartName, Step
from advbench.devices import kept
from advbench.recipes.base import Recipe


class TrainingStep(nn.Module):
    """Everything that has gradients in one forward pass, so that the hooks of DDP see it all.

    ``record`` is the last step as the defense and the metrics see it: without gradients. It is not
    returned because DDP takes what is returned for a part of the loss.
    """

    record: Step

    def __init__(self, model: Classifier, recipe: Recipe, defense: Defense) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.defense = defense
        self.memory = recipe.memory()
        # Only the recipe can make an adversarial part.
        needs_clean = "clean" in defense.parts and "clean" not in recipe.parts
        self.borrowed: tuple[PartName, ...] = ("clean",) if needs_clean else ()

    @property
    def parts(self) -> tuple[PartName, ...]:
        """What is forwarded, in this order: the recipe's parts and then those of the defense."""
        return (*self.recipe.parts, *self.borrowed)

    def forward(
        self,
        inputs: Mapping[PartName, Tensor],
        y: Tensor,
        epoch: int,
        step: int,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss terms, scalars, of the recipe and then of the defense.

        Args:
            inputs: x (N, C, H, W) in [0, 1] of each part.
            y: (N,).
            targets: see ``Step``.

        Raises:
            ValueError: if recipe and defense give two terms one name.
        """
        parts: dict[PartName, Part] = {}
        for name in self.parts:
            self.defense.before_part(self.model, name)
            features = kept(self.model.features(inputs[name]))
            parts[name] = Part(inputs[name], features, kept(self.model.head(features)))
        record = Step(
            y=y,
            clean=parts.get("clean"),
            adversarial=parts.get("adversarial"),
            epoch=epoch,
            step=step,
            borrowed=self.borrowed,
            memory=self.memory,
            targets=targets,
        )
        terms = self.recipe.loss_terms(self.model, record)
        added = self.defense.loss_terms(self.model, record)
        if both := sorted(terms.keys() & added.keys()):
            raise ValueError(
                f"{type(self.recipe).__name__} and {type(self.defense).__name__} both have a loss "
                f"term '{both[0]}'"
            )
        self.record = replace(
            record, clean=_detached(record.clean), adversarial=_detached(record.adversarial)
        )
        return {**terms, **added}


def _detached(part: Part | None) -> Part | None:
    if part is None:
        return None
    return Part(part.x, part.features.detach(), part.logits.detach())
