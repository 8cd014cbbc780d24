"""One hash for one model: equal where the models are, whatever it is that sets them apart."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn

from advbench.files import tensor_bytes

_LIBRARIES = ("torch", "torchvision", "timm", "advbench")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs from process to process


def model_sha256(model: nn.Module, seen: frozenset[int] = frozenset()) -> str:
    """Hash of a model: structure, settings, hooks, source of its classes, parameters and buffers.

    Source: of classes outside the installed libraries. What their functions call is not seen.
    seen: what it is part of, and is hashed already, by id.
    """
    # What every module has: its tensors, which are hashed by name, its hooks and its mode.
    common = set(vars(nn.Module()))
    seen |= {id(module) for module in model.modules()}
    digest = hashlib.sha256(_ADDRESS.sub("", repr(model)).encode())
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in common}
        own |= {key: [*hooks.values()] for key in _HOOKS if (hooks := getattr(module, key))}
        settings = sorted((key, said(value, seen)) for key, value in own.items())
        digest.update(f"{name}/{settings}".encode())
        if not _is_library(type(module)):
            with contextlib.suppress(OSError, TypeError):  # no source, as in a notebook
                digest.update(inspect.getsource(type(module)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def said(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A setting of a module in plain values that say all of it.

    Of an object of the installed libraries, what it prints: its insides may differ from process to
    process.  seen: what it is a setting of, by id.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        content = hashlib.sha256(value.tobytes()).hexdigest()
        return f"{value.dtype}/{value.shape}/{content}"
    if isinstance(value, Tensor):
        content = hashlib.sha256(tensor_bytes(value)).hexdigest()
        return f"{value.dtype}/{tuple(value.shape)}/{content}"
    if id(value) in seen:
        return None
    if isinstance(value, nn.Module):  # in a list, where it is not registered
        return model_sha256(value, seen)
    seen |= {id(value)}
    if isinstance(value, Mapping):
        return {str(key): said(part, seen) for key, part in value.items()}
    if isinstance(value, np.ndarray):  # of objects
        return said(value.tolist(), seen)
    if isinstance(value, Sequence) and not isinstance(value, bytes | range):
        return [said(part, seen) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(str(said(part, seen)) for part in value)
    return _object(value, seen)


def _object(value: Any, seen: frozenset[int]) -> Any:
    """A function, a class, or what has values of its own."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, functools.partial):
        return [said(part, seen) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [said(value.__func__, seen), said(value.__self__, seen)]
    if isinstance(value, types.FunctionType):  # which may hold itself, or a name not yet bound
        cells = (cell for cell in value.__closure__ or () if cell != types.CellType())
        held = [cell.cell_contents for cell in cells]
        return [said(part, seen) for part in
                (value.__code__, held, value.__defaults__, value.__kwdefaults__)]  # fmt: skip
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), said(value.co_consts, seen), list(value.co_names)]
    if isinstance(value, type | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    plain = isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value)
    if not plain and _is_library(kind):
        return [kind.__qualname__, _ADDRESS.sub("", repr(value))]
    slots = [name for base in kind.__mro__ for name in getattr(base, "__slots__", ())]
    own = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return [kind.__qualname__, said({**own, **getattr(value, "__dict__", {})}, seen)]


def _is_library(kind: type) -> bool:
    """Whether a class is the language's, or an installed library's."""
    root = kind.__module__.partition(".")[0]
    if root in _LIBRARIES or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return "site-packages" in file
