"""AW-Net: a net whose filters vary with the image (Wei, Zhao, Li, arXiv 2306.03430).

Notation: s_l the regulation signals of convolution l, (N, C_l) in (0, 2); p (N,) how adversarial an
image looks, in (0, 1), t its logit. Sizes, the signals' form and the use of p are our reading.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advbench.backbones.base import Classifier
from advbench.backbones.layers import conv, named
from advbench.config.roles import Role
from advbench.defenses.base import Defense, PartName, Step, Surrogate, Traits
from advbench.devices import in_company
from advbench.errors import UserError, did_you_mean
from advbench.surgery import replace_modules, twin

WIDTHS, STRIDES = (32, 64, 128), (1, 2, 2)  # of the router's convolutions
SWITCHES = ("soft", "hard")
FACTORS = (0.1, 1.0, 10.0)  # of log p, in the two-term attack

M = TypeVar("M", bound=nn.Module)


class Router(nn.Module):
    """Reads the images: three 3x3 convolutions with norm and ReLU, pooling, linear heads.

    The norm is of each image (group norm of one group). A step runs the clean and the adversarial
    part one after the other, and batch norm would take from each what tells it from the other: in
    trials p stayed at 1/2.

    Args:
        filters: C_l of each modulated convolution. Their heads are stacked into one matrix. All
            heads start at zero, so s = 1 and p = 1/2.
    """

    def __init__(self, channels: int, filters: Sequence[int]) -> None:
        super().__init__()
        body: dict[str, nn.Module] = {}
        for i, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True), start=1):
            layer = conv(channels, width, stride=stride)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            body |= {f"conv{i}": layer, f"norm{i}": nn.GroupNorm(1, width), f"act{i}": nn.ReLU()}
            channels = width
        self.body = named({**body, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})
        self.filters = list(filters)
        self.signals = nn.Linear(channels, sum(filters))
        self.score = nn.Linear(channels, 1)
        for head in (self.signals, self.score):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, z: Tensor) -> tuple[list[Tensor], Tensor]:
        """Normalised images (N, C, H, W) -> s_l of each convolution, (N, C_l), and t, (N,)."""
        u = self.body(z)
        # Not in bfloat16 under autocast, which knows only eight steps between 1 and 1.06.
        exact = self.score.weight.dtype
        parts = (2 * torch.sigmoid(self.signals(u).to(exact))).split(self.filters, dim=1)
        return [parts[i] for i in range(len(self.filters))], self.score(u).to(exact).flatten()


class ModulatedConv(nn.Module):
    """A convolution whose filters W[c] are s[c] W[c] for each image; the bias stays.

    Attributes:
        signal: s, (N, C), while the ``RoutedTrunk`` around it runs.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.signal: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C, H', W')."""
        assert self.signal is not None, "runs inside its RoutedTrunk alone"
        out = self.conv(z)
        s = self.signal.to(out.dtype)[:, :, None, None]
        if self.conv.bias is None:
            return out * s
        return out * s + self.conv.bias.to(out.dtype)[:, None, None] * (1 - s)


class MixBN(nn.Module):
    """Two batch norms, with weights of their own (Xie & Yuille 2020, arXiv 1906.03787, sec. 4).

    In training the part of the batch says which one acts and moves its statistics: the adversarial
    one for that part, else the clean one. In evaluation: (1 - p) clean(z) + p adversarial(z).

    Attributes:
        part: which part of the batch is running.
        p: (N,), while the ``RoutedTrunk`` around it runs.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.clean = norm
        self.adversarial = copy.deepcopy(norm)
        self.part: PartName | None = None
        self.p: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if self.training:
            return self.adversarial(z) if self.part == "adversarial" else self.clean(z)
        assert self.p is not None, "runs inside its RoutedTrunk alone"
        # Both are scale and shift of z, so their mix is one: one pass over z instead of two.
        p = self.p[:, None]
        clean, adversarial = _scale_and_shift(self.clean), _scale_and_shift(self.adversarial)
        scale, shift = (
            ((1 - p) * a + p * b)[:, :, None, None] for a, b in zip(clean, adversarial, strict=True)
        )
        return torch.addcmul(shift, z.to(scale.dtype), scale).to(z.dtype)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does in evaluation, as z * scale + shift; each (C,)."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
        return scale, norm.bias - norm.running_mean * scale
    return scale, -norm.running_mean * scale


