"""Models as people have them: what each needs, and what an evaluation is to do with it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def plain() -> nn.Module:
    """A small net for images (N, 1, 8, 8) and three classes, the same each time."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    return net.eval()


class Around(nn.Module):
    """The plain net with something before and after it."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], object] = lambda z: z,
    ) -> None:
        super().__init__()
        self.net = plain()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> object:
        return self.after(self.net(self.before(x)))


class WithoutReturn(Around):
    def train(self, mode: bool = True):  # pyright: ignore
        super().train(mode)


class StaysTraining(Around):
    def train(self, mode: bool = True):
        super().train(mode)
        next(m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)).train()
        return self


class Casts(Around):
    """Works in half precision, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net.half()

    def forward(self, x: Tensor) -> object:
        return self.net(x.half())


class Masked(Around):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))


class Memory(Around):
    """Looks at its batch where that is larger than some rows."""

    def forward(self, x: Tensor) -> object:
        logits = self.net(x)
        return logits if len(x) <= 16 else logits - logits.mean(0)


class Reentrant(Around):
    def forward(self, x: Tensor) -> object:
        return checkpoint(self.net, x, use_reentrant=True)


def lazy() -> nn.Module:
    net = plain()
    lazy_net = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    ).eval()
    with torch.no_grad():
        lazy_net(torch.zeros(2, 1, 8, 8))
    lazy_net.load_state_dict(net.state_dict())
    return lazy_net


def exported() -> nn.Module:
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = {"input": {0: batch}}
    return torch.export.export(plain(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=shapes).module()


def on_grid(x: Tensor) -> bool:
    return bool(torch.allclose(x * 16, (x * 16).round()))


def noisy(z: Tensor) -> Tensor:
    return z + 0.3 * torch.randn_like(z)


AS_PLAIN: dict[str, tuple[Callable[[], Any], str]] = {
    "tuple": (lambda: Around(after=lambda z: (z, torch.zeros(len(z), 7))), "returns tuple"),
    "list": (lambda: Around(after=lambda z: [z]), "returns list"),
    "dict": (lambda: Around(after=lambda z: {"loss": z.sum(), "logits": z}), "returns dict"),
    "object": (lambda: Around(after=lambda z: SimpleNamespace(logits=z)), "SimpleNamespace"),
    "half": (lambda: plain().half(), "float16"),
    "bfloat16": (lambda: plain().bfloat16(), "bfloat16"),
    "casts": (Casts, ""),
    "double": (lambda: plain().double(), "float64"),
    "clamp_": (lambda: Around(lambda x: x.clamp_(0.1, 0.9).clamp_(0, 1)), "works on a copy"),
    "relu inplace": (lambda: Around(nn.ReLU(inplace=True)), "works on a copy"),
    "sub_": (
        lambda: Around(lambda x: x.sub_(0.0).mul_(1.0).add_(0.5).sub_(0.5)),
        "works on a copy",
    ),
    "data parallel": (lambda: nn.DataParallel(plain()), "inside DataParallel"),
    "script": (lambda: torch.jit.script(plain()), ""),
    "trace": (lambda: torch.jit.trace(plain(), torch.rand(2, 1, 8, 8)), ""),
    "exported": (exported, ""),
    "lazy": (lazy, ""),
    "train returns None": (WithoutReturn, ""),
    "mask of -inf": (Masked, ""),
    "offset": (lambda: Around(after=lambda z: z + 1e3), ""),
    "float64 inside": (lambda: Around(after=lambda z: z.double()), ""),
    "channels last": (lambda: plain().to(memory_format=torch.channels_last), ""),  # pyright: ignore
}
"""Models that are the plain one, and what a notice says of each."""

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two candidates": (lambda: Around(after=lambda z: (z, 2 * z)), "several tensors"),
    "stays in training mode": (StaysTraining, "'net.1' stays in training mode"),
    "no_grad": (lambda: Around(lambda x: x.detach()), "traits.gradient=none"),
    "uint8": (lambda: Around(lambda x: (x * 255).byte().float() / 255), "traits.gradient=none"),
    "numpy": (
        lambda: Around(lambda x: torch.from_numpy(x.detach().numpy().copy())),
        "traits.gradient=none",
    ),
    "reentrant": (Reentrant, "traits.gradient=none"),
    "noise": (lambda: Around(after=noisy), "traits.stochastic=true"),
    "noise beside an offset": (
        lambda: Around(after=lambda z: noisy(z) + 1e5),
        "traits.stochastic=true",
    ),
    "noise off the grid": (
        lambda: Around(lambda x: x if on_grid(x) else x + 0.3 * torch.randn_like(x)),
        "traits.stochastic=true",
    ),
    "batch": (lambda: Around(after=lambda z: z - z.mean(0)), "traits.batch_dependent=true"),
    "batch above 16 rows": (Memory, "traits.batch_dependent=true"),
    "nan": (lambda: Around(after=lambda z: z * torch.nan), "not finite for 16 of 16"),
    "masked class": (
        lambda: Around(after=lambda z: z + torch.tensor([0.0, 0.0, -torch.inf])),
        "-1e4",
    ),
    "complex": (lambda: Around(after=lambda z: z.to(torch.complex64)), "complex numbers"),
    "probabilities": (lambda: Around(after=lambda z: z.softmax(1)), "traits.output=probabilities"),
}
"""Models that are not evaluated as they are, and what the line about each says."""
