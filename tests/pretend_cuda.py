"""A pretended device: CPU tensors whose storages carry a tag, on a machine that has no GPU.

Numbers are real; only the books are made up. Inside ``pretending`` a function mode answers what
Python asks of devices, and a dispatch mode raises where CUDA would for tensors of two devices and
counts where the host would wait for the device:

    d2h     .cpu(), .tolist(), a copy to the host
    scalar  .item(), bool(), int()
    h2d     a copy to the device from memory that is not pinned; torch.tensor(..., device=)
    shape   results whose shape depends on values: nonzero, a boolean index
    equal   torch.equal
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils as foreach
from torch.utils._python_dispatch import TorchDispatchMode

HOME = torch.device("cuda", 0)
SHAPES = {"nonzero", "masked_select", "_unique2", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
GROUPED = "_group_tensors_by_device_and_dtype"
COPIES = {"_to_copy", "clone", "lift_fresh"}
# These take not even a CPU scalar beside tensors of the device.
STRICT = {
    "cat", "stack", "mm", "bmm", "addmm", "convolution", "convolution_backward", "gather",
    "scatter", "scatter_", "index_select", "take", "bucketize", "equal", "native_batch_norm",
}  # fmt: skip


def on_device(tensor: Tensor) -> bool:
    """By its storage, which views and saved tensors share."""
    try:
        return getattr(tensor.untyped_storage(), "pretended", False)
    except (NotImplementedError, RuntimeError):  # opaque
        return False


def put(tensor: Tensor, device: bool, pinned: bool = False) -> Tensor:
    """The tensor, tagged."""
    storage = tensor.untyped_storage()
    storage.pretended, storage.pinned = device, pinned  # pyright: ignore
    return tensor


def _tensors(*trees: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts; PyTorch's own way is many times slower."""
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


def _caller() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/advbench/")
        if found:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Waits(Counter[tuple[str, str]]):
    """How often the host waited, by kind and line of advbench."""

    def note(self, kind: str) -> None:
        self[kind, _caller()] += 1


