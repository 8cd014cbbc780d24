"""One hash for one model: structure, source, settings and tensors.

What the hash can't see, such as what a function closes over or reads from outside of the module, an
evaluation sees in the model's logits (``advbench.evaluation.identity``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from advbench.files import tensor_bytes

_LIBRARIES = ("torch", "torchvision", "timm", "advbench")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs from process to process


def model_sha256(model: nn.Module, seen: frozenset[int] = frozenset()) -> str:
    """Hash of a model: structure, settings, presence of hooks, source of its classes, tensors.

    Args:
        model: any module. Source is that of classes outside the installed libraries.
        seen: what the model is part of, and is hashed already, by id.
    """
    # What every module has: its tensors, which are hashed by name, its hooks and its mode.
    common = set(vars(nn.Module()))
    seen |= {id(module) for module in model.modules()}
    digest = hashlib.sha256(_ADDRESS.sub("", repr(model)).encode())
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in common}
        own |= {key: len(hooks) for key in _HOOKS if (hooks := getattr(module, key))}
        settings = sorted((key, plain(value, seen)) for key, value in own.items())
        digest.update(f"{name}/{settings}".encode())
        if not _is_library(type(module)):
            with contextlib.suppress(OSError, TypeError):  # no source, as in a notebook
                digest.update(inspect.getsource(type(module)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def plain(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A setting of a module in plain values; of an object, its type and what it prints.

    seen: what it is a setting of, by id.
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
        return {str(key): plain(part, seen) for key, part in value.items()}
    if isinstance(value, np.ndarray):  # of objects
        return plain(value.tolist(), seen)
    if isinstance(value, Sequence) and not isinstance(value, bytes | range):
        return [plain(part, seen) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(str(plain(part, seen)) for part in value)
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    if dataclasses.is_dataclass(value):
        named = {
            field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)
        }
        return [kind.__qualname__, plain({**named, **getattr(value, "__dict__", {})}, seen)]
    return [kind.__qualname__, _ADDRESS.sub("", repr(value))]


def _is_library(kind: type) -> bool:
    """Whether a class is the language's, or an installed library's."""
    root = kind.__module__.partition(".")[0]
    if root in _LIBRARIES or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return "site-packages" in file
