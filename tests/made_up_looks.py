"""Looks at evaluations that are made up: what the attacks are said to have found."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.data.arrays import array_split
from advbench.data.sources import digits
from advbench.defenses.base import Surrogate, Traits
from advbench.evaluation.engine import records_without_attack
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.plan import Stage
from advbench.evaluation.samples import Samples
from advbench.evaluation.store import Images
from advbench.verdict.look import Look

WHITE = APGD(steps=20)


@cache
def liars() -> Any:
    """The models of docs/liars.py, whose net trains in three seconds."""
    path = Path(__file__).parents[1] / "docs" / "liars.py"
    spec = importlib.util.spec_from_file_location("liars_of_the_docs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def net() -> nn.Module:
    return liars().network().eval()


def liar(name: str) -> nn.Module:
    return getattr(liars(), name)().eval()


def stage(name: str, attack: Attack = WHITE, victim: str = "model", draws: int = 1) -> Stage:
    return Stage(name, attack, "", victim=victim, eot_samples=draws)


BLIND = stage("square", Square(steps=10))


def look(
    model: nn.Module,
    stages: Sequence[Stage] = (stage("apgd-ce"),),
    broken: Sequence[int] = (),
    *,
    n: int = 40,
    eps: float = 0.15,
    traits: Traits | None = None,
    surrogates: dict[str, Surrogate] | None = None,
    images: Images | None = None,
    data: tuple[Any, Any] | None = None,
    late: int = 0,
    norm: str = "linf",
) -> Look:
    """A look at an evaluation in which each stage broke the first so many of those it attacked.

    late: of the samples that the last stage broke, so many broke at its end.
    """
    model = model.eval()
    split = digits().build().test if data is None else array_split(*data, "x", "y")
    samples = Samples(split, torch.arange(min(n, len(split))), torch.device("cpu"))
    job = Job(
        model, samples, Threat(norm, eps), traits or Traits(), surrogates or {}, batch_size=32
    )
    clean = samples.fetch(samples.ids)
    with torch.no_grad():
        wrong = (model(clean.x).argmax(1) != clean.y).numpy()
    found = records_without_attack(samples.ids, samples)
    records = {CLEAN: replace(found, broken=wrong, alone=wrong)}
    left = samples.ids[~torch.from_numpy(wrong)]
    for number, one in enumerate(stages):
        hits = broken[number] if number < len(broken) else 0
        attacked = left if one.only is None else left[torch.isin(left, torch.tensor(one.only))]
        fallen = np.arange(len(attacked)) < hits
        spent = np.where(fallen, 1, 20)
        if one is stages[-1]:
            spent[:late] = 20
        record = replace(
            records_without_attack(attacked, samples), broken=fallen, alone=fallen, forwards=spent
        )
        records[one.name] = record
        left = left[~torch.isin(left, attacked[:hits])]
    return Look(job, tuple(stages), records, images)
