"""Models that make a robust accuracy look better than it is, one trick each.

    advbench eval model=docs/liars.py:HardLabels data=digits threat=linf_015

Every class is a factory: without an argument it takes the small net that ``network`` trains on
digits, with one it wraps that net. None of them makes the net more robust. What an evaluation says
of them is in docs/liars.md; tests/zoo.py has them all, beside honest models.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbench.backbones.convnet import convnet
from advbench.data.sources import digits
from advbench.defenses.jumprelu import JumpReLU
from advbench.surgery import replace_modules

GRID = 16
"""The steps between black and white in digits: pixels are v/16."""

RADIUS = 0.2
"""How far ``Hole`` is flat in linf: farther than an attack with eps = 0.15 may go."""


@cache
def network() -> nn.Module:
    """A small undefended net for digits; trains in three seconds."""
    torch.manual_seed(0)
    data = digits().build()
    x, y = data.train.fetch(torch.arange(len(data.train)), torch.device("cpu"))
    net = convnet(num_classes=10, input_shape=[1, 8, 8], mean=[0.3], std=[0.4]).build()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


class Liar(nn.Module):
    """A net in a disguise.

    Args:
        net: takes (N, 1, 8, 8) in [0, 1], returns logits (N, 10); None is ``network()``.
    """

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = copy.deepcopy(network() if net is None else net).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# --- no gradient at all --------------------------------------------------------------------------


class Quantised(Liar):
    """Rounds the image to five grey values: the gradient is zero almost everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.round(4 * x) / 4)


class Detached(Liar):
    """Cuts the graph; a term of no weight keeps PyTorch from noticing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach()) + 0 * x.flatten(1)[:, :1]


class RoundedLogits(Liar):
    """Returns whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(2 * self.net(x))


class HardLabels(Liar):
    """Returns the predicted class and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return 10.0 * F.one_hot(logits.argmax(1), logits.shape[1]) + 0 * logits


class Saturated(Liar):
    """A steep tanh: -1 or 1 wherever float32 looks."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return torch.tanh(1000 * (logits - logits.topk(2, dim=1).values.mean(1, keepdim=True)))


class Hole(Liar):
    """Constant logits around every test image, for as long as its prediction stays the same."""

    known: Tensor

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        test = digits().build().test
        images, _ = test.fetch(torch.arange(len(test)), torch.device("cpu"))
        self.register_buffer("known", images)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            away = torch.cdist(x.flatten(1), self.known.flatten(1), p=torch.inf)
            distance, nearest = away.min(1)
            centre = self.net(self.known[nearest])
        logits = self.net(x)
        inside = (distance < RADIUS) & (centre.argmax(1) == logits.argmax(1))
        return torch.where(inside[:, None], centre, logits)


# --- a gradient of another function -------------------------------------------------------------


class Backward(Liar):
    """The right logits, and on the way back another gradient."""

    @staticmethod
    def change(gradient: Tensor) -> Tensor:
        """What becomes of the gradient (N, 1, 8, 8) in the image."""
        return gradient

    def forward(self, x: Tensor) -> Tensor:
        inside = x.view_as(x)
        if inside.requires_grad:
            inside.register_hook(self.change)
        return self.net(inside)


class _Negate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients):
        return -gradients[0]


class Negated(Liar):
    """Every step of an attack makes the model more certain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Negate.apply(x))


class RandomGradient(Backward):
    """Noise in the place of the gradient."""

    @staticmethod
    def change(gradient: Tensor) -> Tensor:
        return torch.randn_like(gradient)


class OnePixel(Backward):
    """NaN in every pixel but the first, which an attack takes for nothing."""

    @staticmethod
    def change(gradient: Tensor) -> Tensor:
        lost = torch.full_like(gradient, torch.nan)
        lost[..., 0, 0] = gradient[..., 0, 0]
        return lost


class GradMode(Liar):
    """Another function where somebody computes a gradient: the mirror image's logits, negated."""

    def forward(self, x: Tensor) -> Tensor:
        return -self.net(x.flip(3)) if torch.is_grad_enabled() else self.net(x)


# --- a gradient that misleads --------------------------------------------------------------------


class Sine(Liar):
    """A ripple too fine to matter, whose slope is fifty times the image's own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.sin(5000 * x))


def dct_matrix(size: int = 8) -> Tensor:
    """The orthonormal DCT-II, (size, size): rows are frequencies."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (k + 0.5) * k[:, None] / size) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float()


class DCT(Liar):
    """Rounds the image's frequencies, all to the same step."""

    matrix: Tensor
    table: Tensor

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.register_buffer("matrix", dct_matrix())
        self.register_buffer("table", self.steps())

    def steps(self) -> Tensor:
        """The width of each frequency's step, (8, 8)."""
        return torch.full((8, 8), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        frequencies = self.matrix @ x @ self.matrix.T
        rounded = torch.round(frequencies / self.table) * self.table
        return self.net(self.matrix.T @ rounded @ self.matrix)


class JPEG(DCT):
    """Rounds the image's frequencies as JPEG does, the higher the coarser."""

    def steps(self) -> Tensor:
        k = torch.arange(8.0)
        return 0.15 + 0.1 * (k + k[:, None])


class _KWTA(nn.Module):
    """Keeps the largest share of a layer's values (Xiao et al. 2020, arXiv 1905.10510)."""

    share = 0.15

    def forward(self, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        least = flat.topk(max(1, round(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(z)


class KWTA(Liar):
    """Winner takes all in the place of every ReLU: jumps everywhere."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        replace_modules(self.net, nn.ReLU, lambda old, name: _KWTA())


class Jump(Liar):
    """JumpReLU with a large jump, about which nobody was told."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.net = JumpReLU(jump=1.0).apply(self.net).eval()


# --- outputs along which a loss goes flat -------------------------------------------------------


class Loud(Liar):
    """Logits so large that the cross-entropy is zero in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.net(x)


class Softmax(Liar):
    """Probabilities in the place of logits: whoever takes the loss applies softmax once more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class Sigmoid(Liar):
    """Independent sigmoids, one for each class."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x))


class Detector(Liar):
    """An eleventh class for images whose prediction changes when they are smoothed."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        smooth = self.net(F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride=1))
        moved = (logits.softmax(1) - smooth.softmax(1)).abs().sum(1, keepdim=True)
        return torch.cat([logits, logits.amax(1, keepdim=True) + 20 * (moved - 1.9)], 1)


# --- another answer to another question ----------------------------------------------------------


class Noise(Liar):
    """Random, and not declared so."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


class NoiseOffGrid(Liar):
    """Random only on images that are no digits: where an attack has been."""

    def forward(self, x: Tensor) -> Tensor:
        odd = ((GRID * x - (GRID * x).round()).abs() > 1e-4).flatten(1).any(1)
        return self.net(torch.where(odd.view(-1, 1, 1, 1), x + 0.2 * torch.randn_like(x), x))


class Crowd(Liar):
    """Compares the rows with each other as soon as there are more than sixteen."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits if len(x) <= 16 else logits - 0.9 * logits.mean(0)


TRICKS: dict[str, type[Liar]] = {
    trick.__name__: trick
    for trick in (
        *(Quantised, Detached, RoundedLogits, HardLabels, Saturated, Hole),
        *(Negated, RandomGradient, OnePixel, GradMode),
        *(Sine, DCT, JPEG, KWTA, Jump),
        *(Loud, Softmax, Sigmoid, Detector),
        *(Noise, NoiseOffGrid, Crowd),
    )
}
"""All of them, by name."""
