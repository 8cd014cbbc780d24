"""How to train: the configuration, and the way in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.base import Splits
from advbench.defenses.base import Defense
from advbench.errors import UserError, did_you_mean
from advbench.files import canonical
from advbench.recipes.base import Recipe
from advbench.training.checkpoint import remove_leftovers, require_identity
from advbench.training.loop import Fit
from advbench.training.optimizers import Optimizer
from advbench.training.summary import Report, Silent, Summary

# float16 is not here: small input gradients vanish in it, and an attack sees their sign alone.
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Trainer:
    """How to train, whatever is trained.

    epochs: at least 1.
    batch_size: over all devices, a multiple of their number. What fills no batch at the end of an
        epoch waits for the next permutation.
    devices, accelerator, strategy, num_nodes: as lightning-fabric takes them. ``devices`` is a
        number, "auto", or a list such as "0,1".
    precision: 32-true or bf16-mixed; validation is always in float32.
    save_every: seconds between two saves of ``resume.pt``; 0 saves at every step. Each epoch's end
        saves as well.
    clip_grad: largest l2 norm of the gradient of all parameters; None is off.
    ema: decay in (0, 1) of a moving average of the weights, which then is what is validated and
        kept; None is off.
    val_steps: PGD steps of the robust validation accuracy.
    deterministic: on a GPU, the same bits in every run, at some cost; a CPU gives them anyway.

    Raises UserError for values out of range.
    """

    epochs: int = 30
    batch_size: int = 128
    devices: int | str = 1
    accelerator: str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    precision: str = "32-true"
    save_every: float = 60.0
    clip_grad: float | None = None
    ema: float | None = None
    val_steps: int = 10
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "num_nodes", "val_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("save_every", self.save_every >= 0, "a number of seconds")
        self._require("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0, or null")
        self._require("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or null")
        if self.precision not in PRECISIONS:
            hint = did_you_mean(self.precision, PRECISIONS)
            raise UserError(f"no precision '{self.precision}'{hint} (trainer.precision=32-true)")

    def _require(self, name: str, holds: bool, range_: str) -> None:
        if not holds:
            raise UserError(f"trainer.{name}={getattr(self, name):g} is not {range_}")

    def fit(
        self,
        model: Classifier,
        splits: Splits,
        recipe: Recipe,
        defense: Defense,
        optimizer: Optimizer,
        *,
        threat: Threat | None,
        seed: int,
        folder: Path,
        identity: Mapping[str, Any],
        report: Report | None = None,
    ) -> Summary:
        """Train ``model`` in place, or go on with the run that was interrupted in ``folder``.

        model: the defended model, ``defense.apply`` done; it ends with the last weights.
        threat: of the robust validation accuracy; None measures the clean one alone.
        folder: exists. Gets ``model.safetensors`` (the best epoch), ``last.safetensors``,
            ``metrics.csv``, ``summary.json`` (written last: the training is finished exactly if it
            is there) and, until then, ``resume.pt``.
        identity: JSON-like; what makes this run this run. Only an equal one goes on with it.

        The best epoch is the one of the highest robust validation accuracy, then the highest
        clean one, if the recipe has an adversarial part; otherwise, where robust accuracy is
        noise around zero, of the highest clean one. Of equals it is the later: it was trained
        longer and at a lower learning rate.

        An interrupted and continued training ends with the same weights as an uninterrupted one,
        bit for bit, on the same machine and number of threads.

        With several devices every process runs this; the first one alone writes and reports, and
        its ``folder`` counts. Raises UserError for a mistake of the user, and when the loss is
        not finite.
        """
        identity = json.loads(canonical(identity))
        fabric = self._fabric()
        fabric.launch()
        folder = fabric.broadcast(folder)
        if fabric.is_global_zero:
            remove_leftovers(folder)
        report = report if report is not None and fabric.is_global_zero else Silent()
        if (folder / "summary.json").exists():
            summary = Summary.load(folder / "summary.json")
            require_identity(canonical(summary.identity), identity, folder)
            (folder / "resume.pt").unlink(missing_ok=True)
            return summary
        with _kernels(self.deterministic):
            return Fit(
                trainer=self,
                fabric=fabric,
                model=model,
                splits=splits,
                recipe=recipe,
                defense=defense,
                schedule=optimizer,
                threat=threat,
                seed=seed,
                folder=folder,
                identity=identity,
                report=report,
            ).run()

    def _fabric(self) -> Fabric:
        try:
            # Not its precision: Fabric would round x' to bfloat16, by up to half of 1/255 near 1.
            return Fabric(
                accelerator=self.accelerator,
                strategy=self.strategy,
                devices=self.devices,
                num_nodes=self.num_nodes,
            )
        except (TypeError, ValueError, RuntimeError, MisconfigurationException) as problem:
            reason = " ".join(str(problem).split())
            raise UserError(
                f"trainer.accelerator={self.accelerator} with trainer.devices={self.devices} "
                f"cannot be had here: {reason:.200}"
            ) from problem


@contextmanager
def _kernels(deterministic: bool) -> Iterator[None]:
    """Which kernels PyTorch takes on a GPU: the reproducible ones, or the fastest by trial."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
