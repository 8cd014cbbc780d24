"""One training from its config: what ``advbench train`` does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from advbench import config
from advbench.attacks.threat import Threat
from advbench.backbones.external import downloads
from advbench.config.words import command
from advbench.console import Bar, Screen
from advbench.data.base import Info, Splits
from advbench.defenses.base import Defense
from advbench.devices import is_first
from advbench.errors import UserError
from advbench.experiments import models, outcome
from advbench.experiments.checkpoints import read_weights
from advbench.experiments.home import Home, kept_config, resumed
from advbench.experiments.views import TrainingView
from advbench.files import hashes, write_atomic
from advbench.report import curves
from advbench.runs import directory, manifest
from advbench.runs.deciding import deciding
from advbench.runs.fingerprint import model_sha256
from advbench.training import tracking
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer

TEACHERS = ("robust_teacher", "standard_teacher")
"""Parameters of a recipe that name runs."""

OF_DIGITS = "linf_015"
"""The threat that configs/train.yaml takes where nothing is said: too large for photographs."""


def train(
    cfg: DictConfig,
    choices: Mapping[str, str],
    home: Home,
    plugins: tuple[str, ...],
    screen: Screen,
) -> Path:
    """Train what the config says, or resume it. Returns the run's directory."""
    overrides = cfg
    if cfg.resume is not None:
        home, cfg = resumed(cfg.resume, "train")
    logger_node = overrides.logger or cfg.get("logger")
    logger = config.build(logger_node, "logger", plugins=plugins) if logger_node else None
    threat: Threat = config.build(cfg.threat, "threat", plugins=plugins)
    splits: Splits = config.build(cfg.data, "data", plugins=plugins)
    recipe_node = config.spelled_out(cfg.recipe, "recipe")
    teachers = _teachers(recipe_node, plugins, cfg.data, splits.info)
    recipe = config.build_recipe(recipe_node, plugins, threat=threat, teachers=teachers)
    optimizer = config.build(cfg.optimizer, "optimizer", plugins=plugins)
    trainer = config.build(cfg.trainer, "trainer", plugins=plugins)
    if not isinstance(trainer, Trainer):
        raise UserError("trainer=evaluation is for eval; train with trainer=default")
    _check_fit(cfg.backbone, splits.info)
    torch.manual_seed(cfg.seed)
    backbone_node = models.backbone_node(cfg.backbone, splits.info)
    defense_node = config.spelled_out(cfg.defense)
    base = None
    start = None if cfg.init_from is None else directory.find(cfg.init_from)
    if start is None:
        with downloads(bool(cfg.data.get("download"))):
            model, defense = models.assemble(backbone_node, defense_node, plugins)
    else:
        model, defense = models.begun_from(start, backbone_node, defense_node, plugins)
        if start.undefended and type(defense) is not Defense:
            base = start.weights
    if (source := getattr(defense, "weights", None)) is not None:
        defense.adopt(model, read_weights(directory.find(source).weights))

    kept = cfg
    if "choices" not in cfg:
        kept = kept_config(cfg, choices)
        kept.backbone, kept.defense, kept.recipe = backbone_node, defense_node, recipe_node
    identity = {
        "config": deciding(config.plain(kept)),
        "data": splits.fingerprints(),
        "start": model_sha256(model),
        "teachers": {name: model_sha256(teacher) for name, teacher in teachers.items()},
        "code": hashes(cfg.plugins),
        "version": version("advbench"),
    }
    names = [kept.choices.get(group, "own") for group in ("data", "backbone", "defense", "recipe")]
    folder = home.of("-".join([*names, f"s{cfg.seed}"]), identity)
    first = is_first()  # Fabric is asked later
    with directory.occupied(folder) if first else nullcontext():
        if first:
            directory.keep_config(folder, kept, training=True)
            finished = directory.trained_to_end(folder)
            if finished:
                manifest.check(folder)
            if base is not None and not finished:
                write_atomic(folder / directory.BASE, lambda path: shutil.copyfile(base, path))
            screen.log = folder / "log.txt"
            screen.line(f"{'finished already' if finished else 'training'}: {folder}")
            if manifest.without_checksums(folder):
                screen.line(f"note: the run was {manifest.UNCHECKED}")
            for note in splits.info.notes:
                screen.line(f"note: {note}")
            if kept.choices.get("threat") == OF_DIGITS and kept.choices.get("data") != "digits":
                screen.line(
                    f"note: threat={OF_DIGITS} is made for digits; for photographs it is linf_8"
                )
        run = tracking.Run(folder, config.plain(kept))
        with (
            Bar(screen) as bar,
            tracking.Tracked(
                TrainingView(screen, bar, trainer.batch_size), logger, run, curves.draw
            ) as progress,
        ):
            summary: Summary = trainer.fit(
                model,
                splits,
                recipe,
                defense,
                optimizer,
                threat=threat,
                seed=cfg.seed,
                folder=folder,
                identity=identity,
                progress=progress,
                prepared=cfg.init_from is not None and base is None,
            )
            if first:
                progress.finish(summary)
                directory.renew_config(folder, kept)
    if first:
        protocol = "autoattack" if type(defense) is Defense else "msa"
        code = {"plugins": list(cfg.plugins)}
        following = command("eval", {"run": str(folder), "protocol": protocol, **code})
        outcome.show_training(summary, folder, screen, following)
    return folder


def score(folder: Path) -> float | None:
    """What a search maximises: the robust validation accuracy, or the clean one, of the best epoch.

    None in a process that has no files of the run.
    """
    if not (folder / directory.SUMMARY).exists():
        return None
    val = Summary.load(folder / directory.SUMMARY).val
    return val["clean"] if val.get("robust") is None else val["robust"]


def _teachers(
    recipe: Any, plugins: tuple[str, ...], data: DictConfig, info: Info
) -> dict[str, nn.Module]:
    """The models of the runs that a recipe learns from, or the one inside it.

    Raises UserError for a run on other data than the student's.
    """
    if recipe is not None and recipe.get("of") is not None:
        return _teachers(recipe.of, plugins, data, info)
    teachers = {}
    for key in TEACHERS:
        if recipe is None or not (run := recipe.get(key)):
            continue
        teacher = directory.find(run)
        model, _ = models.from_run(teacher, plugins)
        knows, has = (
            f"images {tuple(one.input_shape)} of {one.num_classes} classes" for one in (model, info)
        )
        if knows != has:
            raise UserError(
                f"{key}={run} has {knows} and {info.name} has {has}: take a run on the same data"
            )
        before, now = _published(teacher.config.data), _published(data)
        if before and now and before != now:
            raise UserError(
                f"{key}={run} was trained on {before} and the student is to learn {now}: "
                "take a run on the same data"
            )
        teachers[key] = model
    return teachers


def _published(data: DictConfig) -> str | None:
    """The name of a published data set; None for the user's own, of which the name says little."""
    module, _, name = str(data.get("_target_")).rpartition(".")
    return name if module == "advbench.data.sources" and "name" not in data else None


def _check_fit(backbone: Any, info: Info) -> None:
    """Raise UserError where the backbone is told other sizes than the data has."""
    if backbone is None:
        return
    for key, has in (("num_classes", info.num_classes), ("input_shape", list(info.input_shape))):
        declared = backbone.get(key)
        if declared is not None and declared != has:
            raise UserError(
                f"backbone.{key}={declared} does not fit {info.name}, which has {has}: "
                f"leave backbone.{key} out"
            )
