"""Verifies a claim: scores its adversarial images again on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from advbench import config
from advbench.config.words import word
from advbench.devices import full_float32
from advbench.errors import UserError, describe
from advbench.evaluation.checks import check_outputs
from advbench.evaluation.evaluation import Evaluation, saved_plan
from advbench.evaluation.identity import behaves_otherwise, behaviour, keeps_images
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.protocols import CleanProtocol
from advbench.evaluation.rescoring import Scores, rescore
from advbench.evaluation.store import IMAGES, SAMPLES, Records, read_images, read_samples
from advbench.evaluation.witnesses import Witnesses
from advbench.experiments.evaluate import ingredients, training_run
from advbench.experiments.home import kept_in
from advbench.experiments.subject import candidate, evaluation_of
from advbench.runs import directory
from advbench.runs.manifest import RESULTS, Damaged
from advbench.runs.results import Results
from advbench.text import count, percent

AGAIN = ("run", "model", "weights", "plugins", "data", "trainer")
"""Keys that may be said again: where files are, and what runs code."""


@dataclass(frozen=True)
class Verified:
    """What of a claim stands."""

    run: str
    """The name of what was evaluated."""
    scores: Scores
    """The outcome of each adversarial image, re-scored."""
    threat: str
    """Norm and budget, for people."""
    claimed: float | None = None
    """The robust accuracy of ``results.json``; None where images came without a claim."""
    problems: tuple[str, ...] = ()
    """What contradicts the claim, a line each."""
    notes: tuple[str, ...] = ()
    """What a person should know, a line each."""

    @property
    def stands(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "run": self.run,
            "stands": self.stands,
            "claimed": self.claimed,
            **self.scores.to_json(),
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        lines = [*self.notes, *self.problems, *self.scores.lines(self.threat)]
        if self.claimed is not None:
            verdict = "the claim stands" if self.stands else "the claim does NOT stand"
            lines.append(f"{verdict}: robust accuracy {percent(self.claimed)}, {self.run}")
        return lines


def verify_run(
    folder: Path, again: DictConfig, plugins: tuple[str, ...], named: set[str]
) -> Verified:
    """Check a finished evaluation: its files, its model and data, and every image that it kept.

    Args:
        folder: of the evaluation.
        again: settings of the command line: what runs code, and where files are by now.
        plugins: import prefixes that configs may use.
        named: keys of ``again`` by their first word.

    Raises:
        UserError: where there is no finished evaluation with images, or its parts can't be had.
    """
    if directory.kind_in(folder) != "eval":
        raise UserError(
            f"'{folder}' is no evaluation with a config.yaml: give the directory of one, or "
            "--images FILE model=... data=... threat=..."
        )
    directory.refuse_links(folder)
    kept = kept_in(folder, "eval")
    path = folder / RESULTS
    results, plan = Results.load(path) if path.is_file() else None, saved_plan(folder)
    if results is None or results.missing:
        raise UserError(
            f"'{folder}' did not finish; go on with: {directory.going_on(folder, kept)}"
        )
    if plan is None:
        raise UserError(
            f"'{folder}/plan.json' is missing or damaged: what was claimed is not known"
        )
    evaluation = _evaluation(_said_again(folder, kept, again, named), plugins)
    if not keeps_images(plan) and not (folder / IMAGES).exists():
        raise UserError(f"'{folder}' kept no images: evaluate again with adversarial=true")
    problems, records, witnesses = [], {}, None
    try:
        records = read_samples(folder)
        problems += _contradictions(results, records)
    except Damaged as problem:
        problems.append(f"{SAMPLES} can't be read: {problem}")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        problems.append(f"{SAMPLES} can't be read: {describe(problem)}")
    expected = _expected(records)
    try:
        witnesses = _kept_images(folder, evaluation.job, len(expected))
    except UserError as problem:
        problems.append(str(problem))
    job = evaluation.job
    with full_float32():
        problems += _other_identity(evaluation, plan, results)
        scores = rescore(job, witnesses)
    if witnesses is not None and records:
        problems += _other_images(scores, records, expected, job)
    claimed = results.robust.acc
    if job.traits.batch_dependent:
        claimed = results.measures.get("single_image", claimed)
    if claimed is None:
        raise UserError(f"'{folder}' attacked nothing, so it claims no robust accuracy")
    if scores.proven > claimed + 0.5 / len(scores.sample):
        problems.append(f"only {percent(scores.proven)} is proven, and {percent(claimed)} claimed")
    return Verified(str(folder), scores, str(job.threat), claimed, tuple(problems))


def verify_images(file: Path, cfg: DictConfig, plugins: tuple[str, ...]) -> Verified:
    """Score images that were made elsewhere: as many as the test split, in its order.

    Args:
        file: the images of the whole test split, in a format of ``Witnesses.read``.
        cfg: the composed config of an evaluation: model, data and threat.
        plugins: modules whose classes configs may name.

    Raises:
        UserError: file, model and data do not fit each other.
    """
    evaluation = _evaluation(cfg, plugins)
    job = evaluation.job
    witnesses = Witnesses.read(file, job.samples)
    with full_float32():
        scores = rescore(job, witnesses)
    return Verified(
        evaluation.run, scores, str(job.threat), notes=(*evaluation.notices, *witnesses.notes)
    )


def _said_again(folder: Path, kept: DictConfig, again: DictConfig, named: set[str]) -> DictConfig:
    """The run's config with what the command line says again."""
    for key in sorted(named - set(AGAIN)):
        raise UserError(
            f"{key} is the claim's own: beside RUN give only {', '.join(AGAIN)} where they moved"
        )
    for key in ("model", "weights", "plugins"):
        if (kept.get(key) or None) != (again.get(key) or None):
            said = {k: kept.get(k) for k in ("model", "weights", "plugins") if kept.get(k)}
            words = " ".join(word(k, config.plain(kept)[k]) for k in said)
            raise UserError(
                f"model=FILE.py runs code, so it is said again: advbench verify {folder} {words}"
            )
    merged = DictConfig({**config.plain(kept), "resume": None, "strict": False, "transfer": []})
    for key in ("run", "data", "trainer"):
        if key in named:
            value = again[key]
            if isinstance(value, DictConfig):  # null: as it was
                given = {k: v for k, v in config.plain(value).items() if v is not None}
                value = {**merged[key], **given}
            merged[key] = value
    return merged


