"""For notebooks and for people with their own code: the objects that the command line uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from advbench import config
from advbench.attacks.base import Attack
from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.arrays import array_split
from advbench.data.base import to_unit
from advbench.defenses.base import Defense, Surrogate, Traits, surrogates_of
from advbench.errors import UserError
from advbench.evaluation.deadline import seconds
from advbench.evaluation.evaluation import IMAGES, Evaluation
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.resources import Resources
from advbench.evaluation.samples import Samples, subset
from advbench.experiments import models
from advbench.progress import Progress
from advbench.runs import directory
from advbench.runs.results import Results


def load(run: str | Path) -> Classifier:
    """The best model of a finished training run, on the CPU, in evaluation mode.

    Raises ``UserError`` for a run that is missing, did not finish, or does not match its weights.
    """
    return models.from_run(Path(run))[0]


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
            folder=place,
            progress=progress,
        )
        file = Path(place) / IMAGES
        saved = load_file(file) if file.exists() else {}
    clean = torch.as_tensor(x).detach()
    images = to_unit(clean) if clean.dtype is torch.uint8 else clean.float()
    images = images.clone()
    if saved:
        images[saved["sample"].to(images.device)] = saved["x"].to(images.device)
    return images


def evaluate(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    threat: Threat | str,
    protocol: Protocol | str = "autoattack",
    n: int | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
    precision: int | str = 32,
    budget: str | None = None,
    traits: Traits | None = None,
    surrogates: Mapping[str, Surrogate] | None = None,
    adversarial: bool = False,
    folder: str | Path | None = None,
    name: str = "model",
    progress: Progress | None = None,
) -> Results:
    """Clean and robust accuracy of any classifier.

    model: takes (N, C, H, W) in [0, 1], returns logits (N, K); in evaluation mode, on its device.
    x: (N, C, H, W), uint8, or floats in [0, 1].  y: (N,) integers in [0, K).
    threat, protocol: an object, or the name of a shipped one (``advbench list threats``).
    n: evaluate the fixed pseudo-random subset of that size.
    batch_size: samples attacked side by side; "auto" fits it to the images.
    precision: 32, or bf16 for a search in bfloat16 that is confirmed in float32.
    budget: stop after that time, such as "10min"; the results name the stages that are missing.
    traits: what an attacker must know of the model; if None, those that ``load`` found, else those
        of a plain deterministic model.
    surrogates: other targets for ``msa`` and ``adaptive``; if None, those that the defense of a
        model from ``load`` names.
    adversarial: keep the adversarial images in ``adversarial.safetensors`` of the folder.
    folder: keep the evaluation there, and go on with it if it was interrupted.
    progress: shows how far the evaluation is; None shows nothing.
    Raises ``UserError`` for a model in training mode and for whatever does not fit.
    """
    if adversarial and folder is None:
        raise UserError("adversarial=True keeps images in a folder: give folder=DIR as well")
    if isinstance(threat, str):
        threat = config.build(config.shipped("threat", threat), "threat")
    if isinstance(protocol, str):
        protocol = config.build(config.shipped("protocol", protocol), "protocol")
    if not isinstance(threat, Threat):
        raise UserError(f"threat is {threat!r}: give a name, or Threat('linf', '8/255')")
    if not isinstance(protocol, Protocol):
        raise UserError(
            f"protocol is {protocol!r}: give a name, or an object such as PGDProtocol()"
        )
    shape = tuple(np.shape(x))
    if len(shape) != 4:
        raise UserError(f"x has shape {shape}: images are (N, C, H, W)")
    given = torch.as_tensor(x).detach().cpu()
    given = given.float() if given.dtype is torch.bfloat16 else given  # which numpy has not
    images = given.movedim(1, -1).numpy()
    labels = torch.as_tensor(y).detach().cpu().numpy()
    split = array_split(images, labels, "x", "y")
    anchor = next(model.parameters(), torch.empty(0))
    resources = Resources(anchor.device.type, batch_size=batch_size, precision=str(precision))
    defense = getattr(model, "defense", Defense())
    if not isinstance(defense, Defense):
        defense = Defense()
    own = getattr(model, "traits", None)
    traits = traits or (own if isinstance(own, Traits) else Traits())
    named = surrogates_of(defense, model, traits) if protocol.surrogates else {}
    job = Job(
        model=model,
        samples=Samples(split, subset(len(split), n), anchor.device),
        threat=threat,
        traits=traits,
        surrogates=named if surrogates is None else surrogates,
        seed=seed,
        batch_size=resources.batch_size_for(shape[1:]),
        fast_model=resources.fast_model,
        keep_images=adversarial,
    )
    evaluation = Evaluation(name, "arrays", protocol, job)
    plan = evaluation.plan()
    most = None if budget is None else seconds(budget)
    if folder is None:
        return evaluation.execute(None, plan, progress, budget=most)
    if directory.kind_in(Path(folder)) == "train":
        raise UserError(f"'{folder}' holds a training run: give another folder")
    with directory.occupied(Path(folder)):
        return evaluation.execute(Path(folder), plan, progress, budget=most)
