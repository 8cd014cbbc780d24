"""Each key has a role where it is declared, and what follows from the roles stays as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf

from advbench import config
from advbench.config import roles
from advbench.config.instantiate import target_of
from advbench.config.roles import Role
from advbench.runs import command, settings
from advbench.runs.deciding import deciding

OUTCOME = frozenset({"OUTCOME"})
OPEN = OUTCOME | {"EVALUATION"}
MACHINE = OUTCOME | {"RESOURCE"}
RUN = OUTCOME | {"NAMES_RUN"}
FILE = OUTCOME | {"NAMES_FILE"}
WRITTEN = OUTCOME | {"FROM_DATA"}
RESOURCE = frozenset({"RESOURCE"})
SITTING = frozenset({"SITTING"})
ELSEWHERE = frozenset({"PLACE", "EVALUATION"})

PUBLISHED = {"root": ELSEWHERE, "download": ELSEWHERE}
FOLDERS = {"root": OUTCOME | ELSEWHERE, "workers": RESOURCE}
NAMED = {"name": OUTCOME | {"PLACE"}}
OTHERS = {
    **{f"data/{k}": PUBLISHED for k in ("cifar10", "cifar100", "fashion_mnist", "mnist", "svhn")},
    "data/imagefolder": {**FOLDERS, **NAMED},
    "data/imagenet": FOLDERS,
    "data/npz": {"path": ELSEWHERE, **NAMED},
    "defense/awnet": {"switch": OPEN},
    "defense/hpm": {"inference": OPEN, "mix": OPEN, "tau": OPEN},
    "defense/jumprelu": {"jump": OPEN},
    "defense/mfdv_snn": {"draws": OPEN},
    "defense/sparta": {"weights": FILE},
    "defense/sparta_relu": {"weights": FILE},
    "recipe/mtard": {"robust_teacher": RUN, "standard_teacher": RUN},
    "trainer/default": {
        **dict.fromkeys(("accelerator", "save_every"), RESOURCE),
        **dict.fromkeys(("strategy", "num_nodes", "compile", "deterministic"), MACHINE),
    },
    "trainer/evaluation": {
        **dict.fromkeys(("accelerator", "devices", "num_nodes", "precision", "compile"), RESOURCE),
        "batch_size": MACHINE,
        **dict.fromkeys(("graphs", "deterministic"), RESOURCE),
    },
}
"""Keys of the shipped options that do more than decide the outcome, or do not decide it."""
EVERY = {
    "backbone": dict.fromkeys(("num_classes", "input_shape", "mean", "std"), WRITTEN),
    "data": {"extra": FILE - OUTCOME},
    "threat": {"norm": OPEN, "eps": OPEN},
}
"""The same, of every option of the group."""


def names(role: Role) -> set[str]:
    return {one.name or "" for one in Role if one & role}


def options() -> list[tuple[str, str, Mapping[str, Any]]]:
    """Group, name and node of every shipped option that names a component."""
    nodes = [(g, n, config.shipped(g, n)) for g in config.GROUPS for n in config.options(g)]
    return [(g, n, config.plain(node)) for g, n, node in nodes if node.get("_target_")]


def test_every_key_of_every_option_has_its_role() -> None:
    asked = 0
    for group, name, node in options():
        declared = config.roles_of(node, group)
        expected = EVERY.get(group, {}) | OTHERS.get(f"{group}/{name}", {})
        for key in node.keys() - {"_target_"}:
            assert names(declared[key]) == expected.get(key, OUTCOME), f"{group}/{name}: {key}"
            asked += 1
        assert expected.keys() <= node.keys()
    assert asked > 250


def test_every_key_of_the_top_level_has_its_role() -> None:
    found = {verb: roles.of(schema) for verb, schema in config.SCHEMAS.items()}
    files = {"plugins": FILE - OUTCOME}
    assert {k: names(role) for k, role in found["train"].items() if names(role) != OUTCOME} == {
        **files, "init_from": RUN, "resume": SITTING, "logger": {"LOGGING"},
    }  # fmt: skip
    assert {k: names(role) for k, role in found["eval"].items() if names(role) != OUTCOME} == {
        **files, **dict.fromkeys(("budget", "resume", "strict"), SITTING),
        "run": RUN, "transfer": RUN, "model": FILE, "weights": FILE,
    }  # fmt: skip


def test_a_run_is_known_by_the_same_keys_as_ever() -> None:
    """Any other result would give every run another name."""
    around = {
        "data": {"path", "root", "download", "extra", "workers"},
        "trainer": {"accelerator", "save_every"},
    }
    for group, name, node in options():
        if group == "logger" or name == "evaluation":
            continue
        kept = deciding({group: node})[group]
        stays = {"path", "root"} if "workers" in node else set()
        assert node.keys() - kept.keys() == (around.get(group, set()) - stays) & node.keys(), name
    top = {**dict.fromkeys(roles.of(config.TrainConfig), None), "choices": {"data": "npz"}}
    kept = deciding({**top, "choices": {"data": "npz", "experiment": "mine"}})
    assert kept == {k: v for k, v in top.items() if k not in ("logger", "plugins")}
    assert "resume" in kept


def test_runs_are_set_apart_by_the_same_settings_as_ever() -> None:
    trained: Any = OmegaConf.create(
        {g: config.plain(config.shipped(g, n)) for g, n in {
            "data": "imagefolder", "backbone": "torchvision", "defense": "sparta", "recipe": "awp",
            "optimizer": "sgd", "threat": "linf_8", "trainer": "default",
        }.items()} | {"choices": {"data": "imagefolder"}, "seed": 3, "init_from": "a/b-s1-01234567"}
    )  # fmt: skip
    trained.data.root, trained.data.extra = "a/photos", "there/more.npz"
    trained.defense.weights = "runs/phi-s2"
    trained.recipe.of = config.plain(config.shipped("recipe", "mtard"))
    trained.recipe.of["robust_teacher"] = "runs/big-s4"
    found = settings.settings_of(trained, trained.defense)
    assert {key for key in found if key.startswith("trainer.")} == {
        f"trainer.{key}" for key in (
            "batch_size", "precision", "clip_grad", "ema", "val_steps", "devices", "sync_batchnorm"
        )
    }  # fmt: skip
    assert not {"data.root", "data.name"} & found.keys()
    assert (found["data.workers"], found["data.extra"]) == (4, "more.npz")
    assert (found["defense.weights"], found["init_from"]) == ("phi", "b")
    assert found["recipe.mtard.robust_teacher"] == "big"
    assert (found["epochs"], found["training.data"]) == (30, "imagefolder:photos")


def test_a_command_says_nothing_that_the_data_write_or_one_sitting_was_told() -> None:
    backbone = config.plain(config.shipped("backbone", "convnet")) | {"num_classes": 10}
    kept = {
        "recipe": None, "backbone": backbone, "resume": "outputs/train/r", "seed": 2,
        "choices": {"backbone": "convnet"},
    }  # fmt: skip
    assert command.command(kept) == "advbench train seed=2"


def test_what_runs_on_disk_name_that_is_not_here_is_known_by_its_keys() -> None:
    """A component of the user's own is not read for it: a report has no plugins."""
    node = {"_target_": "mine.Mine", "root": "a", "download": True, "size": 3}
    assert deciding({"data": node})["data"] == {"_target_": "mine.Mine", "size": 3}
    streamed = {"_target_": "mine.Mine", "root": "a", "workers": 2, "crop_scale": None}
    assert deciding({"data": streamed})["data"].keys() == streamed.keys() - {"workers"}


