"""``Trainer``: the configuration of a training, and the call that starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.base import Splits
from advbench.defenses.base import Defense
from advbench.devices import (
    asking_for,
    emulates_bf16,
    full_float32,
    kernels,
    out_of_memory,
    tf32,
)
from advbench.errors import UserError
from advbench.files import canonical
from advbench.progress import NullProgress, Progress
from advbench.recipes.base import Recipe
from advbench.runs import manifest
from advbench.training.checkpoint import (
    remove_leftovers,
    remove_progress,
    require_identity,
)
from advbench.training.loop import Fit
from advbench.training.optimizers import Optimizer
from advbench.training.settings import Settings
from advbench.training.summary import Summary


@dataclass(frozen=True)
class Trainer(Settings):
    """Trains by its settings.

    Raises:
        UserError: for values out of range.
    """

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
        progress: Progress | None = None,
        prepared: bool = False,
    ) -> Summary:
        """Train ``model`` in place, or resume the run that was interrupted in ``folder``.

        The best epoch is the one of the highest robust validation accuracy, then the highest clean
        one, if the recipe has an adversarial part; otherwise, where robust accuracy is noise around
        zero, of the highest clean one. Of equals it is the later: it was trained longer and at a
        lower learning rate.

        An interrupted and continued training ends with the same weights as an uninterrupted one,
        bit for bit, on the same machine and number of threads; on a GPU, where ``deterministic`` is
        on. Without it too, ``model.safetensors`` is the epoch that the summary names.

        With several devices every process runs this; the first one alone writes and reports, and
        its ``folder`` counts.

        A training that diverges goes back to the start of the epoch and on at a tenth of the
        learning rate, once; one that overfits catastrophically ends (``advbench.training.guards``).

        Args:
            model: the defended model, ``defense.apply`` done; it ends with the last weights.
            splits: the data; the test part is not opened.
            recipe: makes the inputs and the loss of a step.
            defense: gives its hooks; ``Defense()`` for none.
            optimizer: with its learning-rate schedule.
            seed: of all random numbers.
            threat: of the robust validation accuracy; None measures the clean one alone.
            folder: exists. Gets ``model.safetensors`` (the best epoch), ``last.safetensors``,
                ``metrics.csv``, ``summary.json`` (written last: the training is finished exactly if
                it is there) and, until then, ``epoch.pt`` and ``resume.pt`` to resume from.
            identity: JSON-like; what makes this run this run. Only an equal one resumes it.
            progress: shows how far the training is; None shows nothing.
            prepared: the weights are those of a training with the same defense, whose state goes
                on.

        Raises:
            UserError: for a mistake of the user, where memory runs out, and when the training
                diverges again; its last good weights are then in ``last.safetensors``.
        """
        identity = json.loads(canonical(identity))
        fabric = self._fabric()
        fabric.launch()
        folder = fabric.broadcast(folder)
        if fabric.is_global_zero:
            remove_leftovers(folder)
        if progress is None or not fabric.is_global_zero:
            progress = NullProgress()
        if (folder / "summary.json").exists():
            summary = Summary.load(folder / "summary.json")
            require_identity(canonical(summary.identity), identity, folder)
            manifest.check(folder)
            remove_progress(folder)
            return summary
        products = tf32() if self.precision == "tf32" else full_float32()
        enough = self._enough_memory(fabric.device, fabric.world_size)
        with products, kernels(self.deterministic), enough:
            return Fit(
                settings=self,
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
                progress=progress,
                prepared=prepared,
            ).run()

    @contextmanager
    def _enough_memory(self, device: torch.device, devices: int) -> Iterator[None]:
        """Raises UserError where a device, or the machine, runs out of memory inside."""
        try:
            yield
        except RuntimeError as problem:
            if not out_of_memory(problem):
                raise
            half = max(1, self.batch_size // devices // 2) * devices
            smaller = [f"trainer.batch_size={half}"] if half < self.batch_size else []
            if self.precision != "bf16-mixed" and not emulates_bf16(device):
                smaller.append("trainer.precision=bf16-mixed")
            take = " or ".join(smaller or ["a smaller backbone"])
            raise UserError(f"out of memory: take {take}") from problem

    def _fabric(self) -> Fabric:
        with asking_for(self.accelerator, self.devices, self.num_nodes):
            # Not its precision: Fabric would round x' to bfloat16, by up to half of 1/255 near 1.
            return Fabric(
                accelerator=self.accelerator,
                strategy=self.strategy,
                devices=self.devices,
                num_nodes=self.num_nodes,
            )
