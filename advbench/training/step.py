"""The differentiable part of a training step, as one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.defenses.base import Defense, Part, Step
from advbench.recipes.base import PartName, Recipe


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

    def forward(
        self, inputs: Mapping[PartName, Tensor], y: Tensor, epoch: int, step: int
    ) -> dict[str, Tensor]:
        """The loss terms, scalars, of the recipe and then of the defense.

        inputs: x (N, C, H, W) in [0, 1] of each part of the recipe.  y: (N,).
        Raises ValueError if recipe and defense give two terms one name.
        """
        parts: dict[PartName, Part] = {}
        for name in self.recipe.parts:
            features = self.model.features(inputs[name])
            parts[name] = Part(inputs[name], features, self.model.head(features))
        record = Step(
            y=y,
            clean=parts.get("clean"),
            adversarial=parts.get("adversarial"),
            epoch=epoch,
            step=step,
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
