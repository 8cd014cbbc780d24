"""Defenses: what is put into a backbone, and what an attacker must know of it."""

from advbench.defenses.awnet import AWNet
from advbench.defenses.base import Defense, Part, PartName, Step, Surrogate, Traits
from advbench.defenses.chain import Chain
from advbench.defenses.hpm import HPM
from advbench.defenses.jumprelu import JumpReLU
from advbench.defenses.mfdv_snn import MFDVSNN
from advbench.defenses.sparta import Sparta

__all__ = [
    "HPM",
    "MFDVSNN",
    "AWNet",
    "Chain",
    "Defense",
    "JumpReLU",
    "Part",
    "PartName",
    "Sparta",
    "Step",
    "Surrogate",
    "Traits",
]
