"""Training on several devices: two processes compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from processes import run_script
from safetensors.torch import load_file
from small import net, table
from torch import nn

from advbench.errors import UserError
from advbench.training.summary import Summary
from advbench.training.syncnorm import synchronise

DEVICES = """
import sys
from dataclasses import dataclass
from pathlib import Path
import torch
from advbench.defenses.base import Defense
from advbench.recipes.pgd_at import PGDAT
from advbench.training.trainer import Trainer
from small import THREAT, fit, net
import small
from advbench.data.augment import Augment

@dataclass(frozen=True)
class Seen(Defense):
    def after_step(self, model, step):
        model.seen.copy_(next(iter(step.parts.values())).x.mean())

devices, home = int(sys.argv[1]), Path(sys.argv[2])
whole = small.splits
small.splits = lambda: whole(Augment())
recipe = PGDAT(threat=THREAT, steps=2, random_start=False)
for name in ("plain", "synced", "apart"):
    model = net(plain=name == "plain")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.register_buffer("seen", torch.zeros(()))
    trainer = Trainer(
        epochs=2, batch_size=16, devices=devices, accelerator="cpu", val_steps=2,
        sync_batchnorm=name == "synced",
    )
    folder = home / name
    fit(folder, trainer, model=model, recipe=recipe, defense=Seen())
    rank = torch.distributed.get_rank() if devices > 1 else 0
    (folder / f"seen{rank}").write_text(str(float(model.seen)))
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    """Without batch norm, and with one over all processes; with each process's own they do not."""
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        where = str(tmp_path / str(devices))
        run_script(DEVICES, str(devices), where, folder=tmp_path, processes=devices)
    for name, sizes in (("plain", 5), ("synced", 10), ("apart", 10)):
        folders = [tmp_path / str(devices) / name for devices in (1, 2)]
        assert [Summary.load(f / "summary.json").devices for f in folders] == [1, 2]
        one, two = (load_file(folder / "last.safetensors") for folder in folders)
        assert one.keys() == two.keys() and len(one) == sizes
        close = {
            key: torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-5)
            for key in one.keys() - {"seen"}
        }
        assert all(close.values()) == (name != "apart"), close
        seen = [(folders[1] / f"seen{rank}").read_text() for rank in (0, 1)]
        assert seen[0] == seen[1], "all processes have the buffers of the first"
        if name != "apart":
            for ours, theirs in zip(*(table(folder) for folder in folders), strict=True):
                assert {k: float(v) for k, v in ours.items()} == pytest.approx(
                    {k: float(v) for k, v in theirs.items()}, rel=1e-3
                )


NORMS = """
import torch
from torch import distributed, nn
from advbench.training.syncnorm import synchronise

distributed.init_process_group("gloo")
rank = distributed.get_rank()
cases = [
    (nn.BatchNorm2d(3), (8, 3, 4, 5)),
    (nn.BatchNorm1d(3, momentum=None), (8, 3)),
    (nn.BatchNorm2d(3, affine=False, track_running_stats=False), (8, 3, 2, 2)),
]
for number, (norm, shape) in enumerate(cases):
    torch.manual_seed(number)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, weight = 100 + 3 * torch.randn(shape), torch.randn(shape)  # far from zero: no cancelling
    whole = x.clone().requires_grad_()
    for _ in range(2):
        out = norm(whole)
    (out * weight).sum().backward()
    theirs = [p.grad.clone() for p in norm.parameters()], [b.clone() for b in norm.buffers()]
    norm.zero_grad()
    norm.reset_running_stats()
    names = norm.state_dict().keys()
    synchronise(nn.Sequential(norm))
    assert norm.state_dict().keys() == names
    own = slice(4 * rank, 4 * rank + 4)
    part = x[own].clone().requires_grad_()
    for _ in range(2):
        ours = norm(part)
    torch.testing.assert_close(ours, out[own], rtol=1e-4, atol=1e-4)
    (ours * weight[own]).sum().backward()
    torch.testing.assert_close(part.grad, whole.grad[own], rtol=1e-3, atol=1e-4)
    for parameter, wanted in zip(norm.parameters(), theirs[0]):
        distributed.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-4)
    for buffer, wanted in zip(norm.buffers(), theirs[1], strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=1e-4, atol=1e-4)
    norm.eval()
    if norm.track_running_stats:
        assert torch.equal(norm(part), nn.functional.batch_norm(
            part, norm.running_mean, norm.running_var, norm.weight, norm.bias))
print("cases:", len(cases))
distributed.destroy_process_group()
"""


def test_synchronous_batch_norm_is_that_of_the_whole_batch(tmp_path):
    """Outputs, gradients and running statistics, against PyTorch's on all rows in one process."""
    assert run_script(NORMS, folder=tmp_path, processes=2).endswith("cases: 3\n")


def test_batch_norms_stay_the_same_objects():
    model = net()
    before, names = list(model.modules()), list(model.state_dict())
    synchronise(model)
    assert [id(module) for module in model.modules()] == [id(module) for module in before]
    assert list(model.state_dict()) == names
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [type(norm).__name__ for norm in norms] == ["SyncedBatchNorm2d"]
    with pytest.raises(UserError, match=r"leave trainer\.sync_batchnorm out"):
        synchronise(net(plain=True))


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        "-m", "advbench", "train", "trainer.devices=2", "trainer.accelerator=cpu",
        "trainer.epochs=1", "trainer.val_steps=1", "trainer.sync_batchnorm=true",
        "recipe.steps=1", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert Summary.load(tmp_path / "run" / "summary.json").devices == 2
    assert result.stdout.count("epoch   1") == 1, "the first process alone speaks"
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "model.safetensors", "last.safetensors", "metrics.csv"
    }  # fmt: skip
