"""Guards of a training: against divergence and two kinds of overfitting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advbench.training.processes import gather

EXPLODED = 1000.0
"""Times the loss of a guess: see ``Divergence``."""
SLOWER = 0.1
"""What the learning rate is multiplied by after a divergence; ours."""
COLLAPSED = 0.5
"""Share of the best PGD accuracy: see ``catastrophic_overfitting``; ours."""
Rows = Sequence[Mapping[str, float]]


class Diverged(Exception):
    """Training went wrong, for the reason that is its text; in every process alike."""


class Divergence:
    """Notes on the device the first step whose loss is lost; nothing waits for the device.

    A loss is lost if it is NaN, infinite, or more than 1000 times ln K, the cross-entropy of a
    model that guesses among K classes. Cross-entropy is at most the margin by which a row is wrong,
    so that means that the mean row is wrong by 1000 ln K: 2300 logits where K = 10. A loss that
    trains stays far away from it: a first epoch at too high a rate reaches some ten times ln K, and
    the weight of a second term (beta = 6 of TRADES and MART) makes it tens of ln K. What diverges
    passes it within a few steps (on digits at lr 100: 12, 1,900 and 33,000 times ln K at steps 2, 3
    and 4). A step's verdict depends on its loss alone, so it is the same whenever it is read.

    Args:
        steps_per_epoch: to tell the epoch of a step.
    """

    def __init__(self, device: torch.device, steps_per_epoch: int, num_classes: int) -> None:
        self._device = device
        self._steps_per_epoch = steps_per_epoch
        self._limit = EXPLODED * math.log(max(2, num_classes))
        self.forget()

    def forget(self) -> None:
        """Begin again, after going back an epoch."""
        self._first = torch.full((), -1, dtype=torch.int64, device=self._device)
        self._loss = torch.zeros((), device=self._device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Look at the loss of a step.

        Args:
            loss: a scalar.
            step: from 0, over all epochs.
        """
        loss = loss.detach()
        new = (self._first < 0) & ~((loss <= self._limit) & loss.isfinite())
        self._first = torch.where(new, step, self._first)
        self._loss = torch.where(new, loss.float(), self._loss)

    def check(self, fabric: Fabric) -> None:
        """Raises Diverged, in every process alike, if a loss was lost in any of them."""
        steps, losses = (gather(seen, fabric).tolist() for seen in (self._first, self._loss))
        lost = sorted(pair for pair in zip(steps, losses, strict=True) if pair[0] >= 0)
        if lost:
            (step, loss), last = lost[0], self._steps_per_epoch
            epoch, batch = divmod(step, last)
            problem = (
                f"{loss:.3g}, over {EXPLODED:g} times that of a guess,"
                if math.isfinite(loss)
                else "not a finite number"
            )
            raise Diverged(
                f"the loss is {problem} at epoch {epoch + 1}, step {batch + 1} of {last}"
            )

    def check_weights(self, fabric: Fabric, epoch: int, *models: nn.Module) -> None:
        """Raises Diverged, in every process alike, if a parameter or a buffer is not finite.

        Args:
            epoch: finished ones. The loss does not tell of the last step of an epoch, nor of
                running statistics, which act in evaluation mode only.
        """
        values = [value for model in models for value in model.state_dict().values()]
        sound = torch.stack([value.isfinite().all() for value in values]).all()
        if not gather(sound.int(), fabric).all():
            raise Diverged(f"the weights are not finite numbers after epoch {epoch}")


def clearly_less(share: float, other: float, n: int, errors: float) -> bool:
    """Whether one accuracy of n samples is below another by so many standard errors.

    That of the difference of two independent shares; two models agree on most samples, so it is
    too large, which makes the test strict.
    """
    mean = (share + other) / 2
    return other - share > errors * math.sqrt(2 * mean * (1 - mean) / n)


def catastrophic_overfitting(rows: Rows, n: int) -> dict[str, float] | None:
    """Whether training has collapsed: the recipe's own attack fails, and PGD breaks everything.

    Single-step training may lose all robustness within an epoch while its own, single-step accuracy
    goes up (Wong et al. 2020, arXiv 2001.03994, sec. 5.4; Andriushchenko & Flammarion 2020, arXiv
    2007.02617). It has, if in both of the last two epochs, against that of the best PGD accuracy:

    - PGD accuracy is less than half, beyond chance (3 standard errors);
    - as a share of the clean accuracy it is less than half too: the model still classifies;
    - accuracy on the recipe's own adversarial images is no lower than in that epoch, and no lower
      than the PGD accuracy of that epoch was.

    Multi-step training does not meet them. Where it overfits, PGD accuracy falls by a fifth (from
    53 % to 44 % in Rice et al. 2020, arXiv 2002.11569). Where it is unstable, in trials at a radius
    near half the distance of the classes, it fell to a quarter now and then, but accuracy on
    training images stayed below what PGD accuracy had been.

    Args:
        rows: of metrics.csv, up to this epoch.
        n: validation samples.

    Returns:
        What was seen, with the ``epoch`` of the collapse, or None.
    """
    if len(rows) < 3 or not {"train_adversarial", "val_robust"} <= rows[-1].keys():
        return None
    best = max(rows, key=lambda row: row["val_robust"])
    before = best["val_robust"]
    for now in rows[-2:]:
        clean_share = min(1.0, now["val_clean"] / max(best["val_clean"], 1e-12))
        if not (
            now["val_robust"] < COLLAPSED * before * clean_share
            and clearly_less(now["val_robust"], before, n, errors=3)
            and now["train_adversarial"] >= max(best["train_adversarial"], before)
        ):
            return None
    return {
        "epoch": rows[-2]["epoch"],
        "train_adversarial": rows[-1]["train_adversarial"],
        "val_robust": rows[-1]["val_robust"],
        "best_epoch": best["epoch"],
        "best_val_robust": before,
    }


def robust_overfitting(best: float, last: float, n: int) -> bool:
    """Whether the last epoch is clearly less robust than the best one (Rice et al. 2020, arXiv
    2002.11569): by two standard errors of the difference.

    Args:
        best, last: PGD accuracy on the n validation samples.
    """
    return clearly_less(last, best, n, errors=2)


def describe(collapse: Mapping[str, Any]) -> str:
    """A catastrophic overfitting in one line, from what ``catastrophic_overfitting`` returned."""
    return (
        f"catastrophic overfitting at epoch {collapse['epoch']}: accuracy on the recipe's own "
        f"adversarial images is {100 * collapse['train_adversarial']:.1f} %, and under PGD it fell "
        f"from {100 * collapse['best_val_robust']:.1f} % (epoch {collapse['best_epoch']}) to "
        f"{100 * collapse['val_robust']:.1f} %. Training stops here, and the best epoch is kept; "
        "try a smaller recipe.step_size, more recipe.steps, or recipe=pgd_at"
    )
