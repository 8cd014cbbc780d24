"""Sparta: activations with a learned spatial gate (Guo et al., arXiv 2105.08269)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.config.roles import Role
from advbench.defenses.base import Defense, Surrogate
from advbench.errors import UserError, did_you_mean
from advbench.surgery import check_sites, input_shapes, probe_images, replace_modules, twin

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)
SHARES = ("site", "stage", "net")
FORMS = ("gate", "relu")


class Phi(nn.Module):
    """A depthwise k x k convolution with bias, padded with zeros so that the size stays.

    With C = 1 one kernel serves all channels of any map.

    Args:
        channels: C.
        kernel: k, odd.
        beta: the centre tap at the start; the rest is zero, so that phi(z) = beta z.

    Attributes:
        weight: (C, 1, k, k).
        bias: (C,).
    """

    def __init__(self, channels: int, kernel: int, beta: float) -> None:
        super().__init__()
        weight = torch.zeros(channels, 1, kernel, kernel)
        weight[:, :, kernel // 2, kernel // 2] = beta
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.padding = kernel // 2

    def forward(self, z: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        channels = z.shape[1]
        weight = self.weight.expand(channels, -1, -1, -1)
        bias = self.bias.expand(channels)
        return F.conv2d(z, weight, bias, padding=self.padding, groups=channels)


class Site(nn.Module):
    """What stands in the place of one activation. Several sites may hold the same phi.

    Args:
        vector: it is called with (N, D), a map of one pixel, where only the centre tap counts.
    """

    def __init__(self, phi: Phi, *, vector: bool) -> None:
        super().__init__()
        self.phi = phi
        self.vector = vector

    def filtered(self, z: Tensor) -> Tensor:
        """phi(z), of z's shape: (N, C, H, W), or (N, D) if ``vector``."""
        return self.phi(z[:, :, None, None]).flatten(1) if self.vector else self.phi(z)

    def extra_repr(self) -> str:
        return f"vector={self.vector}"


class SpatialGate(Site):
    """z * sigmoid(phi(z)). A 1x1 phi of weight b and bias 0 is Swish, z * sigmoid(b z).

    Attributes:
        keeping: the next pass keeps its gates, without gradients.
        kept: gates that later passes use instead of their own, or None.
    """

    def __init__(self, phi: Phi, *, vector: bool) -> None:
        super().__init__(phi, vector=vector)
        self.keeping = False
        self.kept: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.kept is not None:
            return z * self.kept
        gate = torch.sigmoid(self.filtered(z))
        if self.keeping:
            self.kept = gate.detach()
        return z * gate


class FilteredReLU(Site):
    """relu(phi(z)): as many parameters as a ``SpatialGate``, and no gate."""

    def __init__(self, phi: Phi, *, vector: bool) -> None:
        super().__init__(phi, vector=vector)
        self.act = nn.ReLU()

    def forward(self, z: Tensor) -> Tensor:
        return self.act(self.filtered(z))


