"""Loads weights: strictly from a run, and flexibly from other checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from advbench.errors import UserError, describe
from advbench.runs.manifest import belongs, checked

HARMLESS = ("num_batches_tracked", "n_averaged", "_extra_state", "total_ops", "total_params")
"""Last words of keys on which no output in evaluation mode depends; counters and notes."""

DEEPEST = 3  # dictionaries inside each other in which weights are looked for
NAMED = 3  # keys that a message names


@dataclass(frozen=True)
class Fit:
    """How the tensors of a checkpoint fit a model."""

    state: Mapping[str, Any]
    """The tensors, under the model's own names."""
    strip: str = ""
    """The prefix that was taken off the checkpoint's names."""
    add: str = ""
    """The prefix that was put before the checkpoint's names."""
    left_out: tuple[str, ...] = ()
    """Keys of the checkpoint that the model does not have."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a run, whose names are the model's.

    A buffer that is not part of the model's state, such as a jump that was given as a number, keeps
    its value, also where the run holds one that was chosen.

    Raises:
        UserError: The file can't be read, or names or shapes differ; the first are named.
    """
    buffers = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    state = {name: tensor for name, tensor in read_weights(path).items() if name not in buffers}
    problems = _differences(model.state_dict(), state)
    if problems:
        raise _no_match(path, problems)
    model.load_state_dict(state, strict=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing but tensors by name.

    Raises:
        UserError: The file is missing or damaged, or holds something else.
    """
    content = _read(path)
    if not _is_state(content):
        raise UserError(f"'{path}' holds no state_dict: save model.state_dict()")
    return dict(content)


def load_checkpoint(model: nn.Module, spec: str) -> list[str]:
    """Load a checkpoint into the user's model, and report what was done beyond loading.

    Weights that match without changes have priority. Otherwise they may be inside other
    dictionaries (``state_dict``, ``model``, ``net``, ...), and their names may differ by one prefix
    (``module.``, ``_orig_mod.``, ``model.``, ...). Other tensors may be beside them.

    Args:
        model: the model, built.
        spec: a file, or FILE:KEY where a file holds several sets of weights that fit.

    Returns:
        What was done beyond loading, a line each; nothing for weights that match as they are.

    Raises:
        UserError: Nothing in the file fits, or several sets of weights do.
    """
    path, key = _split(spec)
    content, expected = _read(path), model.state_dict()
    states = dict(_states(content))
    if not states:
        raise UserError(f"'{path}' holds no state_dict: save model.state_dict()")
    fits = {
        f"{name}.{fit.strip}".strip("."): (name, fit)
        for name, state in states.items()
        for fit in _fits(expected, state)
    }
    if key is not None:
        chosen = {label: fit for label, fit in fits.items() if f"{label}.".startswith(f"{key}.")}
        if not chosen:
            labels = ", ".join(label for label in fits if label) or "none that can be named"
            raise UserError(f"'{path}' has no weights '{key}' that fit; there are: {labels}")
        fits = chosen
    if "" in fits:
        fits = {"": fits[""]}
    if not fits:
        name, problems = _nearest(expected, states)
        inside = f" (in '{name}')" if name else ""
        raise _no_match(path, problems, inside)
    if len(fits) > 1:
        raise UserError(
            f"'{path}' holds several sets of weights that fit: {', '.join(map(repr, fits))}; "
            f"choose one, such as weights={path}:{next(iter(fits))}"
        )
    ((name, fit),) = fits.values()
    model.load_state_dict(fit.state, strict=False)
    return [f"weights: {line}" for line in _told(name, fit, expected)]


def _split(spec: str) -> tuple[Path, str | None]:
    """The file, and the key behind it if there is one."""
    file, colon, key = spec.rpartition(":")
    if colon and not Path(spec).exists() and Path(file).is_file():
        return Path(file), key
    return Path(spec), None


def _read(path: Path) -> Any:
    """The content of a safetensors file or of a pickle; nothing in the file is executed."""
    if not path.is_file() and not belongs(path):
        raise UserError(f"there are no weights at '{path}'")
    try:
        if checked(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except SafetensorError as problem:
        raise UserError(f"'{path}' is not a safetensors file: {problem}") from problem
    except Exception as problem:
        text = str(problem)
        if "TorchScript" in text:
            raise UserError(
                f"'{path}' is a TorchScript model, not weights: load it in a factory of your own "
                "with torch.jit.load, and give model=FILE.py:FACTORY alone"
            ) from problem
        if any(word in text for word in ("GLOBAL", "Unsupported class")):
            raise UserError(
                f"'{path}' is refused: it holds more than tensors, and loading it would run code; "
                "save model.state_dict() instead"
            ) from problem
        raise UserError(f"'{path}' is not a file of weights: {describe(problem)}") from None


def _is_state(content: Any) -> bool:
    """Whether it is tensors by name, as ``state_dict`` returns them."""
    return (
        isinstance(content, Mapping)
        and all(isinstance(key, str) for key in content)
        and any(isinstance(value, Tensor) for value in content.values())
        and all(
            isinstance(value, Tensor) or key.endswith("_extra_state")
            for key, value in content.items()
        )
    )


def _states(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping]]:
    """All sets of weights inside a checkpoint, by the keys that lead to them."""
    if not isinstance(content, Mapping):
        return
    if _is_state(content):
        yield name, content
    elif depth < DEEPEST:
        for key, value in content.items():
            yield from _states(value, f"{name}.{key}" if name else str(key), depth + 1)


def _fits(expected: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[Fit]:
    """How the tensors fit the model: as they are, or with one prefix less or more."""
    if not _differences(expected, state):
        yield Fit(state)
        return
    for strip in _prefixes(state):
        inside = {key.removeprefix(strip): v for key, v in state.items() if key.startswith(strip)}
        for add in ["", *_common_prefixes(expected)]:
            renamed = {add + key: value for key, value in inside.items()}
            placed = {key: value for key, value in renamed.items() if key in expected}
            lacking = [key for key in expected if key not in placed and not _harmless(key)]
            if lacking or _wrong_shapes(expected, placed):
                continue
            # Under a prefix there may be other nets; beside the names as they are, only counters.
            outside = [key for key in state if not key.startswith(strip)]
            outside += [strip + key.removeprefix(add) for key in renamed if key not in expected]
            if not strip and not add and not all(map(_harmless, outside)):
                continue
            if any(not _harmless(key) for key in renamed if key not in expected):
                continue
            yield Fit(placed, strip, add, tuple(outside))
            if not strip:  # nothing else would be as near
                return
            break


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """What the names may begin with beside the model's own, the shortest first."""
    prefixes = {""}
    for key in state:
        parts = key.split(".")[:-1][:DEEPEST]
        prefixes |= {".".join(parts[: i + 1]) + "." for i in range(len(parts))}
    return sorted(prefixes, key=len)


def _common_prefixes(expected: Mapping[str, Any]) -> list[str]:
    """What all names of the model begin with, as those of a wrapped model do."""
    return [p for p in _prefixes(expected) if p and all(key.startswith(p) for key in expected)]


def _harmless(key: str) -> bool:
    return key.rpartition(".")[2] in HARMLESS


def _wrong_shapes(expected: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Keys whose tensors have another shape than the model's."""
    return [
        key
        for key, value in expected.items()
        if key in state
        and isinstance(value, Tensor)
        and getattr(state[key], "shape", None) != value.shape
    ]


def _differences(expected: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """What keeps the tensors from being the model's, in words."""
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    shapes = [
        f"'{key}' is {tuple(state[key].shape)} and should be {tuple(expected[key].shape)}"
        for key in _wrong_shapes(expected, state)
    ]
    return [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ] + shapes[:1]


def _nearest(
    expected: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]
) -> tuple[str, list[str]]:
    """The set of weights that lacks the least, and what it lacks."""

    def lacking(name: str) -> int:
        best = len(expected)
        for prefix in _prefixes(states[name]):
            have = sum(prefix + key in states[name] for key in expected)
            best = min(best, len(expected) - have)
        return best

    name = min(states, key=lacking)
    state = states[name]
    prefix = max(_prefixes(state), key=lambda p: sum(p + key in state for key in expected))
    inside = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    return name, _differences(expected, inside)


def _no_match(path: Path, problems: list[str], inside: str = "") -> UserError:
    return UserError(
        f"the weights in '{path}'{inside} do not match the model; {'; '.join(problems)}"
    )


def _listed(keys: list[str] | tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, keys[:NAMED]))}{', ...' if len(keys) > NAMED else ''}"


def _told(name: str, fit: Fit, expected: Mapping[str, Any]) -> Iterator[str]:
    """What was done to load the weights."""
    done = []
    if name:
        done.append(f"taken from '{name}'")
    if fit.strip:
        done.append(f"'{fit.strip}' taken off their names")
    if fit.add:
        done.append(f"'{fit.add}' put before their names")
    if done:
        yield ", ".join(done)
    if fit.left_out:
        yield f"{len(fit.left_out)} left out that the model does not have: {_listed(fit.left_out)}"
    unchanged = [key for key in expected if key not in fit.state]
    if unchanged:
        yield f"{len(unchanged)} counters not in the file: {_listed(unchanged)}"
