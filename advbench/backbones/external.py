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
from typing import Any

from torch import nn
from torchvision import models as zoo

from advbench.backbones.activations import ACTIVATIONS
from advbench.backbones.base import Classifier
from advbench.errors import UserError, did_you_mean
from advbench.surgery import probe_images, split_sites

SITES = (*ACTIVATIONS.values(), nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU)
"""What counts as an activation in these models, each call of which gets a module of its own."""

AUXILIARY = ("googlenet", "inception_v3")
"""torchvision models that return extra logits in training unless told otherwise."""


_FETCHES = ContextVar("fetches", default=True)


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


def torchvision(
    *,
    name: str,
    num_classes: int,
    input_shape: list[int],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    weights: str | None = None,
) -> Classifier:
    """A classifier of ``torchvision.models``.

    weights: such as DEFAULT or IMAGENET1K_V2; they are downloaded, and normalise images as in
    their training, whatever ``mean`` and ``std`` say. None starts at random, with mean and std, or
    where these are None with the normalisation of the default weights.
    input_shape: (C, H, W), C = 3, or 1: gray images are repeated into three channels.
    A head with another number of classes than the weights' starts at random.
    Raises UserError for an unknown name or unknown weights, images that the model can't take, and
    models without a last linear layer or whose activations can't be split.
    """
    names = zoo.list_models(module=zoo)
    if name not in names:
        raise UserError(f"torchvision has no classifier '{name}'{did_you_mean(name, names)}")
    known = zoo.get_model_weights(name).__members__
    if weights is not None and weights not in known:
        raise UserError(f"{name} has no weights '{weights}'{did_you_mean(weights, known)}")
    options: dict[str, Any] = {"weights": weights and known[weights]}
    if name in AUXILIARY:
        options["aux_logits"] = False
        if weights is None:
            options["init_weights"] = True
        elif not fetches_weights():
            options |= {"transform_input": True, "init_weights": False}
    if not fetches_weights():
        options["weights"] = None
    transforms = known[weights or "DEFAULT"].transforms()
    if weights is not None or (mean is None and std is None):
        mean, std = transforms.mean, transforms.std
    model = zoo.get_model(name, **options)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return as_classifier(
        f"torchvision's {name}",
        model,
        linears[-1] if linears else None,
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
    )


def timm(
    *,
    name: str,
    num_classes: int,
    input_shape: list[int],
    mean: list[float] | None = None,
    std: list[float] | None = None,
    pretrained: bool = False,
) -> Classifier:
    """A classifier of timm (the extra ``advbench[zoo]``).

    pretrained: weights are downloaded, and normalise images as in their training, whatever
    ``mean`` and ``std`` say. False starts at random, with mean and std, or where these are None
    with the normalisation that timm gives for the model.
    input_shape: (C, H, W), C = 3, or 1: gray images are repeated into three channels. Models of
    a fixed image size are built for this one.
    A head with another number of classes than the weights' starts at random.
    Raises UserError without timm, for an unknown name or a name without weights, images that the
    model can't take, and models without a last linear layer or whose activations can't be split.
    """
    try:
        import timm as library
    except ImportError as error:
        raise UserError("timm is not installed: pip install 'advbench[zoo]'") from error
    names = {*library.list_models(), *library.list_pretrained()}
    if name not in names:
        # Only the near ones: there are thousands.
        hint = did_you_mean(name, difflib.get_close_matches(name, names))
        raise UserError(f"timm has no model '{name}'{hint or '; see timm.list_models()'}")
    if pretrained and not library.is_model_pretrained(name):
        raise UserError(f"timm has no weights for '{name}'; say backbone.pretrained=false")
    config = library.get_pretrained_cfg(name)
    if config is not None and (pretrained or (mean is None and std is None)):
        mean, std = list(config.mean), list(config.std)
    options: dict[str, Any] = {}
    if config is not None and config.fixed_input_size:
        options["img_size"] = tuple(input_shape[1:])
    title = f"timm's {name}"
    with _refusal(title, input_shape):
        model: Any = library.create_model(
            name, pretrained=pretrained and fetches_weights(), **options
        )
    return as_classifier(
        title,
        model,
        model.get_classifier(),
        num_classes=num_classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
    )


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


def as_classifier(
    title: str,
    model: nn.Module,
    last: Any,
    *,
    num_classes: int,
    input_shape: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> External:
    """Takes the layer ``last`` out of the model, splits the activations and tries the result."""
    if input_shape[0] not in (1, 3):
        raise UserError(f"{title} takes images of 1 or 3 channels, these have {input_shape[0]}")
    if not isinstance(last, nn.Linear):
        raise UserError(f"{title} does not end in one linear layer, and so has no features")
    path = next(name for name, module in model.named_modules() if module is last)
    model.set_submodule(path, nn.Identity())
    if last.out_features != num_classes:
        last = nn.Linear(last.in_features, num_classes)
    classifier = External(model, head=last, input_shape=input_shape, mean=mean, std=std)
    x = probe_images(input_shape)
    with _refusal(title, input_shape):
        split_sites(classifier, SITES, x)
    return classifier


@contextmanager
def _refusal(title: str, input_shape: Sequence[int]) -> Iterator[None]:
    """Turns what a model says of images that it does not suit into a UserError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        shape = "x".join(map(str, input_shape))
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{title} fails on images of {shape}: {reason}") from error


def _three(values: Sequence[float] | None) -> list[float] | None:
    """One value per channel of three, from three or from one."""
    return None if values is None else list(values) * (3 // len(values))
