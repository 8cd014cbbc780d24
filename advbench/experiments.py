"""One experiment from its config: what ``advbench train`` and ``advbench eval`` do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from advbench import config, models, runs, shell, subjects
from advbench.attacks.threat import Threat
from advbench.console import Bar, EvaluationView, Screen, TrainingView
from advbench.data.base import Info, Splits
from advbench.defenses.base import Defense
from advbench.devices import is_first
from advbench.errors import UserError
from advbench.evaluation.adaptive import AdaptiveProtocol
from advbench.evaluation.budget import seconds
from advbench.evaluation.evaluate import Evaluation, finished_results
from advbench.evaluation.protocol import Protocol
from advbench.evaluation.resources import Crew, Resources
from advbench.evaluation.samples import Samples, subset
from advbench.files import hashes, short_hash, write_atomic
from advbench.fingerprint import model_sha256
from advbench.report import curves, outcome
from advbench.results import Results
from advbench.training import tracking
from advbench.training.summary import Summary
from advbench.training.trainer import Trainer

TEACHERS = ("robust_teacher", "standard_teacher")
"""Parameters of a recipe that name runs."""

OF_DIGITS = "linf_015"
"""The threat that configs/train.yaml takes where nothing is said: too large for photographs."""


@dataclass(frozen=True)
class Home:
    """Where a run is to live: in ``folder`` itself, or in a directory of its own inside it."""

    folder: Path
    exact: bool

    def of(self, name: str, identity: Mapping[str, Any]) -> Path:
        return self.folder if self.exact else self.folder / f"{name}-{short_hash(identity)}"


def train(
    cfg: DictConfig,
    choices: Mapping[str, str],
    home: Home,
    plugins: tuple[str, ...],
    screen: Screen,
) -> Path:
    """Train what the config says, or go on with it. Returns the run's directory."""
    asked = cfg
    if cfg.resume is not None:
        home, cfg = _resumed(cfg.resume, "train")
    told = asked.logger or cfg.get("logger")
    logger = config.build(told, "logger", plugins=plugins) if told else None
    threat: Threat = config.build(cfg.threat, "threat", plugins=plugins)
    splits: Splits = config.build(cfg.data, "data", plugins=plugins)
    how = config.spelled_out(cfg.recipe, "recipe")
    teachers = _teachers(how, plugins, cfg.data, splits.info)
    recipe = config.build_recipe(how, plugins, threat=threat, teachers=teachers)
    optimizer = config.build(cfg.optimizer, "optimizer", plugins=plugins)
    trainer = config.build(cfg.trainer, "trainer", plugins=plugins)
    if not isinstance(trainer, Trainer):
        raise UserError("trainer=evaluation is for eval; train with trainer=default")
    _check_fit(cfg.backbone, splits.info)
    torch.manual_seed(cfg.seed)
    node = models.backbone_node(cfg.backbone, splits.info)
    guard = config.spelled_out(cfg.defense)
    base = None
    if cfg.init_from is None:
        model, defense = models.assemble(node, guard, plugins)
    else:
        model, defense = models.begun_from(cfg.init_from, node, guard, plugins)
        if models.undefended(cfg.init_from) and type(defense) is not Defense:
            base = runs.find(cfg.init_from) / models.WEIGHTS
    if (source := getattr(defense, "weights", None)) is not None:
        defense.adopt(model, models.read_weights(runs.find(source) / models.WEIGHTS))

    kept = cfg
    if "choices" not in cfg:
        kept = _kept(cfg, choices)
        kept.backbone, kept.defense, kept.recipe = node, guard, how
    identity = {
        "config": runs.deciding(config.plain(kept)),
        "data": splits.fingerprints(),
        "start": model_sha256(model),
        "teachers": {name: model_sha256(teacher) for name, teacher in teachers.items()},
        "code": hashes(cfg.plugins),
        "version": version("advbench"),
    }
    names = [kept.choices.get(group, "own") for group in ("data", "backbone", "defense", "recipe")]
    folder = home.of("-".join([*names, f"s{cfg.seed}"]), identity)
    first = is_first()  # Fabric is asked later
    with runs.occupied(folder) if first else nullcontext():
        if first:
            runs.keep_config(folder, kept, compare=True)
            if base is not None and not (folder / models.BASE).exists():
                write_atomic(folder / models.BASE, lambda path: shutil.copyfile(base, path))
            screen.log = folder / "log.txt"
            state = "finished already" if runs.trained_to_end(folder) else "training"
            screen.line(f"{state}: {folder}")
            if kept.choices.get("threat") == OF_DIGITS and kept.choices.get("data") != "digits":
                screen.line(
                    f"note: threat={OF_DIGITS} is made for digits; for photographs it is linf_8"
                )
        run = tracking.Run(folder, config.plain(kept))
        with (
            Bar(screen) as bar,
            tracking.Tracked(
                TrainingView(screen, bar, trainer.batch_size), logger, run, curves.draw
            ) as report,
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
                report=report,
                prepared=cfg.init_from is not None and base is None,
            )
            if first:
                report.finish(summary)
                runs.renew_config(folder, kept)
    if first:
        protocol = "autoattack" if type(defense) is Defense else "msa"
        code = {"plugins": list(cfg.plugins)}
        following = shell.command("eval", {"run": str(folder), "protocol": protocol, **code})
        outcome.show_training(summary, folder, screen, following)
    return folder