class _Kernels(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits
        self.wanted: list[bool | None] = [None]  # what the Python call around asked for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.__name__.partition(".")[0], _tensors(args, kwargs)
        here = [on_device(tensor) for tensor in given]
        device = any(here)
        if device and not all(here):
            self._mixed(name, args, given, here)
        if device:
            self._look(name, args, given)
        out = func(*args, **(kwargs or {}))
        wanted = self.wanted[-1]
        if wanted is not None and (not given or name in COPIES or name.endswith("_like")):
            device = wanted
        for tensor in _tensors(out) if device else ():
            put(tensor, True)
        return out

    def _mixed(self, name: str, args: Any, given: list[Tensor], here: list[bool]) -> None:
        strays = [tensor for tensor, home in zip(given, here, strict=True) if not home]
        if name == "copy_":
            queued = len(args) > 2 and args[2] and getattr(given[1].untyped_storage(), "pinned", 0)
            if not queued:
                self.waits.note("h2d" if here[0] else "d2h")
        elif name in INDEXING and here[0]:
            for tensor in strays:
                if tensor.dtype in (torch.bool, torch.int64) and tensor.dim():
                    self.waits.note("h2d")
        elif name in INDEXING or name in STRICT or any(tensor.dim() for tensor in strays):
            raise RuntimeError(f"pretended: tensors of two devices in aten.{name}")

    def _look(self, name: str, args: Any, given: list[Tensor]) -> None:
        if name == "_local_scalar_dense":
            self.waits.note("scalar")
        elif name == "equal":
            self.waits.note("equal")
        elif name in SHAPES:
            self.waits.note("shape")
        elif name in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            number = "put" in name and not given[-1].dim()
            if masks and not number:
                self.waits.note("shape")


class _Words(TorchFunctionMode):
    def __init__(self, kernels: _Kernels) -> None:
        super().__init__()
        self.kernels, self.waits = kernels, kernels.waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            kwargs, what = kwargs or {}, func.__self__.__name__
            if what in ("device", "is_cuda", "is_cpu") and on_device(args[0]):
                return {"device": HOME, "is_cuda": True, "is_cpu": False}[what]
            return func(*args, **kwargs)
        kwargs = dict(kwargs or {})
        if name in ("to", "cpu", "cuda"):
            return self._to(name, args, kwargs)
        if name == "tolist" and on_device(args[0]):
            self.waits.note("d2h")
            return func(*args)
        if name in ("numpy", "__array__") and on_device(args[0]):
            raise TypeError("pretended: can't convert a cuda tensor to numpy")
        if name == "pin_memory":
            assert not on_device(args[0])
            return put(args[0].clone(), False, pinned=True)
        if name == "__deepcopy__":  # the copy of a storage looks like one to the host
            return put(self._silently(func, *args, **kwargs), on_device(args[0]))
        if name == "one_hot" and on_device(args[0]) and len(args) > 1:
            return self._silently(self._asking, True, func, *args, **kwargs)  # a CPU checks them
        wanted = any(map(on_device, _tensors(args, kwargs))) or None
        self._match(name, kwargs, bool(wanted))
        device = torch.device(kwargs.get("device") or "meta")
        if device.type != "meta":
            wanted, kwargs["device"] = device.type == "cuda", "cpu"
            if name in ("tensor", "as_tensor") and wanted:
                if isinstance(args[0], Tensor):
                    return self._to("to", (args[0], HOME), {})
                self.waits.note("h2d")
        elif name == "new_tensor" and wanted:
            self.waits.note("h2d")
        return self._asking(wanted, func, *args, **kwargs)

    def _silently(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        known = Waits(self.waits)
        made = func(*args, **kwargs)
        self.waits.clear()
        self.waits.update(known)
        return made

    def _match(self, name: str, kwargs: Any, home: bool) -> None:
        """Raises for a generator of another device than the draws."""
        if (generator := kwargs.get("generator")) is None:
            return
        if kwargs.get("device") is not None:  # it says where to draw
            home = torch.device(kwargs["device"]).type == "cuda"
        if getattr(generator, "pretended", False) != home:
            raise RuntimeError(f"pretended: a generator of another device in {name}")

    def _asking(self, wanted: bool | None, func: Any, *args: Any, **kwargs: Any) -> Any:
        self.kernels.wanted.append(wanted)
        try:
            return func(*args, **kwargs)
        finally:
            self.kernels.wanted.pop()

    def _to(self, name: str, args: Any, kwargs: Any) -> Tensor:
        source, *rest = args if name == "to" else (args[0], HOME if name == "cuda" else "cpu")
        copy, before = kwargs.pop("copy", False), on_device(source)
        if rest and isinstance(rest[0], Tensor):
            after, dtype, queued, layout = on_device(rest[0]), rest[0].dtype, False, None
        else:
            device, dtype, queued, layout = torch._C._nn._parse_to(*rest, **kwargs)  # pyright: ignore
            after = before if device is None else device.type == "cuda"
        how: dict[str, Any] = {"dtype": dtype or source.dtype}
        how |= {} if layout is None else {"memory_format": layout}
        if before == after:
            return self._asking(after, Tensor.to, source, copy=copy, **how)
        if not (queued and (before or getattr(source.untyped_storage(), "pinned", False))):
            self.waits.note("h2d" if after else "d2h")
        return put(self._asking(after, Tensor.to, source, copy=True, **how), after)


class _Generator(torch.Generator):
    """Of the CPU, with a tag."""

    pretended = False

    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls)
        self.pretended = torch.device(device).type == "cuda"
        return self


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _grouped(lists: Any, *args: Any) -> Any:
    """Gradients by device, which clipping takes from below Python."""
    found = foreach._group_tensors_by_device_and_dtype(lists, *args)
    return {
        (HOME if any(map(on_device, _tensors(group))) else device, dtype): group
        for (device, dtype), group in found.items()
    }


@contextmanager
def pretending() -> Iterator[Waits]:
    """Inside, there is one device, and the host's waits for it are counted."""
    waits = Waits()
    kernels = _Kernels(waits)
    properties = mock.Mock(major=9, minor=0, total_memory=2**37)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: waits.note("synchronize"),
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "pretended",
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (2**36, 2**37),
        "is_current_stream_capturing": lambda: False,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,  # it is the CPU's, which has its own
        "manual_seed_all": lambda seed: None,
    }
    with ExitStack() as stack:
        for name, stand_in in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        idle = mock.Mock(is_capturing=lambda: False)
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda: idle))
        stack.enter_context(mock.patch.object(clip_grad, GROUPED, _grouped))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(kernels)
        stack.enter_context(_Words(kernels))
        yield waits
