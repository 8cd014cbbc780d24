"""Loads models from a config, a finished run, or the user's own file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from advbench import config
from advbench.backbones import robustbench
from advbench.backbones.base import Classifier
from advbench.backbones.external import without_weights
from advbench.data.base import Info
from advbench.defenses.base import Defense
from advbench.errors import UserError, describe, did_you_mean
from advbench.experiments.adapter import adapted, in_evaluation_mode, initialise_lazy
from advbench.experiments.bounds import bounded
from advbench.experiments.checkpoints import load_checkpoint, load_weights
from advbench.runs.directory import CONFIG, TrainingRun


def backbone_node(node: DictConfig, info: Info) -> DictConfig:
    """The backbone's config with everything that the data decides written out.

    A run keeps this, so its model can be built without its data.
    """
    values: dict[str, Any] = {
        "num_classes": info.num_classes,
        "input_shape": list(info.input_shape),
        "mean": [float(v) for v in info.mean],
        "std": [float(v) for v in info.std],
    }
    fields = {key: value for key, value in values.items() if node.get(key) is None}
    return OmegaConf.create({**config.plain(node), **fields})


def assemble(
    backbone_node: Any, defense_node: Any, plugins: tuple[str, ...] = ()
) -> tuple[Classifier, Defense]:
    """A model with fresh weights and its defense applied.

    Args:
        backbone_node: the backbone's node of a config.
        defense_node: the defense's node.
        plugins: modules whose classes configs may name.

    Raises:
        UserError: a value is out of range, the defense does not fit the backbone, or the model
            takes more memory than there is.
    """
    defense: Defense = config.build_defense(defense_node, plugins)
    with bounded():
        model = config.build(backbone_node, "backbone", plugins=plugins)
        try:
            return defense.apply(model), defense
        except (RuntimeError, ValueError, TypeError, ArithmeticError) as problem:
            name = type(defense).__name__
            raise UserError(f"{name} can't be put on the model: {describe(problem)}") from problem


@contextmanager
def _of(folder: Path) -> Iterator[None]:
    """What is built inside comes from a run, which a mistake names; it fetches no weights."""
    try:
        with without_weights():
            yield
    except UserError as problem:
        raise UserError(f"{folder / CONFIG}: {problem}") from problem
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as p:
        raise UserError(f"{folder / CONFIG} describes no model: {describe(p)}") from p


def begun_from(
    run: TrainingRun, backbone_node: Any, defense_node: Any, plugins: tuple[str, ...] = ()
) -> tuple[Classifier, Defense]:
    """A model with the weights of another run, and its defense applied.

    The other run has the same defense, or none: then the defense is put on its finished model.

    Args:
        run: the training run that the weights come from.
        backbone_node: the backbone's node of the new config.
        defense_node: the defense's node.
        plugins: modules whose classes configs may name.

    Raises:
        UserError: the other run has another defense, or its weights do not match.
    """
    if run.config.defense.get("_target_") == defense_node.get("_target_"):
        with without_weights():
            model, defense = assemble(backbone_node, defense_node, plugins)
        load_weights(model, run.weights)
        return model, defense
    if not run.undefended:
        raise UserError(
            f"init_from={run.folder} has another defense: start from a run with the "
            "same defense, or with none"
        )
    defense = config.build_defense(defense_node, plugins)
    with without_weights():
        model = config.build(backbone_node, "backbone", plugins=plugins)
    load_weights(model, run.weights)
    return defense.apply(model), defense


def base_of(run: TrainingRun, plugins: tuple[str, ...] = ()) -> Classifier | None:
    """The undefended model that a run began from, in evaluation mode; None if it began anew."""
    if run.base is None:
        return None
    with _of(run.folder), bounded():
        model: Classifier = config.build(run.config.backbone, "backbone", plugins=plugins)
    load_weights(model, run.base)
    return model.eval()


def from_run(
    run: TrainingRun, plugins: tuple[str, ...] = (), defense_node: Any = None
) -> tuple[Classifier, Defense]:
    """The best model of a finished training run, in evaluation mode, with its defense.

    What an attacker must know of it is with it, as ``model.traits`` and ``model.defense``.

    Args:
        run: the training run.
        plugins: modules whose classes configs may name.
        defense_node: replaces the run's own defense; it must have the same state.

    Raises:
        UserError: the weights do not match the config, or the config names code that is neither
            advbench's nor in ``plugins``.
    """
    node = run.config.defense if defense_node is None else defense_node
    with _of(run.folder):
        model, defense = assemble(run.config.backbone, node, plugins)
    load_weights(model, run.weights)
    labelled: Any = model
    labelled.traits, labelled.defense = defense.traits(model), defense
    return model.eval(), defense


def from_factory(
    spec: str,
    weights: str | None,
    input_shape: Sequence[int],
    num_classes: int | None,
    download: bool = False,
) -> tuple[nn.Module, list[str]]:
    """The user's own model, ``FILE.py:FACTORY``, or one of a zoo, ready to be evaluated.

    Args:
        spec: FACTORY is called without arguments and returns a module that takes (N, C, H, W) in
            [0, 1].
        weights: safetensors, or a pickle of tensors alone, see ``load_checkpoint``; None keeps
            what the factory made.
        input_shape: (C, H, W) of the data's images.
        num_classes: of the data, where they are known.
        download: whether a zoo's weights may be fetched.

    Returns:
        The model in evaluation mode, and what was done to have it, a line each.

    Raises:
        UserError: Something does not fit.
    """
    if robustbench.is_named(spec):
        if weights is not None:
            raise UserError(f"{spec} comes with its weights: leave weights={weights} out")
        return robustbench.load(robustbench.Entry.of(spec), download=download), []
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name:
        raise UserError(f"model={spec} is not FILE.py:FACTORY, such as model=my_model.py:build")
    module = config.import_file(path)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"'{path}' has no factory '{name}'{did_you_mean(name, names)}")
    try:
        model = factory()
    except (Exception, SystemExit) as problem:
        raise UserError(f"{spec} failed: {describe(problem)}") from problem
    if not isinstance(model, nn.Module):
        cure = "; return program.module()" if hasattr(model, "graph_module") else ""
        raise UserError(f"{spec} returned {type(model).__name__}, not a torch.nn.Module{cure}")
    notices = []
    if initialise_lazy(model, input_shape):
        notices.append("the model's lazy modules got their shapes from the data")
    if weights is not None:
        notices += load_checkpoint(model, weights)
    else:
        notices.append(f"no weights=FILE: the weights that {name}() made are judged")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise UserError(
            f"{spec} made weights on the device 'meta', which hold no values: load them"
        )
    model, more = adapted(in_evaluation_mode(model), input_shape, num_classes)
    return model, [*notices, *more]


def origin(spec: str) -> DictConfig | None:
    """Data and threat of a zoo's leaderboard, as a run's config has them; None for other models.

    The data are the shipped option of that name.
    """
    if not robustbench.is_named(spec):
        return None
    entry = robustbench.Entry.of(spec)
    threat = config.shipped("threat", "linf_8")
    threat.norm, threat.eps = entry.threat.lower(), entry.budget
    return OmegaConf.create({"data": config.shipped("data", entry.data), "threat": threat})
