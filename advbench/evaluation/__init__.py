"""Evaluations: protocols, the plan that follows from one, and the engine that runs it."""

from advbench.evaluation.adaptive import AdaptiveProtocol, MSAProtocol
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Plan, Protocol, Stage, Subject
from advbench.evaluation.protocols import (
    APGDProtocol,
    AutoAttackProtocol,
    CleanProtocol,
    CurveProtocol,
    FABProtocol,
    FGSMProtocol,
    PGDProtocol,
    SquareProtocol,
    TorchattacksProtocol,
)

__all__ = [
    "APGDProtocol",
    "AdaptiveProtocol",
    "AutoAttackProtocol",
    "CleanProtocol",
    "CurveProtocol",
    "Evaluation",
    "FABProtocol",
    "FGSMProtocol",
    "Job",
    "MSAProtocol",
    "PGDProtocol",
    "Plan",
    "Protocol",
    "SquareProtocol",
    "Stage",
    "Subject",
    "TorchattacksProtocol",
]
