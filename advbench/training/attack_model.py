"""The model that the attack of a training passes through: the same function, fewer operations."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from advbench.recipes.base import frozen
from advbench.training.syncnorm import SyncedBatchNorm2d


class _Pair(NamedTuple):
    """A convolution, the batch norm after it, and the convolution that is both."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    both: nn.Conv2d


class AttackModel(nn.Module):
    """A model whose passes in evaluation mode have batch norm folded into the convolutions.

    It shares the model's modules, and its weights once ``refresh`` was called: w gamma / sigma and
    beta + (b - mu) gamma / sigma are made once for a step, whose attack passes through them many
    times. Passes in training mode, and all other attributes, are the model's own.

    Args:
        model: a traced backbone. Other modules, such as a defense's, are called as they are.

    Raises:
        ValueError: if nothing can be folded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.folded, self._pairs = _fold(model)
        self.train(model.training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights of now."""
        for conv, norm, both in self._pairs:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.affine:
                scale = scale * norm.weight
            bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
            bias = bias * scale
            if norm.affine:
                bias = bias + norm.bias
            assert both.bias is not None
            both.bias.copy_(bias)
            torch.mul(conv.weight, scale.view(-1, 1, 1, 1), out=both.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits (N, K)."""
        return self.model(x) if self.model.training else self.folded(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def agrees(self, x: Tensor, y: Tensor) -> bool:
        """Whether logits and input gradients of both are the same up to rounding.

        Args:
            x: (N, C, H, W) in [0, 1].
            y: (N,) classes.
        """
        self.refresh()
        answers = []
        devices = [x.device] if x.device.type == "cuda" else []
        with frozen(self), torch.random.fork_rng(devices):
            for module in (self.model, self.folded):
                torch.manual_seed(0)  # for models that draw
                point = x.detach().clone().requires_grad_()
                logits = module(point)
                gradient = torch.autograd.grad(F.cross_entropy(logits, y), point)[0]
                answers.append((logits.detach(), gradient))
        return all(
            # Rounding puts some activations on the other side of a kink; a wrong fold is far off.
            (actual - expected).norm() <= 0.01 * expected.norm()
            for expected, actual in zip(*answers, strict=True)
        )


def attack_model(model: nn.Module, x: Tensor, y: Tensor) -> AttackModel | None:
    """An ``AttackModel`` that agrees with the model on a few images; None where there is none.

    Args:
        x: (N, C, H, W) in [0, 1].
        y: (N,) classes.
    """
    # Tracing fails in many ways if a model is not a plain graph; it is then attacked as it is.
    with contextlib.suppress(Exception):
        folded = AttackModel(model)
        if folded.agrees(x, y):
            return folded
    return None


class _Tracer(fx.Tracer):
    """Goes into the modules of backbones alone: those of a defense may depend on more than x."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("advbench.backbones.")
        return not (own or type(m) is nn.Sequential) or _hooked(m)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fold(model: nn.Module) -> tuple[fx.GraphModule, list[_Pair]]:
    tracer = _Tracer()
    graph = tracer.trace(model)
    traced = fx.GraphModule(model, graph)
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in list(graph.nodes):
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = (traced.get_submodule(str(n.target)) for n in (before, node))
        once = calls.count(before.target) == 1
        foldable = type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, SyncedBatchNorm2d)
        if not (foldable and once) or _hooked(conv) or _hooked(norm) or norm.running_mean is None:
            continue
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        name = f"folded_{len(pairs)}"
        pair = _Pair(conv, norm, _like(conv))
        traced.add_submodule(name, pair.both)
        pairs.append(pair)
        before.target = name
        node.replace_all_uses_with(before)
        graph.erase_node(node)
    if not pairs:
        raise ValueError("no batch norm follows a convolution")
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, pairs


def _like(conv: nn.Conv2d) -> nn.Conv2d:
    """A frozen convolution of the same form, with a bias, whose values are to come."""
    both: Any = nn.utils.skip_init(  # no weights are drawn: they are overwritten
        nn.Conv2d,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias=True,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    both.weight = nn.Parameter(torch.empty_like(conv.weight))  # of the same memory layout
    both.requires_grad_(False)
    return both
