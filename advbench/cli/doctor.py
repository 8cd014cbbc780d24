"""``advbench doctor``: what is installed, what this machine can do, and whether attacks are right.

The self-tests attack linear models, whose robust accuracy has a closed form: a sample x of class
y in {-1, 1} falls to the norm p and the budget eps exactly if y (w x + b) <= eps ||w||_q, q dual to
p, as long as the point where it does lies inside [0, 1].
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from advbench import api, config
from advbench.attacks.threat import Threat
from advbench.cli.parser import Parser
from advbench.config.words import command
from advbench.console import table_console
from advbench.data import torchvision_sets
from advbench.defenses.base import Defense
from advbench.devices import emulates_bf16
from advbench.errors import describe
from advbench.evaluation.resources import Resources
from advbench.runs import provenance
from advbench.training.step import TrainingStep

LIBRARIES = (
    "torchvision",
    "hydra-core",
    "omegaconf",
    "lightning-fabric",
    "numpy",
    "pyarrow",
    "safetensors",
    "pyautoattack",
    "torchattacks",
)
BF16 = {False: "bfloat16 in hardware", True: "bfloat16 emulated: float32 is faster"}
GIB = 2**30
STEPS = 20  # of an attack on a linear model, which one step would do
MARKS = {True: ("ok", "green"), False: ("failed", "bold red"), None: ("", "dim")}


@dataclass(frozen=True)
class Finding:
    """One line. ok: None for what is neither right nor wrong."""

    section: str
    name: str
    value: str
    ok: bool | None = None


def examine(root: Path, outputs: Path) -> list[Finding]:
    """Everything there is to say. root: where data sets are looked for.  outputs: of runs."""
    checks = (versions(), machine(), disks(root, outputs), data_sets(root), extras(), self_tests())
    return [finding for check in checks for finding in check]


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.ok is not False for finding in findings)


def to_json(findings: list[Finding]) -> dict[str, object]:
    return {"ok": healthy(findings), "findings": [asdict(finding) for finding in findings]}


def show(findings: list[Finding]) -> None:
    """Print a table, by section."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    section = ""
    for finding in findings:
        if section and finding.section != section:
            table.add_row()
        title = finding.section if finding.section != section else ""
        section = finding.section
        word, style = MARKS[finding.ok]
        table.add_row(title, Text(finding.name), Text(finding.value), Text(word, style))
    console = table_console()
    console.print(table)
    failed = [finding.name for finding in findings if finding.ok is False]
    console.print()
    if failed:
        console.print(f"not well: {', '.join(failed)}", style="bold red")
    else:
        console.print("all self-tests passed", style="green")


# --- what there is -------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    code = provenance.code()
    commit = f", commit {code['git']}" if code["git"] else ""
    yield Finding("versions", "advbench", f"{code['advbench']}{commit}")
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    yield Finding("versions", "torch", f"{torch.__version__}, {cuda}")
    for name in LIBRARIES:
        yield Finding("versions", name, _version(name) or "not installed")


def machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} threads on {cores} processors"
    yield Finding("machine", "cpu", threads + (f", OMP_NUM_THREADS={limit}" if limit else ""))
    can = torch.backends.cpu.get_cpu_capability()
    narrow = BF16[emulates_bf16(torch.device("cpu"))]
    yield Finding("machine", "cpu kernels", f"{can}; {narrow}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        major, minor = properties.major, properties.minor
        narrow = BF16[emulates_bf16(torch.device("cuda", i))]
        memory = f"{properties.total_memory / GIB:.0f} GiB"
        value = f"{properties.name}, {memory}, capability {major}.{minor}; {narrow}"
        yield Finding("machine", f"cuda:{i}", value)
    if not torch.cuda.is_available():
        yield Finding("machine", "cuda", "none")
    if torch.backends.mps.is_available():
        yield Finding("machine", "mps", "available")
    chosen = Resources().device
    yield Finding("machine", "accelerator=auto", f"means {chosen}")


def disks(root: Path, outputs: Path) -> Iterator[Finding]:
    for name, path in (("runs", outputs), ("data", root)):
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        usage = shutil.disk_usage(existing)
        value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.0f} GiB free at '{path}'"
        writable = os.access(existing, os.W_OK)
        yield Finding("disk", name, value if writable else f"{value}, which can't be written")


def data_sets(root: Path) -> Iterator[Finding]:
    yield Finding("data", "digits", "inside scikit-learn")
    published = [
        v for v in vars(torchvision_sets).values() if isinstance(v, torchvision_sets.Known)
    ]
    for source in published:
        files = [root / source.folder.format(part=part) for part in ("train", "test")]
        files = list(dict.fromkeys(files))
        missing = [path for path in files if not path.exists()]
        if not missing:
            value = f"at {', '.join(map(str, files))}"
        else:
            elsewhere = None if root == Path(config.shipped("data", source.name).root) else root
            fetch = {"data": source.name, "data.root": elsewhere, "data.download": True}
            value = f"no {missing[0]}: {command('train', fetch)}"
        yield Finding("data", source.name, value)
    folder = root / "imagenet"
    complete = all((folder / part).is_dir() for part in ("train", "val"))
    missing = f"no {folder}/train and {folder}/val: fetch it from image-net.org, then data.root=DIR"
    yield Finding("data", "imagenet", f"at {folder}" if complete else missing)


