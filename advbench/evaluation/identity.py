"""The identity of an evaluation: all that decides its records, and a few of its logits.

The identity is what is named and hashed. Hashes do not see what a model's forward uses outside of
its module: a net of the Python file's own, an environment variable, a helper elsewhere. Its logits
do, so a plan keeps those of a few images, and they are compared wherever records are used again.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advbench.devices import kept
from advbench.evaluation.groups import groups
from advbench.evaluation.job import Job
from advbench.files import file_sha256, short_hash

NUM_IMAGES = 8
"""Images whose logits are kept, as they are and with noise."""
NOISE = 0.1
"""Half-width of the noise, in pixel units: a model may differ off the data's grid alone."""
TOLERANCE = 5e-3
"""Of a row's spread: other machines and batch sizes round differently, by less than this."""


def versions() -> dict[str, str]:
    """The versions of the libraries, and a hash of the code, that decide the records."""
    names = ("advbench", "torch", "pyautoattack", "torchattacks")
    return {name: version(name) for name in names} | {"search": _code_sha256()}


@cache
def _code_sha256() -> str:
    """Hash of the code that decides the records; it also tells commits of one version apart."""
    home, parts = Path(__file__).parents[1], ("attacks", "backbones", "defenses", "evaluation")
    files = (file for part in parts for file in sorted((home / part).glob("*.py")))
    return short_hash([file_sha256(file) for file in files])


@torch.no_grad()
def behaviour(job: Job) -> dict[str, Any]:
    """Logits of the model, and of models of other weights, on a few fixed images.

    Returns:
        By name, ``model`` or that of the surrogate: shape, and the float32 values in base64.
        Nothing for a stochastic model, whose logits are never the same.
    """
    if job.traits.stochastic:
        return {}
    batches = groups(job)
    rows = job.samples.ids[:NUM_IMAGES] if batches is None else batches[0].rows
    x = job.samples.fetch(rows).x
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    noisy = (x + NOISE * (2 * noise - 1)).clamp(0, 1)
    victims = {"model": job.model}
    victims |= {name: s.model for name, s in job.surrogates.items() if s.transfer}
    return {
        name: _packed(
            torch.cat([kept(model(part.clone()))[:NUM_IMAGES].float() for part in (x, noisy)])
        )
        for name, model in victims.items()
    }


def has_tensors(model: nn.Module) -> bool:
    """Whether a hash of its tensors says anything."""
    return any(True for _ in (*model.parameters(), *model.buffers()))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The differences between two saved plans; [] if they are the same evaluation.

    The versions of the code are left out: which were at work is written beside the results.

    Args:
        ours: of the evaluation that is wanted.
        theirs: of the one that exists. One of an earlier version may have no ``behaviour``; then
            the hashes decide.
    """
    their_identity = theirs["identity"]
    differing = [
        key for key, value in ours["identity"].items()
        if key != "versions" and their_identity.get(key) != value
    ]  # fmt: skip
    if list(map(essence, stages_of(ours))) != list(map(essence, stages_of(theirs))):
        differing.append("stages")
    return differing + behaves_otherwise(ours, theirs)


def keeps_images(plan: Mapping[str, Any]) -> bool:
    """Whether the evaluation of a saved plan keeps its adversarial images."""
    default = plan.get("identity", {}).get("keep_images", False)  # where earlier versions said so
    return bool(plan.get("keep_images", default))


def essence(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a stage's outcome, as it stands in a plan."""
    return {key: value for key, value in stage.items() if key != "why"}


def stages_of(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a plan, as they stand in a file, with those that may follow."""
    return [*plan["stages"], *plan.get("follow_ups", ())]


def behaves_otherwise(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The victims whose logits differ by more than rounding, in words."""
    their_logits, changes = theirs.get("behaviour"), []
    if their_logits is None:
        return changes if ours.get("tensors", True) else ["behaviour, of which nothing was kept"]
    for name, packed in (ours.get("behaviour") or {}).items():
        if name not in their_logits or their_logits[name]["shape"] != packed["shape"]:
            changes.append(f"behaviour of {name}")
            continue
        gap = _largest_gap(*(_unpacked(one) for one in (packed, their_logits[name])))
        if gap > TOLERANCE:
            changes.append(f"behaviour of {name}: its logits changed by {gap:.0%} of their spread")
    return changes


def _largest_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two logits, (N, K), as a share of its row's spread."""
    finite = np.isfinite(ours) & np.isfinite(theirs)
    if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True):
        return np.inf
    our_finite = np.where(finite, ours, 0.0).astype(np.float64)
    gap = np.abs(our_finite - np.where(finite, theirs, 0.0))
    # Of a row without a spread, rounding is relative to its size.
    spread = np.maximum(np.ptp(our_finite, 1), 1e-3 * np.abs(our_finite).max(1) + 1e-12)
    return float((gap.max(1) / spread).max())


def _packed(logits: Tensor) -> dict[str, Any]:
    values = logits.cpu().numpy().astype("<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def _unpacked(packed: Mapping[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(packed["float32"]), "<f4")
    return values.reshape(packed["shape"])
