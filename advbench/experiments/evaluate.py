"""One evaluation from its config: what advbench eval does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from advbench import config
from advbench.attacks.threat import Threat
from advbench.console import Bar, Screen
from advbench.data.base import Splits
from advbench.errors import UserError
from advbench.evaluation.adaptive import AdaptiveProtocol
from advbench.evaluation.deadline import seconds
from advbench.evaluation.evaluation import Evaluation, finished_results
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Protocol
from advbench.evaluation.resources import ProcessGroup, Resources
from advbench.evaluation.samples import Samples, subset
from advbench.experiments import models, outcome
from advbench.experiments.home import Home, kept_config, resumed
from advbench.experiments.subject import candidate
from advbench.experiments.views import EvaluationView
from advbench.runs import directory
from advbench.runs.results import Results


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
        home, cfg = resumed(cfg.resume, "eval")
        if (asked.model, asked.weights) != (cfg.model, cfg.weights):
            again = directory.going_on(home.folder, cfg)
            raise UserError(f"model=FILE.py runs code, so it is said again: {again}")
    if cfg.run is not None and cfg.model is not None:
        raise UserError("give run=DIR or model=FILE.py:FACTORY, not both")
    if cfg.weights is not None and cfg.model is None:
        raise UserError("weights=FILE needs model=FILE.py:FACTORY")
    if cfg.model is None:
        # Kept in the run's config, so that going on does not depend on what is newest then.
        run = directory.newest() if cfg.run is None else directory.find(cfg.run)
        cfg = OmegaConf.merge(cfg, {"run": str(run)})  # pyright: ignore[reportAssignmentType]
    cfg.defense = config.spelled_out(cfg.defense)
    evaluation, group = _evaluation(cfg, plugins)
    plan, job = evaluation.plan(), evaluation.job
    kept = cfg if "choices" in cfg else kept_config(cfg, choices)
    limit = str(job.threat).replace(" ", "_").replace("/", "-")
    title = evaluation.protocol.title.replace("/", "-")
    folder = home.of(f"{evaluation.run}-{title}-{limit}", plan.identity)
    finished = finished_results(folder)
    if cfg.strict and (finished is None or finished.verdict.get("label") is None):
        raise UserError("strict=true needs a verdict, and no protocol computes one yet: omit it")
    with directory.occupied(folder) if group.rank == 0 else nullcontext():
        if group.rank == 0:
            directory.keep_config(folder, kept, compare=False)  # the plan decides what is the same
            screen.log = folder / "log.txt"
            if finished is not None:
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
        outcome.show_evaluation(results, folder, screen)
    return results


def _evaluation(cfg: DictConfig, plugins: tuple[str, ...]) -> tuple[Evaluation, ProcessGroup]:
    """What the config says, built on its devices; and the processes that share it.

    Raises UserError where the parts do not fit.
    """
    resources = config.build(cfg.trainer, "trainer", plugins=plugins)
    if not isinstance(resources, Resources):
        raise UserError("trainer=default is for train; evaluate with trainer=evaluation")
    trained = config.read(Path(cfg.run) / directory.CONFIG) if cfg.model is None else None
    source = trained if cfg.model is None else models.origin(cfg.model)
    data_node = config.inherit(cfg.data, source, "data")
    threat: Threat = config.build(config.inherit(cfg.threat, source, "threat"), "threat")
    protocol: Protocol = config.build(cfg.protocol, "protocol", plugins=plugins)
    if cfg.transfer and not isinstance(protocol, AdaptiveProtocol):
        raise UserError(
            f"protocol={protocol.title} has no use for transfer: take protocol=adaptive"
        )
    splits: Splits = config.build(data_node, "data", plugins=plugins)
    group = resources.launch()
    subject = candidate(cfg, trained, plugins, splits, group.device)
    samples = Samples(splits.test, subset(len(splits.test), cfg.n), group.device)
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
        surrogate.model.to(group.device)
    job = Job(
        model=subject.model,
        samples=samples,
        threat=threat,
        traits=subject.traits,
        surrogates=surrogates,
        seed=cfg.seed,
        batch_size=resources.batch_size_for(splits.info.input_shape),
        fast_model=resources.fast_model,
        keep_images=cfg.adversarial,
    )
    evaluation = Evaluation(
        subject.name, splits.info.name, protocol, job, code=subject.code, settings=subject.settings
    )
    return evaluation, group