def _evaluation(cfg: DictConfig, plugins: tuple[str, ...]) -> Evaluation:
    """The model, the data and the threat of a config; there is nothing to attack."""
    run = training_run(cfg)
    data, threat, resources = ingredients(cfg, run, plugins)
    device = resources.device
    evaluation = evaluation_of(
        candidate(cfg, run, plugins, data, device),
        data,
        threat,
        CleanProtocol(),
        resources,
        device,
        seed=cfg.seed,
        n=cfg.n,
        surrogates={},
    )
    with full_float32():
        check_outputs(evaluation.job.model, evaluation.job.samples)
    return evaluation


def _kept_images(folder: Path, job: Job, expected: int) -> Witnesses | None:
    """The images that an evaluation kept; None where it broke nothing."""
    images = read_images(folder)
    if images is None:
        if expected:
            raise UserError(f"{IMAGES} is missing, and {count(expected, 'image')} should be in it")
        return None
    if images.x.shape[1:] != job.samples.fetch(job.samples.ids[:1]).x.shape[1:]:
        raise UserError(f"{IMAGES} is damaged: its images have shape {images.x.shape[1:]}")
    return Witnesses(images.ids, images.x)


def _expected(records: Mapping[str, Records]) -> np.ndarray:
    """Ids of the samples whose image was kept: those that a stage broke."""
    found = [part.sample[part.alone] for name, part in records.items() if name != CLEAN]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def _contradictions(results: Results, records: Mapping[str, Records]) -> list[str]:
    """In what the numbers of results.json are not those of the records."""
    if CLEAN not in records:
        return [f"{SAMPLES} has no records of the clean images"]
    clean = records[CLEAN]
    n = max(len(clean), 1)
    lost = [clean.sample[clean.broken]]
    shares = {"clean": (results.clean.acc, 1 - len(lost[0]) / n)}
    lost += [part.sample[part.broken] for name, part in records.items() if name != CLEAN]
    left = 1 - len(np.unique(np.concatenate(lost))) / n
    shares["robust"] = (left if results.robust.acc is None else results.robust.acc, left)
    return [
        f"{RESULTS} says {name} {percent(said)}, and {SAMPLES} {percent(found)}"
        for name, (said, found) in shares.items()
        if said is None or abs(said - found) > 1e-6
    ]


def _other_identity(evaluation: Evaluation, plan: dict[str, Any], results: Results) -> list[str]:
    """In what model, data and threat are not those of the claim."""
    ours, theirs = evaluation.identity(), plan["identity"]
    found = []
    for key, what in (("model_sha256", "the model"), ("traits", "the model's traits")):
        if theirs.get(key) != ours[key]:
            found.append(f"{what}: not that of the claim ({key})")
    if results.provenance.get("model_sha256") != theirs.get("model_sha256"):
        found.append(f"{RESULTS} and plan.json name different models")
    if {**theirs.get("threat", {})} != ours["threat"] or dict(results.threat) != ours["threat"]:
        found.append("the threat: not that of the claim")
    said = {"plan.json": theirs["data"], RESULTS: dict(results.data)}
    for file, data in said.items():
        other = [key for key in ("n", "sha256", "samples") if key in data]
        if any(data[key] != ours["data"][key] for key in other):
            found.append(f"the data: images or labels are not those of {file}")
    return found + behaves_otherwise({"behaviour": behaviour(evaluation.job)}, plan)


def _other_images(
    scores: Scores, records: Mapping[str, Records], expected: np.ndarray, job: Job
) -> list[str]:
    """In what the images are not those that the records are of."""
    there = scores.sample[scores.given]
    found = []
    if lacking := len(np.setdiff1d(expected, there)):
        found.append(f"{IMAGES} lacks {count(lacking, 'image')} that {SAMPLES} names")
    if more := len(np.setdiff1d(there, expected)):
        found.append(f"{IMAGES} has {count(more, 'image')} that {SAMPLES} does not name")
    if fallen := int((scores.given & ~scores.stands).sum()):
        found.append(f"{fallen} of {len(there)} witnesses do not stand")
    everything = Records.joined([r for name, r in records.items() if name != CLEAN])
    broken = everything.where(everything.alone)
    if not job.traits.stochastic and not job.traits.batch_dependent:
        at = np.searchsorted(scores.sample, broken.sample).clip(0, len(scores.sample) - 1)
        same = (scores.sample[at] == broken.sample) & scores.stands[at]
        if other := int((scores.label[at] != broken.label)[same].sum()):
            found.append(
                f"{SAMPLES} names another class than the model for {count(other, 'image')}"
            )
    return found