class RoutedTrunk(nn.Module):
    """Runs the router, hands its signals to the modulated modules of the trunk, runs the trunk.

    Args:
        switch: soft mixes the batch norms by p; hard takes the adversarial ones where p > 1/2, and
            in the backward pass p still (straight-through).

    Attributes:
        fixed_p: the p of every image, in place of the router's.
        needs_clean_input: a batch is the clean images and then as many attacked ones; the router
            reads first half and is a constant, the trunk runs on the second.
        part: of the batch that is running; its t is kept, with its graph, until it is taken.
    """

    def __init__(self, router: Router, trunk: nn.Module, switch: str = "soft") -> None:
        super().__init__()
        self.router = router
        self.trunk = trunk
        self.switch = switch
        self.fixed_p: float | None = None
        self.needs_clean_input = False
        self.part: PartName | None = None
        self.kept: dict[PartName, Tensor] = {}

    def forward(self, z: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> features (N, D); (2N, C, H, W) for a paired
        batch."""
        if self.needs_clean_input:
            clean, z = z.chunk(2)
            signals, t = self.router(clean)
            # Not by no_grad, which torch.fx would forget.
            signals, t = [s.detach() for s in signals], t.detach()
        else:
            signals, t = self.router(z)
        if self.part is not None:
            self.kept[self.part] = t
        p = self._p(t)
        convs, norms = _inside(self.trunk, ModulatedConv), _inside(self.trunk, MixBN)
        try:
            for module, s in zip(convs, signals, strict=True):
                module.signal = s
            for module in norms:
                module.p = p
            return self.trunk(z)
        finally:
            for module in convs:
                module.signal = None
            for module in norms:
                module.p = None

    def _p(self, t: Tensor) -> Tensor:
        if self.fixed_p is not None:
            return torch.full_like(t, self.fixed_p)
        p = torch.sigmoid(t)
        if self.switch == "soft":
            return p
        return (p > 0.5).to(p.dtype) + (p - p.detach())

    def enter(self, part: PartName | None) -> None:
        """The next passes are of that part of a training batch, or of none."""
        self.part = part
        for norm in _inside(self.trunk, MixBN):
            norm.part = part

    def take(self) -> dict[PartName, Tensor]:
        """t of each part that ran since the last call, (N,), with its graph."""
        values, self.kept = self.kept, {}
        return values

    def extra_repr(self) -> str:
        return f"switch={self.switch}"


class FrozenRouter(nn.Module):
    """A model whose signals and p are those of the clean images, constants to the attacker."""

    def __init__(self, model: nn.Module) -> None:
        """model: a twin, which stays changed."""
        super().__init__()
        self.model = model
        self.train(model.training)
        _routed(model).needs_clean_input = True

    def forward(self, x: Tensor, clean: Tensor) -> Tensor:
        """x, clean: (N, C, H, W) -> logits (N, K)."""
        return self.model(torch.cat([clean, x]))


class RouterBonus(nn.Module):
    """A model, and ``factor`` log p beside its logits."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        """model: a twin, which stays changed.  factor: above 0 makes images look adversarial."""
        super().__init__()
        self.model = model
        self.factor = factor
        self.train(model.training)
        _routed(model).enter("adversarial")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, C, H, W) -> logits (N, K) and the auxiliary loss (N,)."""
        logits = self.model(x)
        t = _routed(self.model).take()["adversarial"]
        return logits, self.factor * F.logsigmoid(t)


@dataclass(frozen=True)
class AWNet(Defense):
    """A ``RoutedTrunk`` in the place of the trunk.

    Modulated is every 3x3 convolution but the trunk's first layer, and every batch norm. It wants
    to see a clean part. Where the recipe does not train on it, the defense does, by cross-entropy.
    An adversarial part has to come from the recipe: without one, p and the adversarial batch norms
    do not learn what they are for.

    Raises:
        UserError: for values out of range.
    """

    switch: str = field(default="soft", metadata={"role": Role.OUTCOME | Role.EVALUATION})
    """``soft`` or ``hard``, see ``RoutedTrunk``."""
    router_weight: float = 0.1
    """Weight of the binary cross-entropy of p over all rows of all parts, at least 0."""

    def __post_init__(self) -> None:
        if self.switch not in SWITCHES:
            hint = did_you_mean(self.switch, SWITCHES)
            raise UserError(f"defense.switch={self.switch} is not soft or hard{hint}")
        if not 0 <= self.router_weight < math.inf:
            raise UserError(
                f"defense.router_weight={self.router_weight:g} is not a number from 0 on"
            )

    def traits(self, model: nn.Module) -> Traits:
        return Traits(gradient="exact" if self.switch == "soft" else "straight_through")

    def apply(self, model: Classifier) -> Classifier:
        """The first layer is the first convolution in the order of registration.

        Raises:
            UserError: for a trunk without such convolutions or without batch norm, with a batch
                norm that has no running statistics or does more than normalise, and a second time.
        """
        trunk = model.trunk
        if _inside(model, RoutedTrunk):
            raise UserError("this model is an AW-Net already: take defense=awnet once")
        layers, norms = _inside(trunk, nn.Conv2d), _inside(trunk, nn.BatchNorm2d)
        filters = [layer.out_channels for layer in layers[1:] if _is_3x3(layer)]
        if not filters or not norms:
            raise UserError(
                "AW-Net modulates 3x3 convolutions behind the first layer and batch norms, and "
                "this backbone lacks one or the other: take backbone=convnet, resnet18, "
                "preact_resnet18, wrn_28_10, mobilenet_v2 or another that has both"
            )
        for norm in norms:
            _check(norm)
        stem = layers[0]
        like = stem.weight

        def modulated(old: nn.Module, _: str) -> nn.Module:
            assert isinstance(old, nn.Conv2d)
            return ModulatedConv(old) if old is not stem and _is_3x3(old) else old

        def mixed(old: nn.Module, _: str) -> nn.Module:
            assert isinstance(old, nn.BatchNorm2d)
            return MixBN(old)

        replace_modules(trunk, nn.Conv2d, modulated)
        replace_modules(trunk, nn.BatchNorm2d, mixed)
        router = Router(stem.in_channels, filters).to(like.device, like.dtype)
        model.trunk = RoutedTrunk(router, trunk, self.switch).train(trunk.training)
        return model

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("clean",)

    def before_part(self, model: Any, part: PartName) -> None:
        _routed(model).enter(part)

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        """The router's term, and cross-entropy on a clean part that the recipe does not see.

        Raises:
            UserError: on several devices if there is no adversarial part.
        """
        routed = _routed(model)
        routed.enter(None)
        t = routed.take()
        # DDP waits for the gradient of every parameter.
        if "adversarial" not in t and in_company():
            raise UserError(
                "AW-Net's adversarial batch norms get no gradient from a recipe without an "
                "adversarial part, which several devices do not allow: give trainer.devices=1, or "
                "recipe=trades"
            )
        rows = torch.cat([t[name] for name in step.parts])
        adversarial = torch.cat(
            [torch.full_like(t[name], name == "adversarial") for name in step.parts]
        )
        router = F.binary_cross_entropy_with_logits(rows, adversarial)
        terms = {"router": self.router_weight * router}
        if "clean" in step.borrowed:
            assert step.clean is not None
            terms["ce_clean"] = F.cross_entropy(step.clean.logits, step.labels)
        return terms

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        """The two terms of ``router+c`` and ``router-c`` are CE and plus or minus c log p."""
        surrogates = {
            "frozen_router": Surrogate(
                FrozenRouter(twin(model)),
                exact=False,
                loss="ce",
                why="the router stays at the clean image: no gradient goes through it",
                needs_clean_input=True,
            )
        }
        for p, norms in ((0.0, "clean"), (1.0, "adversarial")):
            fixed = twin(model)
            _routed(fixed).fixed_p = p
            why = f"p = {p:g}: the {norms} batch norms alone"
            surrogates[f"p{p:g}"] = Surrogate(fixed, exact=False, loss="ce", why=why)
        if self.switch == "hard":
            soft = twin(model)
            _routed(soft).switch = "soft"
            why = "mixes the batch norms by p: its gradient is that of its values"
            surrogates["soft"] = Surrogate(soft, exact=False, loss="ce", why=why)
        for factor in FACTORS:
            for sign, looks in (("+", "adversarial"), ("-", "clean")):
                surrogates[f"router{sign}{factor:g}"] = Surrogate(
                    RouterBonus(twin(model), float(f"{sign}{factor}")),
                    exact=True,
                    loss="ce",
                    why=f"fools the router too: x' is to look {looks} (CE {sign} {factor:g} log p)",
                    auxiliary_loss=True,
                )
        return surrogates


def _is_3x3(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (3, 3)


def _check(norm: nn.BatchNorm2d) -> None:
    """Raises UserError for a batch norm that ``MixBN`` can't stand in for."""
    if type(norm).forward is not nn.BatchNorm2d.forward:
        raise UserError(
            f"AW-Net doubles plain batch norms, and a {type(norm).__name__} does more: take "
            "another backbone, such as backbone=resnet18"
        )
    if norm.running_mean is None:
        raise UserError(
            "AW-Net mixes running statistics, and this backbone's batch norms keep none: take "
            "another, such as backbone=resnet18"
        )


def _inside(model: nn.Module, kind: type[M]) -> list[M]:
    """In the order of registration."""
    return [module for module in model.modules() if isinstance(module, kind)]


def _routed(model: nn.Module) -> RoutedTrunk:
    (routed,) = _inside(model, RoutedTrunk)
    return routed
