"""advbench: train adversarial defenses, and measure honestly how robust they are.

model = advbench.load("outputs/train/RUN")
results = advbench.evaluate(model, x, y, threat="linf_8", protocol="autoattack")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advbench.api import evaluate, load

__all__ = ["evaluate", "load"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing torch takes seconds, and ``advbench --help`` needs none.
    if name in __all__:
        from advbench import api

        return getattr(api, name)
    raise AttributeError(f"module 'advbench' has no attribute '{name}'")
