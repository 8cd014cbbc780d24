"""Attacks: searches for an image inside a threat that a model gets wrong."""

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Answer, Attack, Clean, Oracle, Rows, craft, started
from advbench.attacks.express import Express
from advbench.attacks.fab import FAB
from advbench.attacks.ifgsm import IFGSM
from advbench.attacks.libraries import ReferenceAutoAttack, TorchAttack
from advbench.attacks.pgd import PGD
from advbench.attacks.referee import Judgement, Referee
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat

__all__ = [
    "APGD",
    "FAB",
    "IFGSM",
    "PGD",
    "Answer",
    "Attack",
    "Clean",
    "Express",
    "Judgement",
    "Oracle",
    "Referee",
    "ReferenceAutoAttack",
    "Rows",
    "Square",
    "Threat",
    "TorchAttack",
    "craft",
    "started",
]