def score(folder: Path) -> float | None:
    """What a search maximises: the robust validation accuracy, or the clean one, of the best epoch.

    None in a process that has no files of the run.
    """
    if not (folder / runs.SUMMARY).exists():
        return None
    val = Summary.load(folder / runs.SUMMARY).val
    return val["clean"] if val.get("robust") is None else val["robust"]


def evaluate(
    cfg: DictConfig,
    choices: Mapping[str, str],
    home: Home,
    plugins: tuple[str, ...],
    screen: Screen,
) -> Results:
    """Evaluate what the config says, or go on with it. Returns the results."""
    budget = None if cfg.budget is None else seconds(cfg.budget)
    if cfg.resume is not None:
        asked = cfg
        home, cfg = _resumed(cfg.resume, "eval")
        if (asked.model, asked.weights) != (cfg.model, cfg.weights):
            again = runs.going_on(home.folder, cfg)
            raise UserError(f"model=FILE.py runs code, so it is said again: {again}")
    if cfg.run is not None and cfg.model is not None:
        raise UserError("give run=DIR or model=FILE.py:FACTORY, not both")
    if cfg.weights is not None and cfg.model is None:
        raise UserError("weights=FILE needs model=FILE.py:FACTORY")
    if cfg.model is None:
        # Kept in the run's config, so that going on does not depend on what is newest then.
        run = runs.newest() if cfg.run is None else runs.find(cfg.run)
        cfg = OmegaConf.merge(cfg, {"run": str(run)})  # pyright: ignore[reportAssignmentType]
    cfg.defense = config.spelled_out(cfg.defense)
    evaluation, crew = _evaluation(cfg, plugins)
    stages = evaluation.stages()
    identity = evaluation.identity()
    kept = cfg if "choices" in cfg else _kept(cfg, choices)
    limit = str(evaluation.threat).replace(" ", "_").replace("/", "-")
    title = evaluation.protocol.title.replace("/", "-")
    folder = home.of(f"{evaluation.run}-{title}-{limit}", identity)
    with runs.occupied(folder) if crew.rank == 0 else nullcontext():
        if crew.rank == 0:
            runs.keep_config(folder, kept, compare=False)  # the plan decides what is the same
            screen.log = folder / "log.txt"
            if finished_results(folder) is not None:
                screen.line(f"finished already: {folder}")
            of = f"{len(evaluation.samples)} samples of {evaluation.data}, {evaluation.threat}"
            screen.line(f"evaluating {evaluation.run} on {of}")
            for reason in evaluation.reasons(stages):
                screen.line(reason)
            for stage in stages:
                screen.line(f"  {stage.name} on {stage.target}: {stage.why}")
        names = [stage.name for stage in stages]
        with Bar(screen) as bar:
            results = evaluation.execute(
                folder,
                stages,
                EvaluationView(screen, bar, names) if crew.rank == 0 else None,
                crew=crew,
                archive=None if home.exact else home.folder,
                budget=budget,
            )
    if crew.rank == 0:
        outcome.show_evaluation(results, folder, screen)
    return results


