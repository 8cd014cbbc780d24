"""The student: a small net that learns a model's outputs and is attacked as its surrogate.

Papernot et al. 2017 (arXiv 1602.02697), "Practical black-box attacks against machine learning".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbench.attacks.random import hash_of
from advbench.attacks.threat import Threat, unit
from advbench.data.base import Split
from advbench.devices import full_float32, kernels
from advbench.evaluation.samples import Samples

IMAGES = 2000
"""At most so many images are learned from."""
STEPS = 200
"""Of the optimizer."""
BATCH = 64
SIDE = 32
"""Larger images are averaged down to so many pixels."""


def learn(
    model: nn.Module, samples: Samples, threat: Threat, train: Split | None, seed: int = 0
) -> nn.Module:
    """A small convolutional net that answers as the model does, on images and around them.

    Half of each batch is moved by noise as large as the threat. The draws are keyed by the seed, so
    that on one machine the student is always the same.

    Args:
        model: in evaluation mode, on the samples' device.
        samples: those that are attacked, learned from if there is no training split.
        threat: how large the noise is.
        train: images to learn from; their labels are not used.
        seed: of all draws.

    Returns:
        The student in evaluation mode, on that device.
    """
    draws = torch.Generator().manual_seed(hash_of(f"{seed}/student"))
    if train is None:
        x = samples.fetch(samples.ids[:IMAGES]).x
    else:
        chosen = torch.randperm(len(train), generator=draws)[:IMAGES].sort().values
        x = train.fetch(chosen, samples.device)[0]
    with torch.no_grad():
        classes = model(x[:2]).shape[1]
    with kernels(deterministic=True), full_float32(), _one_thread(), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        student = _net(x, classes).to(x.device)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.003)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (BATCH,), generator=draws).to(x.device)
            images = x[rows]
            noise = 2 * torch.rand(images.shape, generator=draws).to(x) - 1
            noise[: BATCH // 2] = 0
            images = threat.project(images + threat.radius * unit(noise, threat.norm), images)
            with torch.no_grad():
                labels = model(images).argmax(1)
            optimizer.zero_grad()
            F.cross_entropy(student(images), labels).backward()
            optimizer.step()
            schedule.step()
    return student.eval().requires_grad_(False)


def _net(x: Tensor, classes: int) -> nn.Module:
    """A net with fresh weights for images such as x (N, C, H, W)."""
    height, width = (min(side, SIDE) for side in x.shape[2:])
    stride = 2 if min(height, width) >= 16 else 1
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d((height, width)), nn.BatchNorm2d(x.shape[1])]
    channels = x.shape[1]
    for width in (32, 64, 64):
        conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        channels, stride = width, 3 - stride
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU the number of threads decides how sums round."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
