"""The evaluated model: a run or a model of the user's own, its defense and its traits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from advbench import config
from advbench.attacks.threat import Threat
from advbench.backbones import robustbench
from advbench.data.base import Split, Splits
from advbench.defenses.base import Defense, Surrogate, Traits, surrogates_of, worst
from advbench.defenses.chain import Chain
from advbench.errors import UserError, did_you_mean
from advbench.evaluation.adaptive import AdaptiveProtocol
from advbench.evaluation.checks import probe
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Protocol
from advbench.evaluation.resources import Resources
from advbench.evaluation.samples import Samples, subset
from advbench.evaluation.twins import made_for
from advbench.experiments import models
from advbench.files import code_sha256, hashes
from advbench.runs.directory import TrainingRun
from advbench.runs.manifest import UNCHECKED, without_checksums
from advbench.runs.settings import flat, settings_of, without_seed
from advbench.verdict.judge import Judgement

SMALL = 100e6
"""Bytes of adversarial images that an evaluation keeps without a word."""


class Foreign(nn.Module):
    """A model of the user's own, with the shape of its images (C, H, W)."""

    def __init__(self, model: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.input_shape = tuple(input_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@dataclass(frozen=True)
class TestData:
    """The images of an evaluation, and what they are called."""

    name: str
    """For people."""
    split: Split
    """The images and their labels."""
    input_shape: tuple[int, ...]
    """(C, H, W)."""
    splits: Splits | None = None
    """The data set that they belong to, which a retrofitted defense may look at."""


@dataclass(frozen=True)
class Candidate:
    """What is evaluated."""

    name: str
    """For people."""
    model: nn.Module
    """In evaluation mode."""
    traits: Traits
    """What an attacker must know of it."""
    defense: Defense = field(default_factory=Defense)
    """Names its surrogates."""
    base: nn.Module | None = None
    """The undefended model that its run began from."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the user's own files, by name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What sets it apart from others, by key."""
    notices: tuple[str, ...] = ()
    """What was done to load it, a line each."""
    foreign: bool = False
    """It is of the user's own making: only its traits say what an attacker must know of it."""

    def surrogates(
        self, transfer: Sequence[TrainingRun], data: TestData, plugins: tuple[str, ...]
    ) -> dict[str, Surrogate]:
        """Other victims: those that the defense names, the undefended model that it was put on, and
        the runs ``transfer``. Raises UserError for runs that can't be attacked in its place.
        """
        surrogates = surrogates_of(self.defense, self.model, self.traits)
        if self.base is not None:
            why = "the undefended model that the defense was put on"
            name = "undefended" if "base" in surrogates else "base"
            surrogates[name] = Surrogate(self.base, exact=False, loss="ce", why=why)
        for run in transfer:
            name = f"transfer-{run.name}"
            if name in surrogates:
                raise UserError(f"two runs of transfer have one name, '{run.name}': rename one")
            surrogates[name] = _other(run, self.model, data, plugins)
        return surrogates

    def defended(
        self,
        defense: Defense,
        settings: Mapping[str, Any],
        data: TestData,
        device: torch.device,
    ) -> Candidate:
        """The model with a defense put on it, beside the one that it may have.

        Args:
            defense: a retrofit. It looks at the training images of ``data``.
            settings: its values, by full key.
            data: the images.
            device: where the model is to be.

        Raises:
            UserError: for a defense that has to be trained with the model.
        """
        model: Any = self.model
        if not hasattr(model, "input_shape"):
            model = Foreign(model, data.input_shape)
        if not defense.traits(model).retrofit:
            raise UserError(
                f"{type(defense).__name__} has to be trained with the model: "
                "advbench train defense=NAME init_from=RUN"
            )
        model = defense.apply(model.eval()).to(device)
        images: Any = NoTrainingImages() if data.splits is None else data.splits
        with torch.no_grad():
            defense.prepare(model.eval(), images)
            defense.finish(model, images)
        alone = type(self.defense) is Defense
        both = defense if alone else Chain(members=(self.defense, defense))
        put_on = type(defense).__name__.lower()
        name = put_on if alone else f"{self.settings['defense']}+{put_on}"
        return replace(
            self,
            name=f"{self.name}+{put_on}",
            model=model,
            traits=worst([self.traits, both.traits(model)]),
            defense=both,
            settings={**self.settings, **settings, "defense": name},
        )


class NoTrainingImages:
    """In place of a data set where there are test images alone."""

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"the defense looks at the {name} images of a data set, and only test images were "
            "given: evaluate a run, or apply and prepare the defense yourself"
        )


def from_training_run(
    run: TrainingRun, plugins: tuple[str, ...] = (), defense_node: Any = None
) -> Candidate:
    """The model of a run. defense_node: in place of the run's own, of the same state."""
    node = run.config.defense if defense_node is None else defense_node
    model, defense = models.from_run(run, plugins, node)
    return Candidate(
        name=run.name,
        model=model,
        traits=defense.traits(model),
        defense=defense,
        base=models.base_of(run, plugins),
        settings=settings_of(run.config, node),
        notices=(f"{run.name} was {UNCHECKED}",) if without_checksums(run.folder) else (),
    )


def from_factory(
    spec: str, weights: str | None, traits: Traits, data: TestData, download: bool = False
) -> Candidate:
    """A model of the user's own, or of a zoo, with the traits that they declare.

    download: whether a zoo's weights may be fetched.
    """
    classes = None if data.splits is None else data.splits.info.num_classes
    model, notices = models.from_factory(spec, weights, data.input_shape, classes, download)
    file, _, factory = spec.rpartition(":")
    code = {}
    if robustbench.is_named(spec):
        name = robustbench.Entry.of(spec).name
    else:
        name, code["model"] = Path(file).stem, code_sha256(file)
    settings = {"model": f"{Path(file).name}:{factory}"}
    if weights is not None:
        settings["weights"] = Path(weights).name
    declared = {key: v for key, v in asdict(traits).items() if v != getattr(Traits(), key)}
    settings |= {f"traits.{key}": value for key, value in declared.items()}
    return Candidate(
        name, model, traits, code=code, settings=settings, notices=tuple(notices), foreign=True
    )


def candidate(
    cfg: DictConfig,
    run: TrainingRun | None,
    plugins: tuple[str, ...],
    data: TestData,
    device: torch.device,
) -> Candidate:
    """The model that an evaluation attacks, with its traits and its defense.

    Args:
        cfg: the composed config of ``eval``.
        run: the training run; None for a model of the user's own.
        plugins: modules whose classes configs may name.
        data: the images.
        device: the device that the model is moved to.

    Raises:
        UserError: the parts do not fit each other.
    """
    retrofit = cfg.defense is not None and cfg.defense.get("_target_") is not None
    traits = _declared(cfg.traits)
    if run is None:
        fetch = bool((cfg.data or {}).get("download"))
        subject = from_factory(cfg.model, cfg.weights, traits, data, fetch)
        overrides = {} if cfg.defense is None else flat("defense", cfg.defense)
        if not retrofit and any(value is not None for value in overrides.values()):
            raise UserError("a model of your own has no defense to set: give defense=NAME")
    else:
        if traits != Traits():
            raise UserError(
                "traits are declared for model=FILE.py:FACTORY; a run's defense declares its own"
            )
        # A retrofit comes on top of the run's own defense, as that was.
        node = None if retrofit else config.inherit(cfg.defense, run.config, "defense")
        subject = from_training_run(run, plugins, node)
    subject = replace(subject, code={**hashes(cfg.plugins), **subject.code})
    if retrofit:
        defense: Defense = config.build_defense(cfg.defense, plugins)
        subject = subject.defended(defense, flat("defense", cfg.defense), data, device)
    return subject


def evaluation_of(
    subject: Candidate,
    data: TestData,
    threat: Threat,
    protocol: Protocol,
    resources: Resources,
    device: torch.device,
    *,
    seed: int = 0,
    n: int | None = None,
    adversarial: bool | None = None,
    surrogates: Mapping[str, Surrogate] | None = None,
    transfer: Sequence[TrainingRun] = (),
    plugins: tuple[str, ...] = (),
    name: str | None = None,
    verdict: Judgement | None = None,
) -> Evaluation:
    """The evaluation of a candidate: what the command line and ``advbench.evaluate`` share.

    Args:
        subject: what is evaluated.
        data: the images.
        threat: what an attack may change.
        protocol: makes the plan.
        resources: batch size, precision and compilation.
        device: of this process.
        seed: of all random numbers.
        n: evaluate the fixed pseudo-random subset of that size; None is all.
        adversarial: keep the adversarial images; None: where they take less than SMALL bytes.
        surrogates: other victims; None stands for those that the defense names.
        transfer: runs whose adversarial images may break the model too.
        plugins: import prefixes that the runs' configs may use.
        name: of what is evaluated, for people; None is the candidate's own.
        verdict: which indicators are computed; None is what the protocol calls for.

    Raises:
        UserError: where the parts do not fit.
    """
    if transfer and not isinstance(protocol, AdaptiveProtocol):
        raise UserError(f"protocol={protocol.title} does not use transfer: use protocol=adaptive")
    input_shape = getattr(subject.model, "input_shape", None)
    if input_shape is not None and tuple(data.input_shape) != tuple(input_shape):
        raise UserError(
            f"the model is for images of shape {tuple(input_shape)} and {data.name} has "
            f"{tuple(data.input_shape)}: choose the data that it was trained on"
        )
    samples = Samples(data.split, subset(len(data.split), n), device)
    if surrogates is None:
        surrogates = subject.surrogates(transfer, data, plugins) if protocol.surrogates else {}
        named = any(not surrogate.transfer for surrogate in surrogates.values())
        if subject.foreign and not named and isinstance(protocol, AdaptiveProtocol):
            surrogates |= _made(subject, data, samples, threat, seed)
    for surrogate in surrogates.values():
        surrogate.model.to(device)
    settings = dict(subject.settings)
    if transfer:
        settings["transfer"] = "+".join(sorted(without_seed(str(run.folder)) for run in transfer))
    samples = Samples(data.split, subset(len(data.split), n), device)
    largest = 4 * len(samples) * math.prod(data.input_shape)
    job = Job(
        model=subject.model.to(device),
        samples=samples,
        threat=threat,
        traits=subject.traits,
        surrogates=surrogates,
        seed=seed,
        batch_size=resources.batch_size_for(data.input_shape),
        fast_model=resources.fast_model,
        deterministic=resources.deterministic,
        keep_images=largest < SMALL if adversarial is None else adversarial,
    )
    return Evaluation(
        name or subject.name,
        data.name,
        protocol,
        job,
        code=subject.code,
        settings=settings,
        notices=(*subject.notices, *(data.splits.info.notes if data.splits else ())),
        needs_images=bool(adversarial),
        judge=(verdict or Judgement()).of(protocol),
    )


def _declared(node: DictConfig) -> Traits:
    """What the user says of a model of their own. Raises UserError for values that are unknown."""
    declared = (
        {} if node is None else {k: v for k, v in config.plain(node).items() if v is not None}
    )
    values, hints = config.checked(Traits, declared, "traits"), get_type_hints(Traits)
    for key in ("gradient", "output"):
        allowed = get_args(hints[key])
        if values[key] not in allowed:
            raise UserError(f"no traits.{key} '{values[key]}'{did_you_mean(values[key], allowed)}")
    traits = Traits(**values)
    if traits.batch_size is not None and traits.batch_size < 1:
        raise UserError(f"traits.batch_size={traits.batch_size} is not at least 1")
    return traits


def _made(
    subject: Candidate, data: TestData, samples: Samples, threat: Threat, seed: int
) -> dict[str, Surrogate]:
    """Surrogates that are made for a model that names none. Raises UserError for one that can't be
    evaluated as its traits say.
    """
    model = subject.model.to(samples.device)
    probe(model, samples, subject.traits)
    train = None
    if data.splits is not None and data.splits.has_train:
        with suppress(UserError):  # the training images are not here
            train = data.splits.train
    return made_for(model, samples, threat, subject.traits, train, seed)


def _other(
    run: TrainingRun, attacked: nn.Module, data: TestData, plugins: tuple[str, ...]
) -> Surrogate:
    """Another run's model as a victim; of a stochastic one, a surrogate that does not draw.

    Raises UserError if it is for other images, or can't be attacked image by image.
    """
    model, defense = models.from_run(run, plugins)
    classes = getattr(attacked, "num_classes", model.num_classes)
    if data.splits is not None:
        classes = data.splits.info.num_classes
    if (tuple(model.input_shape), model.num_classes) != (tuple(data.input_shape), classes):
        raise UserError(f"'{run.folder}' is a model of other images or classes than {data.name}'s")
    traits = defense.traits(model)
    if traits.batch_dependent:
        raise UserError(f"'{run.folder}' is batch-dependent: its images do not transfer one by one")
    victim: nn.Module = model
    if traits.stochastic:
        still = [
            s.model
            for s in defense.surrogates(model).values()
            if not (s.stochastic or s.needs_clean_input or s.auxiliary_loss)
        ]
        if not still:
            raise UserError(f"'{run.folder}' is stochastic and names no surrogate that is not")
        victim = still[0]
    why = "images that break another model of the same data may break this one"
    return Surrogate(victim, exact=False, loss="ce", why=why, transfer=True)