class AnchoredGates(nn.Module):
    """A model whose gates stay as they are at the clean images, constants to the attacker.

    Args:
        model: of its own modules; between two calls its gates are its own again.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, clean: Tensor) -> Tensor:
        """x, clean: (N, C, H, W) -> logits (N, K)."""
        gates = [module for module in self.model.modules() if isinstance(module, SpatialGate)]
        try:
            for gate in gates:
                gate.keeping = True
            with torch.no_grad():
                self.model(clean)
            return self.model(x)
        finally:
            for gate in gates:
                gate.keeping, gate.kept = False, None


@dataclass(frozen=True)
class Sparta(Defense):
    """A ``SpatialGate`` in the place of every ReLU, ReLU6 and SiLU.

    The form z * sigmoid(phi(z)) with a depthwise phi is our reading of the paper.

    Raises:
        UserError: for values out of range.
    """

    share: str = "site"
    """Who has a phi of its own: each ``site``; each ``stage``, that is, each number of channels; or
    the ``net``, with one kernel for all channels, which any other net can take."""
    kernel: int = 3
    """k, odd. A phi that serves vectors alone, unless it is the net's, is 1x1."""
    beta: float = 1.0
    """The centre tap at the start, above 0: 1 starts as SiLU; a large one is at most 0.2785 / beta
    away from ReLU."""
    form: str = "gate"
    """``gate``; or ``relu``, the control with as many parameters, a ``FilteredReLU``."""
    weights: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_FILE})
    """The run whose phi ``adopt`` takes; the caller reads it."""
    freeze: bool = False
    """phi is not trained."""

    def __post_init__(self) -> None:
        for name, value, allowed in (("share", self.share, SHARES), ("form", self.form, FORMS)):
            if value not in allowed:
                raise UserError(f"no defense.{name} '{value}'{did_you_mean(value, allowed)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"defense.kernel={self.kernel} is not 1, 3, 5 or another odd number")
        if not 0 < self.beta < math.inf:
            raise UserError(f"defense.beta={self.beta:g} is not a number above 0")

    def apply(self, model: Classifier) -> Classifier:
        """Replaces the activations; the widths of the sites are those of one probe batch.

        Raises:
            UserError: for a model without them, where the forward pass does not call each of them
                exactly once, and for activations of other than (N, C, H, W) maps and (N, D)
                vectors.
        """
        device = next(model.parameters()).device
        x = probe_images(model.input_shape).to(device)
        check_sites(model, ACTIVATIONS, x)
        shapes = input_shapes(model, ACTIVATIONS, x)
        for name, module in model.named_modules():
            if name and isinstance(module, ACTIVATIONS):
                if name not in shapes:
                    raise UserError(
                        f"the forward pass does not call '{name}', so its width is not known: "
                        "remove it from the model"
                    )
                if len(shapes[name]) not in (2, 4):
                    raise UserError(
                        f"Sparta takes (N, C, H, W) maps and (N, D) vectors, and '{name}' gets "
                        f"{tuple(shapes[name])}: choose a convolutional backbone"
                    )
        groups = {name: self._group(name, shape[1]) for name, shape in shapes.items()}
        spatial = {groups[name] for name, shape in shapes.items() if len(shape) == 4}
        phis: dict[Hashable, Phi] = {}

        def make(old: nn.Module, name: str) -> nn.Module:
            group, shape = groups[name], shapes[name]
            if group not in phis:
                net = self.share == "net"
                kernel = self.kernel if net or group in spatial else 1
                phis[group] = Phi(1 if net else shape[1], kernel, self.beta).to(device)
                phis[group].requires_grad_(not self.freeze)
            kind = SpatialGate if self.form == "gate" else FilteredReLU
            return kind(phis[group], vector=len(shape) == 2)

        replace_modules(model, ACTIVATIONS, make)
        return model

    def adopt(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Takes phi, and nothing else, from the weights of another Sparta run.

        share=net takes it from any net, share=stage from a net that has every width of this one,
        share=site from a net of the same structure.

        Raises:
            UserError: for weights without phi, or with another sharing, width, site or kernel.
        """
        run = f"defense.weights={self.weights}"
        sources: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
        for key, weight in weights.items():
            name = key.removesuffix(".phi.weight")
            bias = weights.get(f"{name}.phi.bias")
            if name != key and bias is not None:
                sources.setdefault(self._group(name, len(bias)), []).append((weight, bias))
        if not sources:
            raise UserError(f"{run} has no phi: name a run of defense=sparta")
        shared = all(
            torch.equal(*pair)
            for same in sources.values()
            for other in same
            for pair in zip(same[0], other, strict=True)
        )
        one_for_all = all(len(bias) == 1 for same in sources.values() for _, bias in same)
        if not shared or one_for_all != (self.share == "net"):
            raise UserError(
                f"{run} was not trained with defense.share={self.share}: give the share of that run"
            )
        targets = {
            self._group(name, len(site.phi.bias)): site.phi
            for name, site in model.named_modules()
            if isinstance(site, Site)
        }
        if missing := [str(group) for group in targets if group not in sources]:
            problem, cure = {
                "site": ("at", "take a run of the same backbone"),
                "stage": ("of width", "take a backbone of those widths, or share=net in both"),
            }[self.share]
            raise UserError(
                f"{run} has no phi {problem} {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}: {cure}"
            )
        for group, phi in targets.items():
            weight, _ = sources[group][0]
            if weight.shape != phi.weight.shape:
                raise UserError(
                    f"phi is {_size(weight)} in {run} and {_size(phi.weight)} here"
                    f"{'' if group is None else f' ({self.share} {group})'}: "
                    "give the backbone and the defense.kernel of that run"
                )
        with torch.no_grad():
            for group, phi in targets.items():
                for parameter, value in zip((phi.weight, phi.bias), sources[group][0], strict=True):
                    parameter.copy_(value)

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        if self.form == "relu":
            return {}
        why = "no gradient through the gates: they stay as they are at the clean image"
        detached = AnchoredGates(twin(model)).eval()
        return {
            "gate_detached": Surrogate(
                detached, exact=False, loss="ce", why=why, needs_clean_input=True
            )
        }

    def _group(self, name: str, width: int) -> Hashable:
        """Sites of the same group share a phi."""
        return {"site": name, "stage": width, "net": None}[self.share]


def _size(weight: Tensor) -> str:
    return "x".join(map(str, (*weight.shape[2:], weight.shape[0])))