def test_another_default_keeps_the_role() -> None:
    @dataclass
    class Base:
        place: str = field(default="a", metadata={"role": Role.PLACE})

    @dataclass
    class Derived(Base):
        place: str = "b"
        size: int = field(default=1, metadata={"role": Role.RESOURCE | Role.OUTCOME})

    assert roles.of(Derived) == {"place": Role.PLACE, "size": Role.RESOURCE | Role.OUTCOME}
    assert roles.of(lambda root: root) == {"root": Role.OUTCOME}


@pytest.mark.parametrize("group", sorted(config.GROUPS))
def test_a_shipped_option_has_keys_of_its_component_alone(group: str) -> None:
    for other, name, node in options():
        if other == group:
            declared = roles.of(target_of(node, group))
            assert node.keys() - {"_target_"} <= declared.keys(), name


def test_an_evaluation_may_change_the_keys_that_say_so() -> None:
    """``run`` is the option by which ``eval`` takes a group from the run."""
    for group in ("data", "defense", "threat"):
        owners: dict[str, set[str]] = {}
        for other, name, node in options():
            for key, role in roles.of(target_of(node, other)).items():
                if other == group and role & Role.EVALUATION:
                    owners.setdefault(key, set()).add(name)
        assert owners.keys() == config.shipped(group, "run").keys() - {"_target_"} and owners, group
        text = config.options(group)["run"].read_text(encoding="utf-8")
        comments = dict(re.findall(r"^(\w+): null  # ([\w, ]+)", text, re.M))
        assert {key: {*named.split(", ")} for key, named in comments.items()} == (
            owners if group == "defense" else {}
        )
