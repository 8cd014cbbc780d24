"""Training on several devices: two processes compute what one does."""

from __future__ import annotations

import pytest
import torch
from small import net, run_script, state, table

from advbench.models import load_weights
from advbench.training.summary import Summary

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

devices, folder = int(sys.argv[1]), Path(sys.argv[2])
whole = small.splits
small.splits = lambda: whole(Augment())
model = net(plain=True)
model.register_buffer("seen", torch.zeros(()))
recipe = PGDAT(threat=THREAT, steps=2, random_start=False)
trainer = Trainer(epochs=2, batch_size=16, devices=devices, accelerator="cpu", val_steps=2)
fit(folder, trainer, model=model, recipe=recipe, defense=Seen())
rank = torch.distributed.get_rank() if devices > 1 else 0
(folder / f"seen{rank}").write_text(str(float(model.seen)))
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    tables, weights = [], []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        run_script(DEVICES, str(devices), str(folder), folder=tmp_path)
        tables.append(table(folder))
        model = net(plain=True)
        model.register_buffer("seen", torch.zeros(()))
        load_weights(model, folder / "last.safetensors")
        weights.append(state(model))
        assert Summary.load(folder / "summary.json").devices == devices
    assert len(weights[0]) == 5
    for name in weights[0].keys() - {"seen"}:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)
    for one, two in zip(*tables, strict=True):
        assert {k: float(v) for k, v in one.items()} == pytest.approx(
            {k: float(v) for k, v in two.items()}, rel=1e-3
        )
    seen = [(tmp_path / "2" / f"seen{rank}").read_text() for rank in (0, 1)]
    assert seen[0] == seen[1], "all processes have the buffers of the first"
