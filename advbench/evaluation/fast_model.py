"""The fast model: a copy that computes the same function in less time, for the search only.

A search queries the model millions of times, and the referee checks its results on the real model.
So the copy may round differently: channels last, batch normalisation folded into the convolutions,
fused operators on a CPU, and bfloat16 with ``trainer.precision=bf16``.
"""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from advbench.attacks import losses
from advbench.attacks.base import Clean
from advbench.defenses.base import Surrogate
from advbench.devices import kept, out_of_memory
from advbench.errors import UserError, did_you_mean
from advbench.evaluation.checks import are_shares
from advbench.evaluation.cpu_kernels import packed

BLUR = 0.05  # of a margin, in the median
TINY = torch.finfo(torch.float32).tiny
PRECISIONS = {"32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Modules of which autocast casts all parameters, whatever they are in."""


@dataclass(frozen=True)
class FastModelOptions:
    """How a search runs its copy of the model. Raises UserError for an unknown value."""

    precision: str = "32"
    """32; or bf16, or on a GPU tf32, in which every success is still confirmed in float32."""
    compile: str | None = None
    """None, or a mode of ``torch.compile`` such as "default" or "reduce-overhead", which takes a
    minute and needs a model that it understands."""
    graphs: bool = False
    """On a GPU, record the copy's passes as CUDA graphs (``advbench.evaluation.graphs``)."""

    @property
    def fixed_shapes(self) -> bool:
        """Whether each further shape of a batch costs seconds at its first pass."""
        return self.graphs or self.compile is not None

    def to_json(self) -> dict[str, Any]:
        """For the identity of an evaluation, as it was before there were graphs."""
        kept = asdict(self)
        if not self.graphs:
            del kept["graphs"]
        return kept

    def __post_init__(self) -> None:
        if self.graphs and self.compile is not None:
            raise UserError(
                f"trainer.graphs=true and trainer.compile={self.compile} exclude each other: the "
                "modes of torch.compile have graphs of their own"
            )
        modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
        for what, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("compile", self.compile or "default", modes),
        ):
            if value not in known:
                raise UserError(f"no trainer.{what} '{value}'{did_you_mean(value, known)}")


