"""The base of backbones: their parameters, and the ``Classifier`` that they build."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from advbench.config.roles import Role
from advbench.errors import UserError


class Classifier(nn.Module):
    """An undefended classifier: normalise -> ``features(x)`` (N, D) -> ``head(z)`` (N, K).

    Inputs are (N, C, H, W) in [0, 1]; normalisation is part of the model, as non-persistent
    buffers. Every activation site is a module of its own, so that surgery counts sites and
    calls alike.

    Args:
        trunk: from normalised images to features (N, D).
        num_features: D.
        num_classes: K.
        input_shape: (C, H, W) of the images.
        mean: per channel, or one value for all, in pixel units of [0, 1]; None is 0.
        std: per channel, or one value for all, in pixel units of [0, 1]; None is 1.
        head: from features (N, D) to logits (N, K); None is a new linear layer.

    Raises:
        UserError: for a number of means or deviations that the channels do not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        *,
        num_features: int,
        num_classes: int,
        input_shape: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels = input_shape[0]
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = list(value) if value is not None else [default] * channels
            if len(values) not in (1, channels):
                raise UserError(
                    f"{name} has {len(values)} values and the images have {channels} channels"
                )
            buffer = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.trunk = trunk
        self.head = nn.Linear(num_features, num_classes) if head is None else head
        self.num_features = num_features
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: ``x`` (N, C, H, W) in [0, 1] -> (N, D)."""
        return self.trunk((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: ``x`` (N, C, H, W) in [0, 1] -> (N, K)."""
        return self.head(self.features(x))


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """The parameters of a backbone; ``build`` makes a classifier of them.

    A class has the name that configs and runs give it, such as ``resnet18``.
    """

    num_classes: int = field(metadata={"role": Role.OUTCOME | Role.FROM_DATA})
    """Number of classes, K. From the data."""
    input_shape: list[int] = field(metadata={"role": Role.OUTCOME | Role.FROM_DATA})
    """(C, H, W) of the images. From the data."""
    mean: list[float] | None = field(default=None, metadata={"role": Role.OUTCOME | Role.FROM_DATA})
    """Per channel, in pixel units of [0, 1]; None means no normalisation. From the data."""
    std: list[float] | None = field(default=None, metadata={"role": Role.OUTCOME | Role.FROM_DATA})
    """Per channel, in pixel units of [0, 1]; None means no normalisation. From the data."""

    @abstractmethod
    def build(self) -> Classifier:
        """A classifier with fresh weights, drawn from torch's global generator.

        Raises:
            UserError: for parameters or images that the backbone can't take.
        """

    def classifier(self, trunk: nn.Module, *, num_features: int) -> Classifier:
        """A classifier of the trunk, with the normalisation before it and a new linear head.

        Args:
            trunk: from normalised images (N, C, H, W) to features (N, D).
            num_features: D.
        """
        return Classifier(
            trunk,
            num_features=num_features,
            num_classes=self.num_classes,
            input_shape=self.input_shape,
            mean=self.mean,
            std=self.std,
        )
