"""The activations that a backbone can be built with, by name."""

from __future__ import annotations

from torch import nn

from advbench.errors import UserError, did_you_mean

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
}
"""A name in a config -> a module class without required arguments and without parameters."""


def activation_class(name: str) -> type[nn.Module]:
    """The class to build anew at every site, never in place: hooks and skips see clean inputs.

    Raises:
        UserError: for an unknown ``name``.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation '{name}'{did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
