"""Fast adversarial training: FGSM from a random start (Wong et al. 2020, arXiv 2001.03994)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from advbench.attacks.pgd import PGD
from advbench.defenses.base import PartName, Step
from advbench.recipes.base import AdversarialRecipe

OVERSHOOT = 1.25  # step over radius: 10/255 over 8/255 in the paper


@dataclass(frozen=True)
class FGSMRS(AdversarialRecipe):
    """Cross-entropy on x', and x' by one step of PGD from a point drawn in the ball.

    linf: uniform start, then a step along the sign of the gradient, as in the paper. l2, which the
    paper does not have: uniform direction and radius, then a step along the gradient.

    Raises:
        UserError: for a step size that is not a length, and for l1 threats.
    """

    step_size: float | str | None = None
    """In pixel units, "10/255" or a number; None is 1.25 eps. With longer steps a net may learn to
    be robust to this step alone (catastrophic overfitting)."""

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("adversarial",)

    def attack(self) -> PGD:
        assert self.threat is not None
        size = OVERSHOOT * self.threat.radius if self.step_size is None else self.step_size
        return PGD(steps=1, step_size=size)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(step.adversarial, step.labels)}
