"""The devices of a machine, as lightning-fabric hands them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from advbench.errors import UserError


@contextmanager
def asking_for(accelerator: str, devices: int | str) -> Iterator[None]:
    """Raises UserError where lightning-fabric says inside that these devices can't be had."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(
            f"trainer.accelerator={accelerator} with trainer.devices={devices} "
            f"cannot be had here: {reason:.200}"
        ) from problem


def in_company() -> bool:
    """Whether this process is one of a group, which may talk through ``torch.distributed``."""
    return distributed.is_available() and distributed.is_initialized()
