"""Files of a training: weights as safetensors, and the state that it is resumed from."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from advbench.errors import UserError
from advbench.files import canonical, remove_temporary, write_atomic
from advbench.runs.manifest import Damaged, read_sealed, write_sealed

LAST = "last.safetensors"
"""The weights of the last epoch."""
METRICS = "metrics.csv"
"""A row for each epoch."""
UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError,
    AttributeError, OSError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a damaged file of an earlier version, which has no checksum, may raise."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and persistent buffers of a model; shared ones under each name."""
    # Copies: safetensors takes neither views nor two names for one memory.
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }


def save_weights(weights: nn.Module | dict[str, Tensor], path: Path) -> None:
    """Write the weights of a model, or what ``weights_of`` gave of it, atomically."""
    values = weights_of(weights) if isinstance(weights, nn.Module) else weights
    write_atomic(path, lambda temporary: save_file(values, temporary))


def read_best(path: Path) -> dict[str, Tensor]:
    """The weights of the best epoch, of a run that was interrupted under an earlier version.

    Args:
        path: ``best.safetensors`` of that run.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise UserError(
            f"'{path}' is damaged ({problem}): remove '{path.parent}' to train again"
        ) from None


def save_resume(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write what a training is resumed from, with its checksum.

    state: tensors, numbers, strings, and lists and dicts of these.
    """
    content = {"identity": canonical(identity), "state": dict(state)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # of a full disk, a path would hide the system's error
            torch.save(content, file)

    write_sealed(path, write)


def load_resume(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state, with tensors on the CPU; None where there is no file. Runs no code of the file.

    Raises:
        UserError: if the file is damaged, or was saved by a run of another identity.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(read_sealed(path)[0], map_location="cpu", weights_only=True)
        saved, state = content["identity"], content["state"]
    except (Damaged, *UNREADABLE) as problem:
        raise UserError(
            f"'{path}', where this run would go on, is damaged or another run's: remove it to "
            "start again"
        ) from problem
    require_identity(saved, identity, path.parent)
    return state


class Checkpoints:
    """The two files that a training is resumed from.

    ``epoch.pt`` is the state at the start of the epoch that runs, which a diverged epoch goes back
    to, with the weights of the ``best`` epoch so far; ``resume.pt``, where it is there, a state
    inside that epoch. A state has a ``position``.

    Args:
        writes: whether this process does; all of them read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], writes: bool) -> None:
        self._start, self._inside = folder / "epoch.pt", folder / "resume.pt"
        self._identity = identity
        self._writes = writes

    def newest(self) -> dict[str, Any] | None:
        """The state to resume from; None if nothing was started.

        Raises:
            UserError: as ``load_resume``.
        """
        start = load_resume(self._start, self._identity)
        inside = load_resume(self._inside, self._identity)
        if start is None or inside is None:
            return start
        # Killed before it was removed, the one inside is of the epoch before, or of the attempt.
        same = all(start["position"][key] == inside["position"][key] for key in ("epoch", "guards"))
        best = {key: start[key] for key in ("best",) if key in start}
        return {**inside, **best} if same else start

    def start(self) -> dict[str, Any]:
        """The state at the start of the epoch that runs."""
        state = load_resume(self._start, self._identity)
        assert state is not None, "it was written before the epoch began"
        return state

    def save_start(self, state: Mapping[str, Any]) -> None:
        if self._writes:
            save_resume(self._start, state, self._identity)
            self._inside.unlink(missing_ok=True)

    def save_inside(self, state: Mapping[str, Any]) -> None:
        if self._writes:
            save_resume(self._inside, state, self._identity)


def remove_progress(folder: Path) -> None:
    """Removes what a finished training needs no more."""
    for name in ("resume.pt", "epoch.pt"):
        (folder / name).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while it wrote a file has left beside it."""
    remove_temporary(folder)
    for temporary in folder.glob(".tmp*"):  # of safetensors itself
        temporary.unlink(missing_ok=True)


def require_identity(saved: str, identity: Mapping[str, Any], folder: Path) -> None:
    """Check that a file is of this run.

    Args:
        saved: the identity in the file, as canonical JSON.
        identity: of this run.
        folder: of the run, for the message.

    Raises:
        UserError: if they differ.
    """
    if saved != canonical(identity):
        raise UserError(f"{folder} holds another run: take another hydra.run.dir, or remove it")
