"""Losses that an attack maximises. Each returns (N,), larger is closer to an error.

A loss takes logits (N, K), the true classes y (N,) and, if it is targeted, the target classes (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD = 4.0
"""From the largest to the median logit, where the cross-entropy is rescaled."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the true class.

    Args:
        logits: (N, K).
        y: true classes, (N,).

    Returns:
        (N,), at least 0.
    """
    return F.cross_entropy(logits, y, reduction="none")


def ce_rescaled(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits whose spread is brought to that of a usual classifier.

    Its gradient has the same direction whatever the scale of the logits; that of ``ce`` is zero in
    float32 where they are large. The spread is from the largest to the median, so classes that a
    model masks do not enter.

    Args:
        logits: (N, K), K >= 2.
        y: true classes, (N,).

    Returns:
        (N,), at least 0; invariant to shift and positive scale of the logits.
    """
    finite = logits.detach().clamp_min(torch.finfo(logits.dtype).min)
    top = finite.topk((logits.shape[1] + 1) // 2 + 1, dim=1).values
    spread = (top[:, :1] - top[:, -1:]).clamp_min(torch.finfo(logits.dtype).tiny)
    return ce((logits - top[:, :1]) * (SPREAD / spread), y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit minus the true one (Carlini & Wagner 2017, arXiv 1608.04644).

    Args:
        logits: (N, K), K >= 2.
        y: true classes, (N,).

    Returns:
        (N,), positive exactly where the sample is misclassified.
    """
    true = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return wrong - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690, eq. 3).

    Args:
        logits: (N, K), K >= 3.
        y: true classes, (N,).

    Returns:
        (N,), invariant to shift and positive scale of the logits.

    Raises:
        ValueError: for K < 3: the ratio needs the third largest logit.
    """
    if logits.shape[1] < 3:
        raise ValueError("the DLR loss needs at least 3 classes")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus the true one.

    Args:
        logits: (N, K).
        y: true classes, (N,).
        target: classes to reach, (N,).
    """
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, arXiv 2003.01690, eq. 6).

    Args:
        logits: (N, K), K >= 4.
        y: true classes, (N,).
        target: classes to reach, (N,).

    Returns:
        (N,), invariant to shift and positive scale of the logits.

    Raises:
        ValueError: for K < 4: the ratio needs the fourth largest logit.
    """
    if logits.shape[1] < 4:
        raise ValueError("the targeted DLR loss needs at least 4 classes")
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return margin_targeted(logits, y, target) / (scale + 1e-12)


UNTARGETED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": ce, "margin": margin, "dlr": dlr}
TARGETED: dict[str, Loss] = {"margin_targeted": margin_targeted, "dlr_targeted": dlr_targeted}
NAMES = (*UNTARGETED, *TARGETED)
FEWEST_CLASSES = {"ce": 2, "margin": 2, "margin_targeted": 2, "dlr": 3, "dlr_targeted": 4}
