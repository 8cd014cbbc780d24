"""Classifiers of torchvision and timm, by name.

Their last linear layer becomes the head and all before it the trunk. Shared activation modules
and functional activations (torchvision's ResNets, DenseNets, GoogLeNet, Inception, and others)
are split into one module per call; a model where that fails is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torchvision import models as zoo

from advbench.backbones.activations import ACTIVATIONS
from advbench.backbones.base import Backbone, Classifier
from advbench.errors import UserError, did_you_mean
from advbench.surgery import probe_images, split_sites

SITES = (*ACTIVATIONS.values(), nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU)
"""What counts as an activation in these models, each call of which gets a module of its own."""

AUXILIARY = ("googlenet", "inception_v3")
"""torchvision models that return extra logits in training unless told otherwise."""


_FETCHES = ContextVar("fetches", default=True)
_DOWNLOADS = ContextVar("downloads", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that are built inside fetch no weights: a run's own will be loaded into them.

    All else is as with the weights that they name, such as the normalisation.
    """
    token = _FETCHES.set(False)
    try:
        yield
    finally:
        _FETCHES.reset(token)


def fetches_weights() -> bool:
    """Whether a model may fetch the weights that it names."""
    return _FETCHES.get()


@contextmanager
def downloads(allowed: bool) -> Iterator[None]:
    """Models that are built inside may download, or not, what nobody asked for by name."""
    token = _DOWNLOADS.set(allowed)
    try:
        yield
    finally:
        _DOWNLOADS.reset(token)


def may_download() -> bool:
    """Whether weights that a model has by default may be downloaded."""
    return _DOWNLOADS.get()


class External(Classifier):
    """A model for three channels, and its last linear layer as the head.

    trunk: the model, with nothing in that layer's place.
    Gray images meet a mean of three values, and broadcasting makes three channels of them.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        head: nn.Linear,
        input_shape: Sequence[int],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__(
            trunk,
            num_features=head.in_features,
            num_classes=head.out_features,
            input_shape=(3, *input_shape[1:]),
            mean=_three(mean),
            std=_three(std),
            head=head,
        )
        self.input_shape = tuple(input_shape)


@dataclass(frozen=True, kw_only=True)
class ExternalBackbone(Backbone):
    """A classifier of another library, by name.

    Images of 3 channels, or 1: gray images are repeated into three channels. A head with another
    number of classes than the weights' starts at random.
    ``build`` raises UserError for an unknown name or unknown weights, images that the model can't
    take, and models without a last linear layer or whose activations can't be split.
    """

    library: ClassVar[str]
    """Its name in messages."""
    name: str
    """Of the model."""

    @property
    def title(self) -> str:
        """The name in messages."""
        return f"{self.library}'s {self.name}"

    def check_channels(self) -> None:
        """Check that the images are gray or have three channels.

        Raises:
            UserError: if not.
        """
        if self.input_shape[0] not in (1, 3):
            raise UserError(
                f"{self.title} takes images of 1 or 3 channels, these have {self.input_shape[0]}"
            )

    def split(
        self,
        model: nn.Module,
        last: Any,
        *,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> External:
        """Takes the layer ``last`` out of the model, splits the activations, tries the result."""
        self.check_channels()
        if not isinstance(last, nn.Linear):
            raise UserError(
                f"{self.title} does not end in one linear layer, and so has no features"
            )
        path = next(name for name, module in model.named_modules() if module is last)
        model.set_submodule(path, nn.Identity())
        if last.out_features != self.num_classes:
            last = nn.Linear(last.in_features, self.num_classes)
        classifier = External(model, head=last, input_shape=self.input_shape, mean=mean, std=std)
        with self.refusal():
            split_sites(classifier, SITES, probe_images(self.input_shape))
        return classifier

    @contextmanager
    def refusal(self) -> Iterator[None]:
        """Turns what a model says of images that it does not suit into a UserError."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            shape = "x".join(map(str, self.input_shape))
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{self.title} fails on images of {shape}: {reason}") from error


@dataclass(frozen=True, kw_only=True)
class torchvision(ExternalBackbone):
    """A classifier of ``torchvision.models``."""

    library = "torchvision"
    weights: str | None = None
    """Such as DEFAULT or IMAGENET1K_V2: downloaded, and images are normalised as in their training,
    whatever ``mean`` and ``std`` are. None starts at random, with mean and std, or where these are
    None with the normalisation of the default weights."""

    def build(self) -> External:
        name, weights = self.name, self.weights
        names = zoo.list_models(module=zoo)
        if name not in names:
            raise UserError(f"torchvision has no classifier '{name}'{did_you_mean(name, names)}")
        valid = zoo.get_model_weights(name).__members__
        if weights is not None and weights not in valid:
            raise UserError(f"{name} has no weights '{weights}'{did_you_mean(weights, valid)}")
        options: dict[str, Any] = {"weights": weights and valid[weights]}
        if name in AUXILIARY:
            options["aux_logits"] = False
            if weights is None:
                options["init_weights"] = True
            elif not fetches_weights():
                options |= {"transform_input": True, "init_weights": False}
        if not fetches_weights():
            options["weights"] = None
        mean, std = self.mean, self.std
        transforms = valid[weights or "DEFAULT"].transforms()
        if weights is not None or (mean is None and std is None):
            mean, std = transforms.mean, transforms.std
        model = zoo.get_model(name, **options)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return self.split(model, linears[-1] if linears else None, mean=mean, std=std)


@dataclass(frozen=True, kw_only=True)
class timm(ExternalBackbone):
    """A classifier of timm (the extra ``advbench[zoo]``).

    Models of a fixed image size are built for this one.
    """

    library = "timm"
    pretrained: bool = False
    """Weights are downloaded, and images are normalised as in their training, whatever ``mean`` and
    ``std`` are. False starts at random, with mean and std, or where these are None with the
    normalisation that timm gives for the model."""

    def build(self) -> External:
        try:
            import timm as library
        except ImportError as error:
            raise UserError("timm is not installed: pip install 'advbench[zoo]'") from error
        name, mean, std = self.name, self.mean, self.std
        names = {*library.list_models(), *library.list_pretrained()}
        if name not in names:
            # Only the near ones: there are thousands.
            hint = did_you_mean(name, difflib.get_close_matches(name, names))
            raise UserError(f"timm has no model '{name}'{hint or '; see timm.list_models()'}")
        if self.pretrained and not library.is_model_pretrained(name):
            raise UserError(f"timm has no weights for '{name}'; set backbone.pretrained=false")
        config = library.get_pretrained_cfg(name)
        if config is not None and (self.pretrained or (mean is None and std is None)):
            mean, std = list(config.mean), list(config.std)
        options: dict[str, Any] = {}
        if config is not None and config.fixed_input_size:
            options["img_size"] = tuple(self.input_shape[1:])
        with self.refusal():
            model: Any = library.create_model(
                name, pretrained=self.pretrained and fetches_weights(), **options
            )
        return self.split(model, model.get_classifier(), mean=mean, std=std)


def _three(values: Sequence[float] | None) -> list[float] | None:
    """One value per channel of three, from three or from one."""
    return None if values is None else list(values) * (3 // len(values))
