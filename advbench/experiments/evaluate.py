"""One evaluation from its config: what advbench eval does."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from advbench import config
from advbench.attacks.threat import Threat
from advbench.console import Bar, Screen
from advbench.data.base import Splits
from advbench.errors import UserError
from advbench.evaluation.deadline import parse
from advbench.evaluation.evaluation import Evaluation, finished_results, is_home
from advbench.evaluation.protocol import Plan, Protocol
from advbench.evaluation.resources import ProcessGroup, Resources
from advbench.experiments import models, outcome
from advbench.experiments.home import Home, kept_config, resumed
from advbench.experiments.subject import TestData, candidate, evaluation_of
from advbench.experiments.views import EvaluationView
from advbench.runs import directory
from advbench.runs.directory import TrainingRun
from advbench.runs.results import Results


def evaluate(
    cfg: DictConfig,
    choices: Mapping[str, str],
    home: Home,
    plugins: tuple[str, ...],
    screen: Screen,
) -> Results:
    """Evaluate what the config says, or resume it. Returns the results."""
    budget = None if cfg.budget is None else parse(str(cfg.budget))
    home, cfg = _resumed(cfg, home)
    run = training_run(cfg)
    if run is not None:
        # Kept in the run's config, so that resuming does not depend on what is newest then.
        cfg = OmegaConf.merge(cfg, {"run": str(run.folder)})  # pyright: ignore[reportAssignmentType]
    cfg.defense = config.spelled_out(cfg.defense)
    evaluation, group = instantiate(cfg, run, plugins)
    plan, job = evaluation.plan(), evaluation.job
    kept = cfg if "choices" in cfg else kept_config(cfg, choices)
    limit = str(job.threat).replace(" ", "_").replace("/", "-")
    title = evaluation.protocol.title.replace("/", "-")
    name = f"{evaluation.run}-{title}-{limit}"
    folder = Path(group.of_first(str(_folder(home, name, plan, evaluation.needs_images))))
    finished = finished_results(folder)
    if cfg.strict and not _judged(evaluation, plan, finished):
        raise UserError(
            "strict=true needs a verdict, and there is none without an attack or with verdict=none"
        )
    if evaluation.judge is not None and evaluation.judge.only and finished is None:
        raise UserError("verdict=only needs a finished evaluation: leave it out to attack")
    with directory.occupied(folder) if group.rank == 0 else nullcontext():
        if group.rank == 0:
            directory.keep_config(folder, kept, training=False)
            screen.log = folder / "log.txt"
            if finished is not None and is_home(folder, plan, evaluation.needs_images):
                screen.line(f"finished already: {folder}")
            of = f"{len(job.samples)} samples of {evaluation.data}, {job.threat}"
            screen.line(f"evaluating {evaluation.run} on {of}")
            for reason in plan.reasons:
                screen.line(reason)
            for stage in plan.stages:
                screen.line(f"  {stage.name} on {stage.victim}: {stage.why}")
        names = [stage.name for stage in plan.stages]
        with Bar(screen) as bar:
            results = evaluation.execute(
                folder,
                plan,
                EvaluationView(screen, bar, names) if group.rank == 0 else None,
                group=group,
                archive=None if home.exact else home.folder,
                budget=budget,
            )
    if group.rank == 0:
        outcome.show_evaluation(results, folder, screen, budget)
    return results


def _judged(evaluation: Evaluation, plan: Plan, finished: Results | None) -> bool:
    """Whether there is a verdict, or will be one."""
    if finished is not None:
        known = finished.verdict.get("label") is not None
        return known or (evaluation.judge is not None and finished.attacked)
    return evaluation.judge is not None and bool(plan.stages)


def _folder(home: Home, name: str, plan: Plan, needs_images: bool) -> Path:
    """Where this evaluation lives: the directory that holds it already, or a new one."""
    if home.exact:
        return home.folder
    for folder in sorted(home.folder.glob(f"{glob.escape(name)}-*")):
        if is_home(folder, plan, needs_images):
            return folder
    execution = {"behaviour": plan.behaviour, "keep_images": plan.keep_images}
    return home.of(name, {**plan.identity, **execution})


def _resumed(cfg: DictConfig, home: Home) -> tuple[Home, DictConfig]:
    """The directory and the config of the evaluation that is resumed, where one is named."""
    if cfg.resume is None:
        return home, cfg
    overrides = cfg
    home, cfg = resumed(cfg.resume, "eval")
    if (overrides.model, overrides.weights) != (cfg.model, cfg.weights):
        command = directory.going_on(home.folder, cfg)
        raise UserError(f"model=FILE.py runs code, so name it again: {command}")
    return home, cfg


def training_run(cfg: DictConfig) -> TrainingRun | None:
    """The run that the config names, or else the newest; None for a model of the user's own."""
    if cfg.run is not None and cfg.model is not None:
        raise UserError("give run=DIR or model=FILE.py:FACTORY, not both")
    if cfg.weights is not None and cfg.model is None:
        raise UserError("weights=FILE needs model=FILE.py:FACTORY")
    if cfg.model is not None:
        return None
    return directory.newest() if cfg.run is None else directory.find(cfg.run)


def instantiate(
    cfg: DictConfig, run: TrainingRun | None, plugins: tuple[str, ...]
) -> tuple[Evaluation, ProcessGroup]:
    """The evaluation that the config describes, built on its devices.

    Args:
        cfg: the composed config.
        run: the training run that is evaluated; None for a model of the user's own.
        plugins: modules whose classes configs may name.

    Returns:
        The evaluation, and the processes that share it.

    Raises:
        UserError: the parts do not fit each other.
    """
    data, threat, resources = ingredients(cfg, run, plugins)
    protocol: Protocol = config.build(cfg.protocol, "protocol", plugins=plugins)
    transfer = [directory.find(other) for other in cfg.transfer]
    group = resources.launch()
    evaluation = evaluation_of(
        candidate(cfg, run, plugins, data, group.device),
        data,
        threat,
        protocol,
        resources,
        group.device,
        seed=cfg.seed,
        n=cfg.n,
        adversarial=cfg.adversarial,
        transfer=transfer,
        plugins=plugins,
        verdict=None if cfg.get("verdict") is None else config.build(cfg.verdict, "verdict"),
    )
    return evaluation, group


def ingredients(
    cfg: DictConfig, run: TrainingRun | None, plugins: tuple[str, ...]
) -> tuple[TestData, Threat, Resources]:
    """The images, the threat and the devices of an evaluation.

    Args:
        cfg: the composed config; images and threat that it leaves open are those of the run.
        run: the training run that is evaluated; None for a model of the user's own.
        plugins: modules whose classes configs may name.

    Raises:
        UserError: one of them can't be built.
    """
    resources = config.build(cfg.trainer, "trainer", plugins=plugins)
    if not isinstance(resources, Resources):
        raise UserError("trainer=default is for train; evaluate with trainer=evaluation")
    source = models.origin(cfg.model) if run is None else run.config
    data_node = config.inherit(cfg.data, source, "data")
    threat: Threat = config.build(config.inherit(cfg.threat, source, "threat"), "threat")
    splits: Splits = config.build(data_node, "data", plugins=plugins)
    data = TestData(splits.info.name, splits.test, splits.info.input_shape, splits)
    return data, threat, resources
