"""What sets one model apart from another, so that seeds are pooled and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from advbench.experiments import subject
from advbench.runs.settings import settings_of


def trained(**changes: Any) -> Any:
    """The config of a run, as far as it is looked at."""
    content = {
        "choices": {"backbone": "convnet", "defense": "none", "recipe": "pgd_at"},
        "threat": {"norm": "linf", "eps": 0.15},
        "seed": 0,
        "init_from": None,
        "trainer": {"epochs": 30, "val_steps": 10, "devices": 1},
        "data": {"_target_": "a.b", "val": 0.1},
        "backbone": {"_target_": "a.b"},
        "optimizer": {"_target_": "a.SGD", "lr": 0.1},
        "recipe": {"_target_": "a.b", "robust_teacher": None},
        "defense": {"_target_": "a.b"},
    }
    cfg = OmegaConf.create(content)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def apart(**changes: Any) -> bool:
    """Whether two runs that differ so are two things, whatever their seed."""
    first, second = trained(), trained(seed=1, **changes)
    kinds = [settings_of(one, one.defense) for one in (first, second)]
    return kinds[0] | {"seed": None} != kinds[1] | {"seed": None}


def test_only_seeds_are_one_kind_of_training() -> None:
    assert not apart()
    changes = (
        ("trainer.val_steps", 50), ("trainer.devices", 2), ("trainer.epochs", 2),
        ("choices.optimizer", "adamw"), ("optimizer.lr", 0.2), ("data.val", 0.2),
    )  # fmt: skip
    assert all(apart(**{key: value}) for key, value in changes) and len(changes) == 6


@pytest.mark.parametrize("key", ["init_from", "recipe.robust_teacher"])
def test_bases_of_other_settings_are_two_even_under_one_name(key: str, tmp_path: Path) -> None:
    bases = {
        "base-s0-aaaaaaaa": trained(),
        "base-s1-bbbbbbbb": trained(seed=1),
        "base-s2-cccccccc": trained(seed=2, **{"trainer.epochs": 2}),
    }
    for name, cfg in bases.items():
        (tmp_path / name).mkdir()
        OmegaConf.save(cfg, tmp_path / name / "config.yaml")
        (tmp_path / name / "summary.json").write_text("{}")
    seen = []
    for name in bases:
        cfg = trained(**{key: str(tmp_path / name)})
        seen.append(settings_of(cfg, cfg.defense)[key])
    assert seen[0] == seen[1] != seen[2] and all(name.startswith("base-") for name in seen)
    cfg = trained(**{key: str(tmp_path / "gone-s1-aaaaaaaa")})
    assert settings_of(cfg, cfg.defense)[key] == "gone", "a base that is gone has its name"


def test_names_of_runs_lose_their_seed() -> None:
    assert subject.without_seed("outputs/train/digits-pgd_at-s12-0123abcd") == "digits-pgd_at"
    assert subject.without_seed("outputs/train/first") == "first"
