#!/usr/bin/env python
"""The machine: self-tests, what the card can do at most, what a ResNet-18 gets of it, and waits.

    python scripts/gpu/check.py [--tiny]

ceilings      bytes copied per second, multiplications per second of an 8192^3 product
passes-*      forward passes, and passes with an input gradient, of a ResNet-18: images per second
              by batch size, memory layout, precision, eager and as a CUDA graph; share of the peak
waits-*       synchronisations per query of each attack (torch.cuda.set_sync_debug_mode)
agree-*       the same attack on CPU and card: samples broken by one and not by the other
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from sitting import Sitting, advbench, device, parser, wait
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import advbench as package
from advbench.attacks.threat import Threat
from advbench.backbones.convnet import convnet
from advbench.backbones.resnet import resnet18
from advbench.devices import full_float32
from advbench.evaluation.protocols import AutoAttackProtocol

SHAPE = {"num_classes": 10, "input_shape": [3, 32, 32], "mean": [0.5], "std": [0.25]}
BATCHES = (16, 64, 256, 512, 1024, 2048)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PRECISIONS = ("float32", "tf32", "bf16-autocast", "bf16-weights")
MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")


def seconds(work: Callable[[], Any], least: float) -> float:
    """Of one call, on average over at least that many seconds."""
    work()
    wait()
    calls, begin = 0, perf_counter()
    while perf_counter() - begin < least:
        for _ in range(3):
            work()
        calls += 3
        wait()
    return (perf_counter() - begin) / calls


def ceilings(tiny: bool) -> Mapping[str, Any]:
    size = 256 if tiny else 8192
    big = torch.rand(2**20 if tiny else 2**30, device=device())
    other = torch.empty_like(big)
    copied = 2 * big.numel() * 4 / seconds(lambda: other.copy_(big), 0.2)
    found = {"copy_GBps": copied / 1e9}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        a, b = (torch.rand(size, size, device=device(), dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        found[f"{name}_TFLOPs"] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b, 0.2) / 1e12
    torch.set_float32_matmul_precision("highest")
    return found


def model_of(tiny: bool) -> nn.Module:
    torch.manual_seed(0)
    build = convnet if tiny else resnet18
    return build(**SHAPE).build().eval().requires_grad_(False).to(device())


def passes(precision: str, layout: str, graph: bool, tiny: bool) -> Mapping[str, Any]:
    """Thousands of images per second, forward alone and with an input gradient, by batch."""
    model = model_of(tiny).to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    model = model.to(dtype)
    found: dict[str, Any] = {"forward_kps": {}, "both_kps": {}}
    strict = nullcontext() if precision == "tf32" else full_float32()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    autocast = partial(
        torch.autocast, device().type, torch.bfloat16, enabled=precision == "bf16-autocast"
    )
    with strict:
        for batch in BATCHES[:2] if tiny else BATCHES:
            x = torch.rand(batch, *SHAPE["input_shape"], device=device(), dtype=dtype)
            x = x.contiguous(memory_format=LAYOUTS[layout])

            @torch.no_grad()
            def forward(x: Tensor = x) -> Tensor:
                with autocast():
                    return model(x)

            def both(x: Tensor = x) -> Tensor:
                with autocast():
                    point = x.detach().requires_grad_()
                    return torch.autograd.grad(model(point).float().logsumexp(1).sum(), point)[0]

            for what, work in (("forward_kps", forward), ("both_kps", both)):
                call = graphed(work) if graph else work
                found[what][batch] = batch / seconds(call, 0.05 if tiny else 0.3) / 1e3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    # The backward pass to the input costs as much as the forward pass.
    most = max(found["both_kps"].values()) * 1e3
    found["both_TFLOPs"] = 2 * counter.get_total_flops() * most / 1e12
    return found


def graphed(work: Callable[[], Tensor]) -> Callable[[], Any]:
    """The work as a CUDA graph, captured after a few calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def problem(tiny: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with random weights, images, and the classes that it gives them."""
    model, n = model_of(tiny), 8 if tiny else 64
    x = torch.rand(n, *SHAPE["input_shape"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = torch.cat([model(part.to(device())) for part in x.split(64)]).argmax(1)
    return model, x.to(device()), y


def changed(model: nn.Module, x: Tensor, y: Tensor, member: str) -> Tensor:
    """Which images one member of AutoAttack broke, (N,), on the CPU."""
    protocol: Any = AutoAttackProtocol(attacks=[member])
    images = package.attack(model, x, y, Threat("linf", 2e-3), protocol)
    return (images != x).flatten(1).any(1).cpu()


def waits(member: str, tiny: bool) -> Mapping[str, Any]:
    """Warnings of the sync debug mode while one member attacks, per query of its search."""
    model, x, y = problem(tiny)
    protocol = AutoAttackProtocol(attacks=[member])
    if device().type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = package.evaluate(model, x, y, threat=Threat("linf", 1e-4), protocol=protocol)
    finally:
        if device().type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    (stage,) = found.stages
    queries = max(stage.forwards / len(x), 1)
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"waits": count, "queries": queries, "waits_per_query": count / queries}


def agree(member: str, tiny: bool) -> Mapping[str, Any]:
    """Samples that break on the device, and how many of all break on it or the CPU alone."""
    model, x, y = problem(tiny)
    there = changed(model, x, y, member)
    here = changed(model.cpu(), x.cpu(), y.cpu(), member)
    return {"n": len(x), "broken": int(there.sum()), "differ": int((here != there).sum())}


def main() -> int:
    given = parser(__doc__).parse_args()
    tiny = given.tiny
    sitting = Sitting("check", given)
    sitting.cases["doctor"] = lambda: {"seconds": advbench("doctor")}
    sitting.cases["ceilings"] = lambda: ceilings(tiny)
    for precision in PRECISIONS[:1] if tiny else PRECISIONS:
        for layout in LAYOUTS:
            for graph in (False, True) if torch.cuda.is_available() else (False,):
                name = f"passes-{precision}-{layout}{'-graph' * graph}"
                sitting.cases[name] = partial(passes, precision, layout, graph, tiny)
    for member in MEMBERS[:1] if tiny else MEMBERS:
        sitting.cases[f"waits-{member}"] = partial(waits, member, tiny)
        sitting.cases[f"agree-{member}"] = partial(agree, member, tiny)
    return sitting.run()


if __name__ == "__main__":
    raise SystemExit(main())
