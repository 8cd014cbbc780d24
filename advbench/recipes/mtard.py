"""MTARD: distillation from a robust and a standard teacher (Zhao et al., ECCV 2022)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from advbench.attacks.base import Clean, Oracle, Rows, started
from advbench.attacks.pgd import PGD
from advbench.attacks.random import Random
from advbench.attacks.threat import Threat
from advbench.config.roles import Role
from advbench.defenses.base import Part, PartName, Step
from advbench.devices import in_company
from advbench.errors import UserError
from advbench.recipes.base import AdversarialRecipe
from advbench.recipes.trades import NOISE, divergence

GAMMA = 0.1  # of the weights' rate, at each milestone


@dataclass(frozen=True)
class NearPGD(PGD):
    """PGD that starts at x plus a little normal noise, as in the authors' code.

    Of the parameters of PGD it does not use ``random_start``.
    """

    def start(
        self, oracle: Oracle, clean: Clean, threat: Threat, random: Random, restart: Tensor
    ) -> Rows:
        point = threat.project(clean.x + NOISE * random.normal(clean.x), clean.x)
        return Rows(**started(clean, point, restart))


class Balance(nn.Module):
    """The weights of the two losses, and what decides how they move.

    Attributes:
        clean: w_n, the weight of the clean loss; that of the adversarial one is w_a = 1 - w_n.
        first, last: the two losses, clean and adversarial, of the first and of the last step, (2,).
    """

    clean: Tensor
    first: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("clean", torch.tensor(0.5))
        self.register_buffer("first", torch.ones(2))
        self.register_buffer("last", torch.ones(2))

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """w_n <- w_n - rate (w_n - l_n / (l_n + l_a)), with l = last / first."""
        # A teacher may start out as the student's equal, at a loss of zero.
        tiny = torch.finfo(self.first.dtype).tiny
        relative = self.last / self.first.clamp(min=1e-12)
        share = (relative[0] + tiny) / (relative.sum() + 2 * tiny)
        self.clean -= rate * (self.clean - share)


@dataclass(frozen=True)
class MTARD(AdversarialRecipe):
    """w_a KL(robust teacher(x') || student(x')) + w_n KL(standard teacher(x) || student(x)).

    x' is where the student's cross-entropy is large. w_n + w_a = 1, and the weight of a loss grows
    while that loss lags behind the other, both measured by their first values: see ``Balance``. As
    in the authors' code, except that there the weights move before the step that moves them, and
    that the divergence is divided by the number of classes.

    There is no cross-entropy in it, so ``label_smoothing`` must be 0.

    Raises:
        UserError: for values out of range, for l1 threats, and where a teacher is missing.
    """

    robust_teacher: Any = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_RUN})
    """The teacher on adversarial images, a model from images in [0, 1] to logits (N, K); it is put
    into evaluation mode and frozen. A run's name stands for its model until the caller loads it."""
    standard_teacher: Any = field(default=None, metadata={"role": Role.OUTCOME | Role.NAMES_RUN})
    """The teacher on clean images; otherwise as the robust one."""
    steps: int = 10
    """Steps of the search, at least 1."""
    step_size: float | str | None = None
    """In pixel units; None as in ``advbench.attacks.pgd.PGD``."""
    weight_rate: float = 0.025
    """How fast w_n follows the losses, in [0, 1]."""
    weight_milestones: list[int] = field(default_factory=lambda: [215, 260, 285])
    """Epochs at whose start ``weight_rate`` falls to a tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing:
            raise UserError("recipe=mtard has no cross-entropy to smooth: recipe.label_smoothing=0")
        if not 0 <= self.weight_rate <= 1:
            raise UserError(f"recipe.weight_rate={self.weight_rate:g} is not between 0 and 1")
        if self.robust_teacher is None or self.standard_teacher is None:
            raise UserError(
                "recipe=mtard needs two teachers: give recipe.robust_teacher=RUN "
                "recipe.standard_teacher=RUN"
            )
        for teacher in (self.robust_teacher, self.standard_teacher):
            if isinstance(teacher, nn.Module):
                teacher.eval().requires_grad_(False)

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("clean", "adversarial")

    def memory(self) -> Balance:
        return Balance()

    def attack(self) -> NearPGD:
        return NearPGD(steps=self.steps, step_size=self.step_size)

    def loss_terms(self, model: nn.Module, step: Step) -> dict[str, Tensor]:
        """The divergence from each teacher, with its weight.

        Raises:
            UserError: for a teacher with another number of classes than the student.
        """
        balance = step.memory
        assert isinstance(balance, Balance)
        clean = _distillation(self.standard_teacher, "standard_teacher", step.clean)
        adversarial = _distillation(self.robust_teacher, "robust_teacher", step.adversarial)
        balance.last.copy_(torch.stack([clean, adversarial]).detach())
        return {
            "kl_adversarial": (1 - balance.clean) * adversarial,
            "kl_clean": balance.clean * clean,
        }

    def after_step(self, model: nn.Module, step: Step) -> None:
        balance = step.memory
        assert isinstance(balance, Balance)
        if in_company():
            distributed.all_reduce(balance.last)
            balance.last /= distributed.get_world_size()
        if step.step == 0:
            balance.first.copy_(balance.last)
        drops = sum(step.epoch >= milestone for milestone in self.weight_milestones)
        balance.move(self.weight_rate * GAMMA**drops)


def _distillation(teacher: nn.Module, name: str, part: Part | None) -> Tensor:
    """KL(teacher || student), the mean over the rows of a part; gradients of the student alone."""
    assert part is not None
    tensors = itertools.chain(teacher.parameters(), teacher.buffers())
    if any(tensor.device != part.x.device for tensor in tensors):
        teacher.to(part.x.device)
    with torch.no_grad():
        logits = teacher(part.x)
    if logits.shape != part.logits.shape:
        raise UserError(
            f"recipe.{name} knows {logits.shape[1]} classes and the student {part.logits.shape[1]}:"
            " take a run of the same data"
        )
    return divergence(F.log_softmax(logits.float(), dim=1), part.logits).mean()
