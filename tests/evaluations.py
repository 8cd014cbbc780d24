"""Evaluations as files, made up in milliseconds: what tests of reports read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from advbench import config
from advbench.evaluation.samples import subset
from advbench.evaluation.store import Records, Store, clear_journal
from advbench.runs.accuracy import Accuracy
from advbench.runs.results import Results, StageResult, Unfinished

N, WRONG, LOST = 40, 2, 10
"""Images of digits; those misclassified at once, and those lost to each of two stages."""


def records(sample: np.ndarray, **columns: np.ndarray) -> Records:
    """Records of nothing broken, with the columns given."""
    n = len(sample)
    made: dict[str, np.ndarray] = {name: np.zeros(n, kind) for name, kind in Records.DTYPES.items()}
    made |= {"sample": sample, "distance": np.full(n, np.nan, np.float32), **columns}
    return Records(**{k: np.asarray(v).astype(Records.DTYPES[k]) for k, v in made.items()})


@cache
def digits() -> Any:
    """The data set."""
    return config.build(config.shipped("data", "digits"), "data")


@cache
def fingerprint() -> str:
    """Of the test split."""
    return digits().test.sha256()


def attacked() -> dict[str, Records]:
    """Clean: the first WRONG of N images are taken for the next class. Then two stages break LOST
    each, which are taken for the class after the next, at a distance of 0.1."""
    splits = digits()
    ids = subset(len(splits.test), N).numpy()
    truth = splits.test.labels.numpy()[ids]
    wrong = np.arange(N) < WRONG
    clean = records(
        ids,
        broken=wrong,
        label=np.where(wrong, (truth + 1) % 10, truth),
        margin=np.where(wrong, -1.0, 4.0),
        forwards=np.ones(N),
    )
    stages, left = {"clean": clean}, np.arange(WRONG, N)
    for name in ("first", "second"):
        broken = np.arange(len(left)) < LOST
        stages[name] = records(
            ids[left],
            broken=broken,
            alone=broken,
            label=np.where(broken, (truth[left] + 2) % 10, truth[left]),
            margin=np.where(broken, -0.5, 1.0),
            distance=np.where(broken, 0.1, np.nan),
            forwards=np.full(len(left), 10),
        )
        left = left[~broken]
    return stages


def found(
    n: int, correct: int, lost: Mapping[str, int], missing: Sequence[str] = (), attack: str = "PGD"
) -> dict[str, Any]:
    """Fields of results that agree with each other.

    correct: of n, without an attack.  lost: to each stage.  missing: the last stages; the first of
    them attacked half of what it did not break, the others nothing.
    """
    left, stages, decided = correct, [], 0
    for name, broken in lost.items():
        begun = broken + (left - broken) // 2 if name in missing[:1] else 0
        attacked = begun if name in missing else left
        left, decided = left - broken, begun - broken if begun else 0
        share = left / n
        stages.append(
            StageResult(name, attack, "model", "because", share, attacked, broken, 1.5, 10, 5)
        )
    attacked = any(stage.attacked or stage.name not in missing for stage in stages)
    bound = Accuracy(left / n) if missing else Accuracy.of(left, n)
    decided += sum(lost.values())
    return {
        "clean": Accuracy.of(correct, n),
        "robust": bound if attacked else Accuracy(),
        "stages": tuple(stages),
        "missing": tuple(missing),
        "unfinished": Unfinished(decided, correct) if missing else None,
        "measures": {"wra": (correct + left) / (2 * n)} if stages and not missing else {},
    }


def results(
    name: str = "net", lost: Sequence[int] = (LOST, LOST), missing: Sequence[str] = (), **more: Any
) -> Results:
    """What ``attacked`` amounts to.

    lost: to the stages ``first``, ``second``, ``third``.  missing: stages.  more: other fields.
    """
    plain = {
        "run": name,
        "data": {"name": "digits", "split": "test", "n": N, "sha256": fingerprint()},
        "threat": {"norm": "linf", "eps": 0.15},
        "protocol": {"name": "pgd", "version": "1", "seed": 0},
        "provenance": {"seconds": 3.0, "torch": "2.8", "seed": 0, "model_sha256": "ab" * 32},
        "settings": {"defense": "none", "backbone": "convnet", "recipe": "pgd_at", "seed": 0},
        **found(N, N - WRONG, dict(zip(("first", "second", "third"), lost, strict=False)), missing),
    }
    return Results(**{**plain, **more})


def curve(name: str, *robust: float, missing: int = 0, **more: Any) -> Results:
    """An evaluation over radii up to 0.15 with these accuracies.  missing: radii to go."""
    steps = 0.15 * (np.arange(len(robust)) + 1) / len(robust)
    names = [f"eps-{eps:.6g}" for eps in steps]
    left = [N - WRONG, *(round(acc * N) for acc in robust)]
    lost = {name: a - b for name, a, b in zip(names, left, left[1:], strict=False)}
    protocol = {"name": "curve", "version": "1", "points": len(robust), "seed": 0}
    ends = found(N, N - WRONG, lost, names[len(names) - missing :], "APGD")
    return results(name, protocol=protocol, **{**ends, **more})


def write(folder: Path, done: Results, images: bool = False, bare: bool = False) -> Path:
    """Leave an evaluation in a folder: with its records and its config, unless it is ``bare``.

    images: keep adversarial images, which are the clean ones 0.1 brighter.
    """
    folder.mkdir(parents=True)
    done.save(folder / "results.json")
    if bare:
        return folder
    store, splits = Store(folder), digits()
    made = attacked()
    for name, part in made.items():
        store.append(name, part, 1.0)
    store.finish(list(made))
    clear_journal(folder)
    if images:
        ids = np.sort(np.concatenate([made[s].sample[made[s].alone] for s in ("first", "second")]))
        clean = splits.test.images[ids].float().numpy()
        content = {"sample": ids, "x": np.clip(clean + 0.1, 0, 1).astype(np.float32)}
        save_file(content, folder / "adversarial.safetensors")
    kept = {
        **{"seed": 0, "run": "outputs/train/gone", "n": N, "adversarial": images},
        "data": config.plain(config.shipped("data", "digits")),
        "protocol": config.plain(config.shipped("protocol", "pgd")),
        "choices": {"data": "digits", "protocol": "pgd", "threat": "run", "defense": "run"},
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))
    return folder
