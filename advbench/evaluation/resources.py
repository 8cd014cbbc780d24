"""The resources of an evaluation: devices, batch size, precision, processes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from advbench.config.roles import Role
from advbench.devices import asking_for, has_tf32
from advbench.errors import UserError
from advbench.evaluation.fast_model import FastModelOptions

BUSY_VALUES = {"cpu": 2e5, "cuda": 8e6}
"""Values of images in a batch at which a device is busy, by trial on small and large nets."""
LARGEST_BATCH = {"cpu": 512, "cuda": 4096}
"""Samples side by side, at most: a card is not busy with fewer where the images are small."""

BARRIER_TIMEOUT = timedelta(days=30)
"""Until a process stops waiting for the others: their shares may differ by hours."""


class ProcessGroup:
    """The processes that share an evaluation; this is one of them."""

    def __init__(self, device: torch.device, fabric: Fabric | None = None) -> None:
        self.fabric = fabric
        self.device = device if fabric is None else fabric.device
        self.rank = 0 if fabric is None else fabric.global_rank
        self.world_size = 1 if fabric is None else fabric.world_size

    def wait(self) -> None:
        """Wait until all processes have called this. If the first one ended, this one ends too."""
        if self.fabric is None:
            return
        try:
            self.fabric.barrier()
        except RuntimeError as problem:
            if self.rank == 0:
                raise
            raise SystemExit(2) from problem

    def of_first(self, value: str) -> str:
        """The ``value`` of the first process, in every process; all call this."""
        return value if self.fabric is None else self.fabric.broadcast(value, src=0)


@dataclass(frozen=True)
class Resources:
    """The devices, and how the model runs on them.

    Raises:
        UserError: for values out of range, and for a device that is not there.
    """

    accelerator: str = field(default="auto", metadata={"role": Role.RESOURCE})
    """``auto``, ``cpu``, ``cuda`` or ``mps``."""
    devices: int | str = field(default=1, metadata={"role": Role.RESOURCE})
    """A number or a list such as ``0,1``, among which the samples are divided."""
    num_nodes: int = field(default=1, metadata={"role": Role.RESOURCE})
    """Machines, each of which runs the same command through a launcher (torchrun, SLURM)."""
    batch_size: int | str = field(default="auto", metadata={"role": Role.OUTCOME | Role.RESOURCE})
    """Samples attacked side by side, at least 1; ``auto`` fits it to the images. It belongs to the
    result of ``engine=reference``, whose random numbers depend on the batch."""
    precision: str = field(default="32", metadata={"role": Role.RESOURCE})
    """As of ``FastModelOptions``."""
    compile: str | None = field(default=None, metadata={"role": Role.RESOURCE})
    """As of ``FastModelOptions``."""
    graphs: bool = field(default=False, metadata={"role": Role.RESOURCE})
    """As of ``FastModelOptions``."""
    deterministic: bool = field(default=False, metadata={"role": Role.RESOURCE})
    """On a GPU, the same bits in every run, at some cost; a CPU gives them anyway."""

    def __post_init__(self) -> None:
        accelerators = ("auto", "cpu", "cuda", "mps")
        if self.accelerator not in accelerators:
            raise UserError(
                f"no trainer.accelerator '{self.accelerator}'; there is: {', '.join(accelerators)}"
            )
        if self.batch_size != "auto" and not (
            isinstance(self.batch_size, int) and self.batch_size >= 1
        ):
            raise UserError(f"trainer.batch_size={self.batch_size} is not auto or at least 1")
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not available.get(self.accelerator, True):
            raise UserError(
                f"trainer.accelerator={self.accelerator} is not available here; "
                "use trainer.accelerator=cpu"
            )
        if self.fast_model.precision == "tf32" and not has_tf32(self.device):
            raise UserError(
                "trainer.precision=tf32 needs an NVIDIA GPU from Ampere on, and this is a "
                f"{self.device.type}: take trainer.precision=32"
            )

    @property
    def fast_model(self) -> FastModelOptions:
        return FastModelOptions(self.precision, self.compile, self.graphs)

    @property
    def device(self) -> torch.device:
        if self.accelerator != "auto":
            return torch.device(self.accelerator)
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    def batch_size_for(self, input_shape: tuple[int, ...]) -> int:
        """Samples attacked side by side, for images of that shape."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        images = BUSY_VALUES.get(self.device.type, BUSY_VALUES["cpu"]) / math.prod(input_shape)
        limit = LARGEST_BATCH.get(self.device.type, LARGEST_BATCH["cpu"])
        return min(max(2 ** round(math.log2(images)), 8), limit)

    def launch(self) -> ProcessGroup:
        """Start the other processes, which run this same command, and meet them.

        Raises:
            UserError: for devices that are not available.
        """
        if str(self.devices) == "1" and self.num_nodes == 1 and "WORLD_SIZE" not in os.environ:
            return ProcessGroup(self.device)
        with asking_for(self.accelerator, self.devices, self.num_nodes):
            fabric = Fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=DDPStrategy(timeout=BARRIER_TIMEOUT),
            )
            fabric.launch()
        return ProcessGroup(self.device, fabric)
