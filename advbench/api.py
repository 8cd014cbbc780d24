"""For notebooks and for people with their own code: the objects that the command line uses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from advbench import config
from advbench.attacks.base import Attack
from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.arrays import array_split
from advbench.data.base import Splits, to_unit
from advbench.defenses.base import Defense, Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation.deadline import parse
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.resources import Resources
from advbench.evaluation.store import read_images
from advbench.experiments import models
from advbench.experiments.adapter import adapted
from advbench.experiments.subject import Candidate, TestData, evaluation_of, from_training_run
from advbench.progress import Progress
from advbench.runs import directory
from advbench.runs.directory import TrainingRun
from advbench.runs.results import Results
from advbench.verdict.judge import Judgement


def load(run: str | Path) -> Classifier:
    """The best model of a finished training run, on the CPU, in evaluation mode.

    Args:
        run: its directory.

    Raises:
        UserError: for a run that is missing, did not finish, or does not match its weights.
    """
    return models.from_run(directory.find(run))[0]


@dataclass(frozen=True)
class _SingleAttack(Protocol):
    """One attack on the model, as an object of the caller's."""

    name: ClassVar[str] = "attack"
    search: Attack

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("attack", self.search, "the attack that was given")]


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | str,
    attack: Attack | str = "apgd",
    *,
    seed: int = 0,
    batch_size: int | str = "auto",
    precision: int | str = 32,
    traits: Traits | None = None,
    surrogates: Mapping[str, Surrogate] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Adversarial images for any classifier.

    An image is changed only if that makes the model wrong. Where the attack fails, and where the
    model is wrong already, the clean image comes back; so ``(images != x).flatten(1).any(1)`` are
    the successful attacks, and ``model(images).argmax(1) == y`` the samples that withstand.

    Args:
        model: takes (N, C, H, W) in [0, 1], returns logits (N, K); in evaluation mode, on its
            device.
        x: (N, C, H, W), uint8, or floats in [0, 1].
        y: (N,) integers in [0, K).
        threat: an object, or the name of a shipped one, such as "linf_8".
        attack: an object such as ``APGD(steps=50)``, or the name of a shipped protocol: fgsm, pgd,
            apgd, fab, square, or autoattack, whose attacks follow one another.
        seed: of all random numbers.
        batch_size: samples attacked side by side; "auto" fits it to the images.
        precision: 32, or bf16 for a search in bfloat16 that is confirmed in float32.
        traits, surrogates: as in ``evaluate``.
        progress: shows how far the attack is; None shows nothing.

    Returns:
        (N, C, H, W) float32 on the device of x, inside the threat around x and inside [0, 1]. Each
        changed image was judged wrong by the model itself in float32.

    Raises:
        UserError: for a model in training mode, an attack that is not defined for the threat or
            for so few classes, and whatever else does not fit.

    Example:
        >>> model = advbench.load("outputs/train/RUN")
        >>> images = advbench.attack(model, x, y, "linf_8", "autoattack")
    """
    protocol = _SingleAttack(attack) if isinstance(attack, Attack) else attack
    with TemporaryDirectory() as place:
        evaluate(
            model,
            x,
            y,
            threat=threat,
            protocol=protocol,
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            traits=traits,
            surrogates=surrogates,
            adversarial=True,
            verdict="none",
            folder=place,
            progress=progress,
        )
        found = read_images(Path(place))
    clean = torch.as_tensor(x).detach()
    images = to_unit(clean) if clean.dtype is torch.uint8 else clean.float()
    images = images.clone()
    if found is not None:
        at = torch.from_numpy(found.ids).to(images.device)
        images[at] = torch.from_numpy(found.x).to(images.device)
    return images


def evaluate(
    model: nn.Module | str | Path,
    x: Tensor | np.ndarray | None = None,
    y: Tensor | np.ndarray | None = None,
    *,
    threat: Threat | str | None = None,
    protocol: Protocol | str = "autoattack",
    n: int | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
    precision: int | str = 32,
    compile: str | None = None,
    budget: str | None = None,
    traits: Traits | None = None,
    surrogates: Mapping[str, Surrogate] | None = None,
    defense: Defense | str | None = None,
    transfer: Sequence[str | Path] = (),
    adversarial: bool | None = None,
    verdict: Judgement | str = "default",
    folder: str | Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Results:
    """Clean and robust accuracy of any classifier, as ``advbench eval`` measures it.

    Args:
        model: the directory of a finished training run; or a module that takes (N, C, H, W) in
            [0, 1] and returns logits (N, K), in evaluation mode, on its device.
        x: (N, C, H, W), uint8, or floats in [0, 1]. A run may leave ``x`` and ``y`` out: then they
            are the test images of its data.
        y: (N,) integers in [0, K).
        threat: an object, or the name of a shipped one (``advbench list threats``). A run may leave
            it out: then it is the threat that it was trained for.
        protocol: an object, or the name of a shipped one (``advbench list protocols``).
        n: evaluate the fixed pseudo-random subset of that size.
        seed: of all random numbers.
        batch_size: samples attacked side by side; "auto" fits it to the images.
        precision: 32, or bf16 for a search in bfloat16 that is confirmed in float32.
        compile: None, or a mode of ``torch.compile`` for the search's copy of the model.
        budget: stop after that time, such as "10min", or after that many passes of the whole
            evaluation, such as "2e6passes"; the results name the stages that are missing.
        traits: what an attacker must know of a module; if None, those that ``load`` found, else
            those of a plain deterministic model. The defense of a run knows its own.
        surrogates: other networks for ``msa`` and ``adaptive`` to attack; if None, those that the
            defense names.
        defense: is put on the finished model; an object, or the name of a shipped one.
        transfer: runs whose adversarial images may break the model too, for ``adaptive``.
        adversarial: keep the adversarial images in ``folder``; if None, where they take less than
            100 MB.
        verdict: which indicators of the verdict are computed; an object, or the name of a shipped
            one: default, full or none.
        folder: keep the evaluation there; an interrupted one is resumed.
        name: of the model in the results; if None, that of the run, or "model".
        progress: shows how far the evaluation is; None shows nothing.

    Returns:
        The results, as ``results.json`` holds them.

    Raises:
        UserError: for a model in training mode and for whatever else does not fit.
    """
    if adversarial and folder is None:
        raise UserError("adversarial=True keeps images in a folder: give folder=DIR as well")
    run = None if isinstance(model, nn.Module) else directory.find(model)
    splits: Splits | None = None
    if run is not None and (x is None or defense is not None):
        splits = config.build(config.inherit(None, run.config, "data"), "data")
    data = _data(x, y, splits)
    if isinstance(model, nn.Module):
        device = next(model.parameters(), torch.empty(0)).device
        resources = Resources(device.type, 1, 1, batch_size, str(precision), compile)
        subject = _of_module(model, traits, name or "model")
        if not isinstance(model, Classifier):
            ready, notices = adapted(model, data.input_shape)
            subject = replace(subject, model=ready, notices=tuple(notices))
        if defense is not None:  # which changes the model: the caller's stays as it is
            subject = replace(subject, model=copy.deepcopy(model))
    else:
        assert run is not None
        if traits is not None:
            raise UserError("traits are declared for a module; a run's defense declares its own")
        resources = Resources("auto", 1, 1, batch_size, str(precision), compile)
        device = resources.device
        subject = from_training_run(run)
    if defense is not None:
        wanted: Defense = _built(defense, "defense", Defense)
        settings = {
            f"defense.{key}": str(value) if isinstance(value, list | tuple) else value
            for key, value in asdict(wanted).items()
        }
        subject = subject.defended(wanted, settings, data, device)
    evaluation = evaluation_of(
        subject,
        data,
        _threat(threat, run),
        _built(protocol, "protocol", Protocol),
        resources,
        device,
        seed=seed,
        n=n,
        adversarial=adversarial,
        surrogates=surrogates,
        transfer=[directory.find(other) for other in transfer],
        name=name,
        verdict=_built(verdict, "verdict", Judgement),
    )
    plan = evaluation.plan()
    most = None if budget is None else parse(budget)
    home = None if folder is None else Path(folder)
    if home is not None and directory.kind_in(home) == "train":
        raise UserError(f"'{folder}' holds a training run: give another folder")
    with nullcontext() if home is None else directory.occupied(home):
        return evaluation.execute(home, plan, progress, budget=most)


def _built(given: Any, group: str, kind: type) -> Any:
    """An object of the group, from itself or from the name of a shipped option."""
    if isinstance(given, str):
        node = config.shipped(group, given)
        return config.build_defense(node) if group == "defense" else config.build(node, group)
    if not isinstance(given, kind):
        raise UserError(f"{group} is {given!r}: give a name, or a {kind.__name__}")
    return given


def _threat(given: Threat | str | None, run: TrainingRun | None) -> Threat:
    if given is not None:
        return _built(given, "threat", Threat)
    if run is None:
        raise UserError("a model of your own needs its threat: give a name such as 'linf_8'")
    return config.build(config.inherit(None, run.config, "threat"), "threat")


def _data(x: Any, y: Any, splits: Splits | None) -> TestData:
    """The images that are given, or the test images of the run's data."""
    if x is None and y is None and splits is not None:
        return TestData(splits.info.name, splits.test, splits.info.input_shape, splits)
    if x is None or y is None:
        raise UserError("give images x and labels y")
    shape = tuple(np.shape(x))
    if len(shape) != 4:
        raise UserError(f"x has shape {shape}: images are (N, C, H, W)")
    given = torch.as_tensor(x).detach().cpu()
    given = given.float() if given.dtype is torch.bfloat16 else given  # which numpy has not
    images = given.movedim(1, -1).numpy()
    labels = torch.as_tensor(y).detach().cpu().numpy()
    return TestData("arrays", array_split(images, labels, "x", "y"), shape[1:], splits)


def _of_module(model: nn.Module, traits: Traits | None, name: str) -> Candidate:
    """A module, with what ``load`` found out about it."""
    defense, own = getattr(model, "defense", None), getattr(model, "traits", None)
    return Candidate(
        name=name,
        model=model,
        traits=traits or (own if isinstance(own, Traits) else Traits()),
        defense=defense if isinstance(defense, Defense) else Defense(),
        foreign=not isinstance(defense, Defense),
    )
