"""Schedules and optimizers, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from advbench.training import schedules
from advbench.training.optimizers import SGD, AdamW

# Schedules and optimizers


def test_schedules_in_closed_form():
    args = (100, [50, 75], 0.1)
    assert [schedules.constant(s, *args) for s in (0, 99)] == [1, 1]
    for step, factor in ((0, 1.0), (50, 0.5), (25, 0.5 + math.sqrt(0.5) / 2), (100, 0.0)):
        assert schedules.cosine(step, *args) == pytest.approx(factor)
    for step, factor in ((0, 1), (49, 1), (50, 0.1), (74, 0.1), (75, 0.01), (99, 0.01)):
        assert schedules.multistep(step, *args) == pytest.approx(factor)
    for step, factor in ((0, 0), (25, 0.5), (50, 1), (75, 0.5), (100, 0)):
        assert schedules.cyclic(step, *args) == pytest.approx(factor)
    assert [schedules.warmup(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedules.warmup(0, 0) == 1
    assert len(schedules.SCHEDULES) == 5


def test_one_cycle_is_that_of_pytorch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, pct_start=0.025, total_steps=200
    )
    for step in range(200):
        rate = optimizer.param_groups[0]["lr"]
        assert schedules.onecycle(step, 200, [], 0.1) == pytest.approx(rate, abs=1e-12)
        optimizer.step()
        if step < 199:
            theirs.step()
    assert schedules.onecycle(0, 10, [], 0.1) == 1 and schedules.onecycle(0, 1, [], 0.1) == 1


def test_the_schedules_of_the_papers():
    """Rice et al. 2020, Wong et al. 2020, Pang et al. 2021: rates at the steps that they name."""
    rice = SGD(lr=0.1, schedule="multistep", milestones=[100, 150])
    rates = [rice.lr_at(390 * epoch, 200, 390) for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    wong = SGD(lr=0.2, schedule="cyclic")
    rates = [wong.lr_at(step, 30, 100) for step in (0, 750, 1500, 2250)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.1])
    pang = SGD(lr=0.1, schedule="multistep", milestones=[100, 105])
    assert pang.lr_at(104 * 390, 110, 390) == pytest.approx(0.01)


def test_learning_rate_counts_milestones_and_warmup_in_epochs():
    optimizer = SGD(lr=0.2, schedule="multistep", milestones=[2], gamma=0.5, warmup=0.5)
    rates = [optimizer.lr_at(step, epochs=4, steps_per_epoch=4) for step in range(16)]
    assert rates == pytest.approx([0.1, *[0.2] * 7, *[0.1] * 8])
    cosine = AdamW(lr=1.0, warmup=1.0)
    assert cosine.lr_at(1, 2, 4) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 8)))


def test_optimizers_take_their_values():
    weight = nn.Parameter(torch.zeros(2))
    sgd = SGD(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1).build([weight])
    assert isinstance(sgd, torch.optim.SGD)
    assert {k: sgd.defaults[k] for k in ("lr", "momentum", "nesterov", "weight_decay")} == {
        "lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1
    }  # fmt: skip
    adamw = AdamW(lr=0.3, beta1=0.5, beta2=0.6, weight_decay=0.1).build([weight])
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.5, 0.6) and adamw.defaults["weight_decay"] == 0.1
