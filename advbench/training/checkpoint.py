"""Files of a training: weights as safetensors, and ``resume.pt`` to go on after an interruption."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from advbench.errors import UserError
from advbench.files import canonical, write_atomic


def save_weights(model: nn.Module, path: Path) -> None:
    """The parameters and persistent buffers of a model, atomically; shared ones under each name."""
    # Copies: safetensors takes neither views nor two names for one memory.
    values = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    write_atomic(path, lambda temporary: save_file(values, temporary))


def save_resume(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """state: tensors, numbers, strings, and lists and dicts of these."""
    content = {"identity": canonical(identity), "state": dict(state)}
    write_atomic(path, lambda temporary: torch.save(content, temporary))


def load_resume(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state, with tensors on the CPU; None where there is no file. Runs no code of the file.

    Raises UserError if the file is damaged, or was saved by a run of another identity.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved, state = content["identity"], content["state"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as problem:
        raise UserError(
            f"cannot read {path}, where this run would go on: remove it to start again"
        ) from problem
    require_identity(saved, identity, path.parent)
    return state


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while it wrote a file has left beside it."""
    # The second pattern is what safetensors itself leaves when it is killed while it writes.
    for temporary in (*folder.glob(".*.tmp"), *folder.glob(".tmp*")):
        temporary.unlink(missing_ok=True)


def require_identity(saved: str, identity: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError unless the canonical JSON ``saved`` is that of ``identity``."""
    if saved != canonical(identity):
        raise UserError(f"{folder} holds another run: take another hydra.run.dir, or remove it")
