"""Linear models, whose loss and worst perturbation are known."""

from __future__ import annotations

from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.defenses.base import Part, Step

LINF = Threat("linf", 0.1)
L2 = Threat("l2", 0.5)


def linear(weight: Tensor) -> Classifier:
    """Images (1, 1, D), logits ``weight @ x`` for ``weight`` (K, D)."""
    classes, pixels = weight.shape
    head = nn.Linear(pixels, classes, bias=False)
    head.weight.data = weight
    return Classifier(
        nn.Flatten(),
        num_features=pixels,
        num_classes=classes,
        input_shape=(1, 1, pixels),
        head=head,
    )


def record(model: Classifier, y: Tensor, **parts: Tensor) -> Step:
    seen = {
        name: Part(x, model.features(x), model.head(model.features(x))) for name, x in parts.items()
    }
    return Step(y, seen.get("clean"), seen.get("adversarial"), epoch=0, step=0)


def attack_direction(model: Classifier, y: Tensor) -> Tensor:
    """Where the loss of two classes rises: (N, 1, 1, D)."""
    weight = next(model.head.parameters()).detach()
    return (weight[1 - y] - weight[y]).view(len(y), 1, 1, -1)
