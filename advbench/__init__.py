"""advbench: train adversarial defenses and measure how robust they are.

model = advbench.load("outputs/train/RUN")
results = advbench.evaluate(model, x, y, threat="linf_8", protocol="autoattack")
images = advbench.attack(model, x, y, "linf_8")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advbench.api import attack, evaluate, load
    from advbench.attacks.base import Attack
    from advbench.attacks.threat import Threat
    from advbench.backbones.base import Classifier
    from advbench.defenses.base import Defense, Surrogate, Traits
    from advbench.errors import UserError
    from advbench.evaluation.protocol import Protocol
    from advbench.progress import NullProgress, Progress
    from advbench.recipes.base import Recipe
    from advbench.runs.accuracy import Accuracy
    from advbench.runs.results import Results

__all__ = [
    "Accuracy",
    "Attack",
    "Classifier",
    "Defense",
    "NullProgress",
    "Progress",
    "Protocol",
    "Recipe",
    "Results",
    "Surrogate",
    "Threat",
    "Traits",
    "UserError",
    "attack",
    "evaluate",
    "load",
]

_MODULES = {
    "Accuracy": "runs.results",
    "Attack": "attacks.base",
    "Classifier": "backbones.base",
    "Defense": "defenses.base",
    "NullProgress": "progress",
    "Progress": "progress",
    "Protocol": "evaluation.protocol",
    "Recipe": "recipes.base",
    "Results": "runs.results",
    "Surrogate": "defenses.base",
    "Threat": "attacks.threat",
    "Traits": "defenses.base",
    "UserError": "errors",
    "attack": "api",
    "evaluate": "api",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing torch takes seconds, and ``advbench --help`` needs none.
    if name in _MODULES:
        return getattr(import_module(f"advbench.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'advbench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
