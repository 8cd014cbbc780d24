"""Who is evaluated: a run or a model of the user's own, its defense, and what an attacker knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from advbench import config
from advbench.backbones import robustbench
from advbench.data.base import Info, Splits
from advbench.defenses.base import Defense, Surrogate, Traits, surrogates_of, worst
from advbench.defenses.chain import Chain
from advbench.errors import UserError, did_you_mean
from advbench.experiments import models
from advbench.files import code_sha256, hashes
from advbench.runs import directory
from advbench.runs.settings import flat, settings_of, without_seed


class Foreign(nn.Module):
    """A model of the user's own, with the shape of its images (C, H, W)."""

    def __init__(self, model: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.input_shape = tuple(input_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@dataclass
class Candidate:
    """What is evaluated.

    name: for people.  base: the undefended model that its run began from.  code: hashes of the
    user's own files.  settings: what sets it apart from others, by key.
    """

    name: str
    model: nn.Module
    defense: Defense
    traits: Traits
    base: nn.Module | None
    code: Mapping[str, str]
    settings: Mapping[str, Any]

    def surrogates(
        self, transfer: Sequence[str], info: Info, plugins: tuple[str, ...]
    ) -> dict[str, Surrogate]:
        """Other targets: those that the defense names, the undefended model that it was put on, and
        the runs ``transfer``. Raises UserError for runs that are no targets.
        """
        found = surrogates_of(self.defense, self.model, self.traits)
        if self.base is not None:
            why = "the undefended model that the defense was put on"
            name = "undefended" if "base" in found else "base"
            found[name] = Surrogate(self.base, exact=False, loss="ce", why=why)
        for run in transfer:
            name = f"transfer-{directory.find(run).resolve().name}"
            if name in found:
                raise UserError(f"two runs of transfer have one name, '{name[9:]}': rename one")
            found[name] = _other(run, info, plugins)
        return found


def candidate(
    cfg: DictConfig,
    trained: DictConfig | None,
    plugins: tuple[str, ...],
    splits: Splits,
    device: torch.device,
) -> Candidate:
    """What the config of an evaluation names.

    trained: the config of the run, where there is one.  splits: the data; a retrofit looks at
    them.  device: where the model is to be. Raises UserError where the parts do not fit.
    """
    code = hashes(cfg.plugins)
    wanted = None if cfg.defense is None else cfg.defense.get("_target_")
    base, settings = None, {}
    if trained is None:
        model: Any = models.from_factory(cfg.model, cfg.weights)
        file, _, factory = cfg.model.rpartition(":")
        if robustbench.is_named(cfg.model):
            name = robustbench.Entry.of(cfg.model).name
        else:
            name, code["model"] = Path(file).stem, code_sha256(file)
        settings = {"model": f"{Path(file).name}:{factory}"}
        if cfg.weights is not None:
            settings["weights"] = Path(cfg.weights).name
        defense, traits = Defense(), _declared(cfg.traits)
        said = {key: v for key, v in asdict(traits).items() if v != getattr(Traits(), key)}
        settings |= {f"traits.{key}": value for key, value in said.items()}
        given = {} if cfg.defense is None else flat("defense", cfg.defense)
        if wanted is None and any(value is not None for value in given.values()):
            raise UserError("a model of your own has no defense to set: give defense=NAME")
    else:
        if _declared(cfg.traits) != Traits():
            raise UserError(
                "traits are declared for model=FILE.py:FACTORY; a run's defense knows its own"
            )
        run = directory.find(cfg.run)
        # A retrofit comes on top of the run's own defense, as that was.
        node = trained.defense if wanted else config.inherit(cfg.defense, trained, "defense")
        model, defense, _ = models.from_run(run, plugins, node)
        name, traits = run.resolve().name, defense.traits(model)
        base = models.base_of(run, plugins)
        settings = settings_of(trained, node)
    if wanted is not None:
        own = defense
        defense, model = _retrofit(cfg.defense, plugins, own, model, splits, device)
        traits = worst([traits, defense.traits(model)])
        put_on = str(wanted).rpartition(".")[2].lower()
        name, settings = f"{name}+{put_on}", {**settings, **flat("defense", cfg.defense)}
        settings["defense"] = put_on if type(own) is Defense else f"{settings['defense']}+{put_on}"
    if cfg.transfer:
        settings["transfer"] = "+".join(sorted(map(without_seed, cfg.transfer)))
    return Candidate(name, model.to(device), defense, traits, base, code, settings)


def _retrofit(
    node: Any,
    plugins: tuple[str, ...],
    own: Defense,
    model: Any,
    splits: Splits,
    device: torch.device,
) -> tuple[Defense, Any]:
    """Put a defense on a finished model, beside the one that it may have."""
    defense: Defense = config.build_defense(node, plugins)
    if not hasattr(model, "input_shape"):
        model = Foreign(model, splits.info.input_shape)
    if not defense.traits(model).retrofit:
        raise UserError(
            f"{type(defense).__name__} has to be trained with the model: "
            "advbench train defense=NAME init_from=RUN"
        )
    model = defense.apply(model.eval()).to(device)
    with torch.no_grad():
        defense.prepare(model.eval(), splits)
        defense.finish(model, splits)
    return (defense if type(own) is Defense else Chain(members=(own, defense))), model


def _declared(node: DictConfig) -> Traits:
    """What the user says of a model of their own. Raises UserError for values that are unknown."""
    given = {} if node is None else {k: v for k, v in config.plain(node).items() if v is not None}
    values, hints = config.checked(Traits, given, "traits"), get_type_hints(Traits)
    for key in ("gradient", "output"):
        known = get_args(hints[key])
        if values[key] not in known:
            raise UserError(f"no traits.{key} '{values[key]}'{did_you_mean(values[key], known)}")
    traits = Traits(**values)
    if traits.batch_size is not None and traits.batch_size < 1:
        raise UserError(f"traits.batch_size={traits.batch_size} is not at least 1")
    return traits


def _other(run: str, info: Info, plugins: tuple[str, ...]) -> Surrogate:
    """Another run's model as a target; of a stochastic one, a surrogate that does not draw.

    Raises UserError if it is for other images, or can't be attacked image by image.
    """
    model, defense, _ = models.from_run(directory.find(run), plugins)
    if (model.input_shape, model.num_classes) != (info.input_shape, info.num_classes):
        raise UserError(f"'{run}' is a model of other images or classes than {info.name}'s")
    traits = defense.traits(model)
    if traits.batch_dependent:
        raise UserError(f"'{run}' is batch-dependent: its images do not transfer one by one")
    target: nn.Module = model
    if traits.stochastic:
        still = [
            s.model
            for s in defense.surrogates(model).values()
            if not (s.stochastic or s.needs_clean_input or s.auxiliary_loss)
        ]
        if not still:
            raise UserError(f"'{run}' is stochastic and names no surrogate that is not")
        target = still[0]
    why = "images that break another model of the same data may break this one"
    return Surrogate(target, exact=False, loss="ce", why=why, transfer=True)