class FastModel(nn.Module):
    """A copy of a model for searching. Input (N, C, H, W) as the model's; logits float32."""

    def __init__(
        self,
        model: nn.Module,
        options: FastModelOptions,
        device: torch.device,
        layout: torch.memory_format,
    ) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.device_type = device.type
        self.precision = options.precision
        self.dtype = PRECISIONS[options.precision]
        self.call = (
            torch.compile(model, dynamic=False, mode=options.compile) if options.compile else model
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            return self.call(x).float()


def fast_copy(
    model: nn.Module, options: FastModelOptions, clean: Clean, stochastic: bool = False
) -> nn.Module:
    """A fast copy of ``model``, which must be in evaluation mode.

    clean: a few images, on which the copy's logits and gradients are held against the model's; a
    copy that differs by more than rounding is not used. What comes back shares no state with it.
    stochastic: the model's noise can't be compared, so the copy keeps the model's own steps.
    Returns the model itself where no copy will do.
    """
    try:
        plain = copy.deepcopy(model).requires_grad_(False)
    except Exception:  # somebody's module that can't be copied
        return model
    candidates = [plain]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    free = not stochastic and not hooked  # to take other steps than the model's own
    if free:
        # Tracing forgets grad modes and state, and fails on control flow: hence the comparison.
        with suppress(Exception), redirect_stderr(io.StringIO()):
            candidates.insert(0, _reshaped(fuse(plain)).requires_grad_(False))
    # Some models take views of activations that channels last does not allow.
    for layout in (torch.channels_last, torch.contiguous_format):
        for candidate in candidates:
            laid = candidate.to(memory_format=layout)
            few = clean.x.contiguous(memory_format=layout)
            quicker = _packed(laid, few) if free and options == FastModelOptions() else []
            for copied in (*quicker, laid):
                traced = copied is not laid and isinstance(copied, fx.GraphModule)
                order = torch.contiguous_format if traced else layout  # packed: see cpu_kernels
                # Compared in float32: bf16 differs by more than a wrong fold would.
                exact = FastModel(copied, FastModelOptions(), clean.x.device, order)
                if not _agree(model, exact, clean, stochastic):
                    continue
                if options.precision == "bf16" and not stochastic:
                    copied = _narrowed(copied, clean, order)
                fast = FastModel(copied, options, clean.x.device, order)
                if options.precision != "32" and not stochastic and _blurred(model, fast, clean):
                    slow = replace(options, precision="32")
                    fast = FastModel(exact.model, slow, clean.x.device, order)
                return fast.eval()
    return model


def copy_of_surrogate(
    surrogate: Surrogate, output: str, options: FastModelOptions, few: Clean
) -> nn.Module:
    """The fast copy of a victim; the victim itself if it takes more than x.

    Args:
        surrogate: the victim.
        output: what the real model returns, ``logits`` or ``probabilities``.
        options: precision and compilation.
        few: images on which the copy is compared with the victim.
    """
    if surrogate.needs_clean_input or surrogate.auxiliary_loss:
        return surrogate.model
    model = surrogate.model
    if output == "probabilities" and not surrogate.transfer:
        with torch.no_grad():  # what shares the model's weights may end before its softmax
            shares = are_shares(model(few.x))
        model = LogProbabilities(model).eval() if shares else model
    return fast_copy(model, options, few, surrogate.stochastic)


class Logits(nn.Module):
    """The logits alone of a victim that takes clean images or returns an auxiliary loss, too."""

    def __init__(self, victim: nn.Module, needs_clean_input: bool) -> None:
        super().__init__()
        self.victim, self.needs_clean_input = victim, needs_clean_input

    def forward(self, x: Tensor) -> Tensor:
        answer = self.victim(x, x.detach()) if self.needs_clean_input else self.victim(x)
        return answer[0] if isinstance(answer, tuple) else answer


class LogProbabilities(nn.Module):
    """Logits of a model that returns probabilities: near 0 and 1 those have no gradient left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).float().clamp_min(TINY).log()


def _reshaped(model: nn.Module) -> nn.Module:
    """The traced model with ``reshape`` for ``view``, which channels last does not allow."""
    assert isinstance(model, fx.GraphModule)
    for node in model.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"
    model.recompile()
    return model


def _packed(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The model with fused operators, where PyTorch has them."""
    if x.device.type == "cpu":
        # Another build of PyTorch has other operators; it prints where a trace can't run.
        with suppress(Exception), redirect_stderr(io.StringIO()):
            return [packed(model, x)]
    return []


def _agree(model: nn.Module, fast: nn.Module, clean: Clean, stochastic: bool) -> bool:
    """Whether two models agree up to rounding, on clean and on noisy images."""
    noise = torch.rand(clean.x.shape, generator=torch.Generator().manual_seed(0))
    noisy = clean._replace(x=(clean.x + 0.2 * noise.to(clean.x) - 0.1).clamp(0, 1))
    for part in (clean, noisy):
        try:
            logits, gradient = ask(model, part)
            with redirect_stderr(io.StringIO()):  # PyTorch prints where a trace can't run
                logits_fast, gradient_fast = ask(fast, part)
                with torch.no_grad():
                    alone = fast(part.x).float()
        except Exception as problem:
            if out_of_memory(problem):
                raise
            return False
        if stochastic:
            return logits.shape == logits_fast.shape  # there is no more to compare
        for other in (logits_fast, alone):
            if not torch.allclose(logits, other, rtol=1e-3, atol=1e-4, equal_nan=True):
                return False
        # A row whose gradient is not finite is not the copy's fault. One row may meet a kink.
        rows = gradient.nan_to_num(0.0, 0.0, 0.0).flatten(1)
        gap = (gradient_fast - gradient).nan_to_num(0.0, 0.0, 0.0).flatten(1)
        if (
            gap.norm() > 0.01 * rows.norm() + 1e-12
            or (gap.norm(dim=1) > 0.1 * rows.norm(dim=1) + 0.001 * rows.norm()).any()
        ):
            return False
    return True


def _narrowed(model: nn.Module, clean: Clean, layout: torch.memory_format) -> nn.Module:
    """The model with bfloat16 weights where autocast would cast them at every pass.

    Returns the model itself where that would change a bit, as in a module that uses its weights in
    other ways too.
    """
    narrow = copy.deepcopy(model)
    for module in narrow.modules():
        if type(module) in PRODUCTS:
            module.to(torch.bfloat16)
    options = FastModelOptions("bf16")
    nets = [FastModel(net, options, clean.x.device, layout) for net in (model, narrow)]
    try:
        before, after = (ask(net, clean) for net in nets)
    except RuntimeError as problem:
        if out_of_memory(problem):
            raise
        return model
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return narrow if same else model


@torch.no_grad()
def _blurred(model: nn.Module, narrow: nn.Module, clean: Clean) -> bool:
    """Whether the margins of a narrow copy are too coarse to climb on, as where all logits share a
    large offset.
    """
    true, seen = (losses.margin(net(clean.x).float(), clean.y) for net in (model, narrow))
    return bool((seen - true).abs().median() > BLUR * true.abs().median())


def ask(model: nn.Module, clean: Clean) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and the gradient of each row's margin in its image, (N, C, H, W)."""
    with torch.enable_grad():
        x = clean.x.detach().clone().requires_grad_()
        logits = kept(model(x))
        if not logits.requires_grad:
            return logits, torch.zeros_like(x)
        gradient = torch.autograd.grad(losses.margin(logits.float(), clean.y).sum(), x)[0]
    return logits.detach().float(), kept(gradient)
