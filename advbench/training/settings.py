"""How to train, whatever is trained: the numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from advbench.config.roles import Role
from advbench.data.base import Splits
from advbench.devices import emulates_bf16, has_tf32
from advbench.errors import UserError, did_you_mean

# float16 is not here: small input gradients vanish in it, and an attack sees their sign alone.
PRECISIONS = ("32-true", "tf32", "bf16-mixed")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MODES = ("default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Settings:
    """How to train, whatever is trained.

    Raises:
        UserError: for values out of range.
    """

    epochs: int = 30
    """At least 1."""
    batch_size: int = 128
    """Over all devices, a multiple of their number. What fills no batch at the end of an epoch
    waits for the next permutation."""
    devices: int | str = 1
    """Of lightning-fabric: a number, ``auto``, or a list such as ``0,1``."""
    accelerator: str = field(default="auto", metadata={"role": Role.RESOURCE})
    """Of lightning-fabric: ``auto``, ``cpu``, ``cuda``, ..."""
    strategy: str = field(default="auto", metadata={"role": Role.OUTCOME | Role.RESOURCE})
    """Of lightning-fabric: ``auto``, ``ddp``, ..."""
    num_nodes: int = field(default=1, metadata={"role": Role.OUTCOME | Role.RESOURCE})
    """Of lightning-fabric: machines, started by a launcher."""
    precision: str = "32-true"
    """``32-true``; ``tf32``, float32 whose products are TF32, on NVIDIA GPUs from Ampere on; or
    ``bf16-mixed``. A device without such instructions refuses. Validation is always in float32."""
    save_every: float = field(default=60.0, metadata={"role": Role.RESOURCE})
    """Seconds between two saves of ``resume.pt``; 0 saves at every step. Each epoch's end saves
    ``epoch.pt``."""
    sync_batchnorm: bool = False
    """With several devices, batch norm over the rows of all of them, as if they were one. Without
    it each normalises its own rows, and all keep the running statistics of the first: a smaller
    batch for batch norm, and so another training."""
    clip_grad: float | None = None
    """Largest l2 norm of the gradient of all parameters; None is off."""
    ema: float | None = None
    """Decay in (0, 1) of a moving average of the weights, which then is what is validated and kept
    (``advbench.training.averaging``); None is off."""
    val_steps: int = 10
    """PGD steps of the robust validation accuracy."""
    compile: str | None = field(default=None, metadata={"role": Role.OUTCOME | Role.RESOURCE})
    """None, or a mode of ``torch.compile`` for the model's trunk and head, in training and in its
    attack: default, reduce-overhead or max-autotune. It takes minutes at the start; where it
    fails, the log says so and training continues without it."""
    deterministic: bool = field(default=False, metadata={"role": Role.OUTCOME | Role.RESOURCE})
    """On a GPU, the same bits in every run, at some cost; a CPU gives them anyway."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "num_nodes", "val_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("save_every", self.save_every >= 0, "a number of seconds")
        self._require("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0, or null")
        self._require("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or null")
        if self.precision not in PRECISIONS:
            hint = did_you_mean(self.precision, PRECISIONS)
            raise UserError(f"no precision '{self.precision}'{hint} (trainer.precision=32-true)")

        if self.compile is not None and self.compile not in MODES:
            hint = did_you_mean(self.compile, MODES)
            raise UserError(f"no trainer.compile '{self.compile}'{hint} (trainer.compile=default)")

    def check(self, model: nn.Module, splits: Splits, device: torch.device, devices: int) -> None:
        """Check the settings against model, data and machine.

        Args:
            model: the defended model.
            splits: the data.
            device: of this process.
            devices: the number of processes.

        Raises:
            UserError: if the device only emulates the precision, or if the data can't be dealt over
                so many devices in batches from which the model can learn.
        """
        if self.precision == "bf16-mixed" and emulates_bf16(device):
            raise UserError(
                f"trainer.precision=bf16-mixed is slower than float32 on this {device.type}, which "
                "only emulates bfloat16: take trainer.precision=32-true"
            )
        if self.precision == "tf32" and not has_tf32(device):
            raise UserError(
                f"trainer.precision=tf32 needs an NVIDIA GPU from Ampere on, and this is a "
                f"{device.type}: take trainer.precision=32-true"
            )
        if self.batch_size > len(splits.train):
            raise UserError(
                f"trainer.batch_size={self.batch_size} is more than the {len(splits.train)} "
                "training samples"
            )
        if self.batch_size % devices:
            raise UserError(
                f"trainer.batch_size={self.batch_size} cannot be dealt evenly over {devices} "
                f"devices; take {self.batch_size // devices * devices or devices}"
            )
        together = self.batch_size if self.sync_batchnorm else self.batch_size // devices
        if together < 2 and any(isinstance(m, BATCH_NORMS) for m in model.modules()):
            rows = "one image" if devices == 1 else "one image for each device"
            synced = "" if devices == 1 else ", or trainer.sync_batchnorm=true"
            raise UserError(
                f"trainer.batch_size={self.batch_size} is {rows}, and the model has batch norm, "
                f"which needs more: take trainer.batch_size={2 * devices} or more{synced}"
            )
        if len(splits.val) < devices:
            raise UserError(
                f"the validation split holds {len(splits.val)} for {devices} devices, which "
                "need one each: give data.val=0.1, or fewer devices"
            )

    def _require(self, name: str, valid: bool, range_: str) -> None:
        if not valid:
            raise UserError(f"trainer.{name}={getattr(self, name):g} is not {range_}")
