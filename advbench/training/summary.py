"""The summary of a finished training: summary.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from advbench.attacks.threat import Threat
from advbench.errors import UserError
from advbench.runs import manifest

SCHEMA = "advbench.training/1"


@dataclass(frozen=True)
class Summary:
    """The outcome of a training; the file exists exactly if the training is finished."""

    identity: Mapping[str, Any]
    """What the caller named the run by."""
    epochs: int
    """Finished epochs; fewer than configured where a guard stopped the training."""
    steps: int
    """Finished steps."""
    best_epoch: int
    """The epoch of ``model.safetensors``, from 1."""
    selected_by: str
    """Which accuracy chose the best epoch."""
    val: Mapping[str, Any]
    """On the validation split, of the best epoch: ``n`` samples, ``clean`` and ``robust`` accuracy
    in [0, 1], and the ``attack``; the last two are None where there is no threat, or it is l1.
    Chosen as the best of all epochs, and so on the high side."""
    last: Mapping[str, Any]
    """The same of the last epoch, whose weights are ``last.safetensors``."""
    guards: Mapping[str, Any]
    """What the guards detected, {} for a sound training. ``diverged``: the ``epoch`` whose start
    the training went back to, ``why``, and the factor of the learning ``rate`` from there on.
    ``catastrophic_overfitting``: the epoch after which it was stopped, and the accuracies that show
    it. ``robust_overfitting``: the fall of the robust accuracy, from the ``best`` epoch to the
    ``last``."""
    seconds: float
    """Work, over all sessions."""
    parameters: int
    """The number of parameters."""
    torch: str
    """The version of PyTorch."""
    device: str
    """The name of the device."""
    devices: int
    """The number of processes."""
    precision: str
    """``32-true`` or ``bf16-mixed``."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """What the defense chose on the finished model, by parameter, {} if nothing; ``val`` and
    ``last`` are of the models with it."""
    schema: str = SCHEMA
    """Of the file."""

    def save(self, path: Path, belonging: Iterable[str] = ()) -> None:
        """Write summary.json atomically, with its checksum and those of files beside it."""
        values = asdict(self)
        manifest.write_json(path, {"schema": values.pop("schema"), **values}, belonging)

    @classmethod
    def load(cls, path: Path) -> Summary:
        """Read a summary.json of a training.

        Raises:
            UserError: for a file of another kind or content.
        """
        try:
            values = manifest.read_json(path)
            if values["schema"] != SCHEMA:
                raise UserError(f"{path} has schema {values['schema']!r}, not {SCHEMA!r}")
            return cls(**{"last": {}, "guards": {}, **values})  # the first versions had none
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{path} is not the summary of a training: {problem}") from problem


def measured(row: Mapping[str, float], n: int, steps: int, threat: Threat | None) -> dict[str, Any]:
    """What a row of metrics.csv says of the validation samples, n of them, under PGD of ``steps``
    steps where robust accuracy was measured.
    """
    robust = row.get("val_robust")
    attack = None if robust is None else f"PGD-{steps}, {threat}"
    return {"n": n, "clean": row["val_clean"], "robust": robust, "attack": attack}
