"""What an evaluation runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advbench.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Resources:
    """The device, and how many samples are attacked side by side.

    accelerator: auto, cpu, cuda or mps.  batch_size: at least 1; it belongs to the result of
    ``engine=reference``, whose random numbers depend on the batch.
    Raises UserError for values out of range, and for a device that is not there.
    """

    accelerator: str = "auto"
    batch_size: int = 250

    def __post_init__(self) -> None:
        known = ("auto", "cpu", "cuda", "mps")
        if self.accelerator not in known:
            hint = did_you_mean(self.accelerator, known)
            raise UserError(f"no trainer.accelerator '{self.accelerator}'{hint}")
        if self.batch_size < 1:
            raise UserError(f"trainer.batch_size={self.batch_size} is not at least 1")
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not here.get(self.accelerator, True):
            raise UserError(
                f"trainer.accelerator={self.accelerator} is not available here; "
                "use trainer.accelerator=cpu"
            )

    @property
    def device(self) -> torch.device:
        if self.accelerator != "auto":
            return torch.device(self.accelerator)
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