def extras() -> Iterator[Finding]:
    requirements: dict[str, list[str]] = {}
    for line in requires("advbench") or ():
        requirement = Requirement(line)
        for extra in _extras_of(requirement):
            requirements.setdefault(extra, []).append(requirement.name)
    for extra, names in requirements.items():
        missing = [name for name in names if _version(name) is None]
        have = ", ".join(f"{name} {_version(name)}" for name in names if name not in missing)
        command = f"pip install 'advbench[{extra}]' for {', '.join(missing)}" if missing else ""
        yield Finding("extras", extra, "; ".join(part for part in (have, command) if part))


def _extras_of(requirement: Requirement) -> list[str]:
    marker = str(requirement.marker or "")
    return [part.split('"')[1] for part in marker.split("extra ==")[1:]]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- whether it is right -------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits (0, w x + b) of images (N, 1, 8, 8)."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.layer = nn.Linear(weight.numel(), 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
            self.layer.bias.copy_(torch.tensor([0.0, bias]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.flatten(x))


def problem(threat: Threat, n: int = 200) -> tuple[Linear, Tensor, Tensor, int]:
    """A linear model, images (n, 1, 8, 8), labels (n,), and how many of them hold.

    Half of the images are nearer to the boundary than the budget; none is so near to the edge
    between the two that rounding decides, and no optimal step leaves [0, 1].
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, generator=generator)
    reach = threat.radius * {"linf": weight.abs().sum(), "l2": weight.norm()}[threat.norm]
    step = (
        threat.radius * {"linf": 1.0, "l2": float(weight.abs().max() / weight.norm())}[threat.norm]
    )
    x = 0.4 + 0.2 * torch.rand(n, 64, generator=generator)
    y = torch.randint(0, 2, (n,), generator=generator)
    # Moved along w until the margin is a wanted multiple of the reach, in (0.1, 0.9) or (1.1, 1.9).
    wanted = (torch.arange(n) % 2 + 0.1 + 0.8 * torch.rand(n, generator=generator)) * reach
    sign = 2.0 * y - 1
    bias = -float(x.mean(0) @ weight)
    now = x @ weight + bias
    x += ((sign * wanted - now) / weight.norm() ** 2)[:, None] * weight
    if step > min(float(x.min()), 1 - float(x.max())):
        raise ValueError(f"{threat} reaches a border of [0, 1]")
    return Linear(weight, bias).eval(), x.view(n, 1, 8, 8), y, int((wanted > reach).sum())


def _attacked(protocol: str, threat: Threat, precision: str) -> tuple[bool, str]:
    device = Resources().device
    model, x, y, truth = problem(threat)
    node = config.shipped("protocol", protocol)
    node.steps = STEPS
    attack = config.build(node, "protocol")
    results = api.evaluate(
        model.to(device), x, y, threat=threat, protocol=attack, precision=precision
    )
    robust = round((results.robust.acc or 0) * len(y))
    return robust == truth, f"{robust} of {len(y)} hold, {truth} by the closed form"


def _trained() -> tuple[bool, str]:
    device, threat = Resources().device, Threat("linf", 0.05)
    torch.manual_seed(0)
    node = config.shipped("backbone", "convnet")
    node.update({"num_classes": 10, "input_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]})
    model = config.build(node, "backbone").to(device).train()
    attack = config.shipped("recipe", "pgd_at")
    attack.steps = 3
    recipe = config.build(attack, "recipe", threat=threat)
    step = TrainingStep(model, recipe, Defense())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.rand(32, 1, 8, 8, device=device), torch.arange(32, device=device) % 10
    losses = []
    for i in range(8):
        inputs = {"clean": x, "adversarial": recipe.perturb(model, x, y)}
        loss = torch.stack(list(step(inputs, y, 0, i).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[-1] < losses[0], f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in 8 steps"


LINF, L2 = Threat("linf", 0.05), Threat("l2", 0.25)
TESTS: dict[str, Callable[[], tuple[bool, str]]] = {
    "pgd, linf": lambda: _attacked("pgd", LINF, "32"),
    "apgd, linf": lambda: _attacked("apgd", LINF, "32"),
    "apgd, l2": lambda: _attacked("apgd", L2, "32"),
    "apgd, linf, bf16 search": lambda: _attacked("apgd", LINF, "bf16"),
    "training": _trained,
}


def self_tests() -> Iterator[Finding]:
    for name, test in TESTS.items():
        begin = time.perf_counter()
        try:
            ok, value = test()
        except Exception as problem:  # whatever it is, it is what the doctor was called for
            ok, value = False, describe(problem)
        seconds = time.perf_counter() - begin
        yield Finding("self-test", name, f"{value} ({seconds:.1f} s)", ok)


def main(arguments: list[str]) -> int:
    parser = Parser(
        "advbench doctor",
        description="What is installed, what this machine can do, and a self-test of the attacks. "
        "Exit code 1 if it fails.",
    )
    parser.add_argument("--data-root", default="data", help="where data sets are; default: data")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    from advbench.runs import directory

    findings = examine(Path(options.data_root), directory.OUTPUTS)
    if options.json:
        print(json.dumps(to_json(findings), indent=2))
    else:
        show(findings)
    return 0 if healthy(findings) else 1
