"""The devices of a machine, as lightning-fabric hands them out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from advbench.errors import UserError

# cuBLAS reads it once, at its first call, and is reproducible only with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LAUNCHED = ("WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")
"""Variables by which a launcher, or a person in its place, says who the others are."""

BF16_FLAGS = frozenset(("amx_bf16", "avx512_bf16", "bf16", "svebf16"))
"""By which a processor, of Intel's kind or Arm's, says that it multiplies bfloat16 itself."""

ALWAYS = 4
"""As many processes may share any CPU: slow, and good to try a command out."""

NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate",
    "alloc_failed",  # cuBLAS, cuDNN
    "unable to find an engine to execute this computation",  # cuDNN, none of whose fits
)
"""What errors say that mean: no memory left."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextmanager
def asking_for(accelerator: str, devices: int | str, num_nodes: int = 1) -> Iterator[None]:
    """Turns lightning-fabric's errors inside the block about unavailable devices into one line.

    Two requests are refused before the block, because lightning-fabric would accept them silently:
    several machines without a launcher, for which it would wait, and more processes on a CPU than
    the CPU has processors.

    Args:
        accelerator: ``auto``, ``cpu``, ``gpu``, ...
        devices: a number, a list, or ``auto``.
        num_nodes: machines.

    Raises:
        UserError: these devices are not available.
    """
    if not any(name in os.environ for name in LAUNCHED):
        _check_alone(accelerator, devices, num_nodes)
    try:
        yield
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(
            f"trainer.accelerator={accelerator} with trainer.devices={devices} "
            f"is not available here: {reason:.200}"
        ) from problem


def _check_alone(accelerator: str, devices: int | str, num_nodes: int) -> None:
    """Raises UserError for what needs a launcher, and for too many processes on a CPU."""
    if num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={num_nodes} needs a launcher, which starts the same command on "
            "each machine: torchrun --nnodes, or srun"
        )
    if accelerator not in ("auto", "cpu") or not str(devices).lstrip("-").isdigit():
        return
    if accelerator == "auto" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return
    most = max(ALWAYS, os.cpu_count() or 1)
    if not 1 <= int(devices) <= most:
        raise UserError(
            f"trainer.devices={devices} on a CPU must be a number of processes, 1 to {most}"
        )


def name_of(device: torch.device) -> str:
    """``cpu``, or the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def in_company() -> bool:
    """Whether this process is one of a group, which may talk through ``torch.distributed``."""
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the first of its run's, as torchrun, Fabric and srun tell it."""
    ranks = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")]
    return int(next((rank for rank in ranks if rank), "0")) == 0


def speaks(message: str) -> bool:
    """Whether this is the process to say it: of those of a run, the first that asks."""
    if not in_company():
        return True
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(f"advbench says: {message}", 1) == 1
    except RuntimeError:  # the store ended with the first process, which has spoken
        return is_first()


def processors(key: str) -> list[str]:
    """What Linux says of each processor under ``key``, such as "flags"; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def emulates_bf16(device: torch.device) -> bool:
    """Whether bfloat16 costs this device more than float32, for want of instructions.

    Of a processor that names no flags, as outside Linux, yes: float32 is never far behind.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major < 8
    flags = " ".join(processors("flags") or processors("Features")).split()
    return device.type == "cpu" and BF16_FLAGS.isdisjoint(flags)


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    text = str(problem).lower()
    return isinstance(problem, torch.OutOfMemoryError) or any(words in text for words in NO_MEMORY)


@contextmanager
def full_float32() -> Iterator[None]:
    """Make float32 mean float32 inside: no TF32 on a GPU, no bfloat16 products on a CPU."""
    with _products("ieee"):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """Multiply float32 matrices in TF32 inside, on a GPU: ten bits of mantissa, several times the
    speed. A CPU stays in float32.
    """
    with _products("tf32"):
        yield


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in TF32: NVIDIA's from Ampere on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_properties(device).major >= 8


@contextmanager
def _products(mode: str) -> Iterator[None]:
    """Products of float32 as ``ieee`` or ``tf32`` inside.

    PyTorch has two sets of switches for it, and reading the older one raises where the user has set
    the newer one (2.9 and later). The older ones are set all the same: libraries read them.
    """
    backends: Any = torch.backends
    older = [(backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32")]
    parts = ((backends.cudnn, ("conv", "rnn")), (backends.mkldnn, ("conv", "rnn", "matmul")))
    newer = [
        (getattr(part, name), "fp32_precision", mode if part is backends.cudnn else "ieee")
        for part, names in parts
        for name in names
        if hasattr(getattr(part, name, None), "fp32_precision")
    ]
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        newer.append((backends.cuda.matmul, "fp32_precision", mode))
    before: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    # In the order of restoring: each older switch writes into newer ones too.
    for holder, name in older:
        with suppress(RuntimeError):  # the user has set the newer one
            before.append((setattr, (holder, name, getattr(holder, name))))
    with suppress(RuntimeError):
        before.append((torch.set_float32_matmul_precision, (torch.get_float32_matmul_precision(),)))
    before += [(setattr, (holder, name, getattr(holder, name))) for holder, name, _ in newer]
    try:
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        for holder, name in older:
            setattr(holder, name, mode == "tf32")
        for holder, name, value in newer:
            setattr(holder, name, value)
        yield
    finally:
        torch.set_float32_matmul_precision("highest")  # the default, where it could not be read
        for restore, arguments in before:
            restore(*arguments)


@contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Which kernels PyTorch takes on a GPU: the reproducible ones, or the fastest by trial."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic or before[0])
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


WITH_GRAPHS = frozenset({"cuda"})
"""Devices on which a compiled model may hand out the same memory at every call."""


def kept(output: Any) -> Any:
    """A copy of what a compiled model or its backward pass returned, to use after its next call.

    The results of a CUDA graph, as in some modes of ``torch.compile``, lie in the same memory at
    every call. Where there are no graphs, nothing is copied.

    Args:
        output: a tensor, a tuple of tensors, or anything else, which comes back as it is.
    """
    if isinstance(output, tuple):
        return tuple(map(kept, output))
    reused = isinstance(output, torch.Tensor) and output.device.type in WITH_GRAPHS
    return output.clone() if reused else output


def several_backward_passes(compiled: bool) -> AbstractContextManager[Any]:
    """Inside, a forward pass of a model that is compiled there may have several backward passes.

    By default a compiled backward pass may write over what it needs, and a second one, such as
    untargeted FAB makes for each class, raises an error.

    Args:
        compiled: whether such a model is used at all.
    """
    if not compiled:
        return nullcontext()
    from torch._functorch import config

    return config.patch(donated_buffer=False)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the next one.

    It returns large blocks to the system, and taking their pages anew costs a CPU up to a tenth of
    a small net's time.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for what, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(what, size)