def _evaluation(cfg: DictConfig, plugins: tuple[str, ...]) -> tuple[Evaluation, Crew]:
    """What the config says, built on its devices; and the processes that share it.

    Raises UserError where the parts do not fit.
    """
    resources = config.build(cfg.trainer, "trainer", plugins=plugins)
    if not isinstance(resources, Resources):
        raise UserError("trainer=default is for train; evaluate with trainer=evaluation")
    trained = config.read(Path(cfg.run) / runs.CONFIG) if cfg.model is None else None
    source = trained if cfg.model is None else models.origin(cfg.model)
    data_node = config.inherit(cfg.data, source, "data")
    threat: Threat = config.build(config.inherit(cfg.threat, source, "threat"), "threat")
    protocol: Protocol = config.build(cfg.protocol, "protocol", plugins=plugins)
    if cfg.transfer and not isinstance(protocol, AdaptiveProtocol):
        raise UserError(
            f"protocol={protocol.title} has no use for transfer: take protocol=adaptive"
        )
    splits: Splits = config.build(data_node, "data", plugins=plugins)
    crew = resources.launch()
    subject = subjects.candidate(cfg, trained, plugins, splits, crew.device)
    samples = Samples(splits.test, subset(len(splits.test), cfg.n), crew.device)
    input_shape = getattr(subject.model, "input_shape", None)
    if input_shape is not None and splits.info.input_shape != tuple(input_shape):
        raise UserError(
            f"the model is for images of shape {tuple(input_shape)} and {splits.info.name} has "
            f"{splits.info.input_shape}: choose the data that it was trained on"
        )
    surrogates = (
        subject.surrogates(cfg.transfer, splits.info, plugins) if protocol.surrogates else {}
    )
    for surrogate in surrogates.values():
        surrogate.model.to(crew.device)
    evaluation = Evaluation(
        run=subject.name,
        model=subject.model,
        traits=subject.traits,
        surrogates=surrogates,
        settings=subject.settings,
        samples=samples,
        data=splits.info.name,
        threat=threat,
        protocol=protocol,
        seed=cfg.seed,
        slots=resources.slots(splits.info.input_shape),
        speed=resources.speed,
        keep_images=cfg.adversarial,
        code=subject.code,
    )
    return evaluation, crew


def _resumed(run: str, kind: str) -> tuple[Home, DictConfig]:
    """The directory and the config of an interrupted run."""
    folder = Path(run)
    if runs.kind_in(folder) != kind:
        raise UserError(f"resume={run} is not the directory of an advbench {kind} run")
    runs.refuse_links(folder)
    return Home(folder, exact=True), config.read(folder / runs.CONFIG)


def _kept(cfg: DictConfig, choices: Mapping[str, str]) -> DictConfig:
    """The config as a run keeps it: resolved, with the names of the chosen options."""
    kept = OmegaConf.create(config.plain(cfg))
    with open_dict(kept):
        kept.choices = {
            group: name
            for group, name in choices.items()
            if group in (*config.GROUPS, "experiment") and group != "logger" and name is not None
        }
    return kept


def _teachers(
    recipe: Any, plugins: tuple[str, ...], data: DictConfig, info: Info
) -> dict[str, nn.Module]:
    """The models of the runs that a recipe learns from, or the one inside it.

    Raises UserError for a run on other data than the student's.
    """
    if recipe is not None and recipe.get("of") is not None:
        return _teachers(recipe.of, plugins, data, info)
    found = {}
    for key in TEACHERS:
        if recipe is None or not (run := recipe.get(key)):
            continue
        model, _, taught = models.from_run(runs.find(run), plugins)
        knows, has = (
            f"images {tuple(one.input_shape)} of {one.num_classes} classes" for one in (model, info)
        )
        if knows != has:
            raise UserError(
                f"{key}={run} knows {knows} and {info.name} has {has}: take a run on the same data"
            )
        before, now = _published(taught.data), _published(data)
        if before and now and before != now:
            raise UserError(
                f"{key}={run} was trained on {before} and the student is to learn {now}: "
                "take a run on the same data"
            )
        found[key] = model
    return found


def _published(data: DictConfig) -> str | None:
    """The name of a published data set; None for the user's own, of which the name says little."""
    home, _, name = str(data.get("_target_")).rpartition(".")
    return name if home == "advbench.data.sources" and "name" not in data else None


def _check_fit(backbone: Any, info: Info) -> None:
    """Raise UserError where the backbone is told other sizes than the data has."""
    if backbone is None:
        return
    for key, has in (("num_classes", info.num_classes), ("input_shape", list(info.input_shape))):
        told = backbone.get(key)
        if told is not None and told != has:
            raise UserError(
                f"backbone.{key}={told} does not fit {info.name}, which has {has}: "
                f"leave backbone.{key} out"
            )
