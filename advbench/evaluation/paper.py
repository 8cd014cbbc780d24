"""Protocols ``paper/NAME``: the attacks with which the papers evaluated their own defenses.

They are weaker than ``msa`` and ``adaptive``; the difference shows how much they overestimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from advbench.attacks.ifgsm import IFGSM
from advbench.attacks.threat import pixels
from advbench.errors import UserError
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.protocols import PGDProtocol


@dataclass(frozen=True)
class PaperPGD(PGDProtocol):
    """PGD on the defended model as it is: one EOT sample if it is stochastic, no surrogate."""

    name: ClassVar[str] = "paper"
    paper: str = ""
    """The defense whose paper judged itself so."""

    @property
    def title(self) -> str:
        return f"{self.name}/{self.paper}"


@dataclass(frozen=True)
class PaperJumpReLU(Protocol):
    """The authors' iterative FGSM, which does not project (their code), white-box and gray-box.

    The number of steps is what fits into the threat, so that no point leaves it. Gray-box: the
    images are made on the net without the jump (surrogate ``base``).
    """

    name: ClassVar[str] = "paper/jumprelu"
    surrogates: ClassVar[bool] = True
    step_size: float | str = 0.01
    """In pixel units, above 0 and at most eps."""

    def stages(self, subject: Subject) -> list[Stage]:
        size = pixels(self.step_size, "protocol.step_size")
        if not size > 0:
            raise UserError(f"protocol.step_size={self.step_size} is not above 0")
        steps = int(subject.threat.radius / size + 1e-6)
        if subject.threat.norm == "linf" and steps < 1:
            raise UserError(
                f"a step of {size:g} does not fit into {subject.threat}: give a smaller "
                "protocol.step_size"
            )
        attack = IFGSM(steps=max(steps, 1), step_size=size)
        why = f"{steps} steps of {size:g} without projection"
        stages = [Stage("ifgsm", attack, why)]
        if "base" in subject.surrogates:
            stages.append(Stage("gray-box", attack, f"{why}, made without the jump", victim="base"))
        return stages
