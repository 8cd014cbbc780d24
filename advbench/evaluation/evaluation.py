"""One evaluation from start to end: plan, run, summarise. The command line and the API share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from advbench.attacks.threat import Threat
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation.checks import check_gradient, learns, probe, probe_surrogate
from advbench.evaluation.deadline import Deadline
from advbench.evaluation.engine import CLEAN, Engine
from advbench.evaluation.fast_model import Speed
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.resources import Crew
from advbench.evaluation.samples import Samples
from advbench.evaluation.stage_cache import Archive
from advbench.evaluation.store import Store, clear_journal
from advbench.evaluation.summary import measures
from advbench.files import file_sha256, short_hash, write_atomic, write_json
from advbench.progress import NullProgress, Progress
from advbench.runs import provenance
from advbench.runs.fingerprint import model_sha256
from advbench.runs.results import RESULTS, Accuracy, Results, StageResult

PLAN = "plan.json"


@cache
def _own_code() -> str:
    """Hash of the code that decides what is found, between two versions too."""
    home, parts = Path(__file__).parents[1], ("attacks", "backbones", "defenses", "evaluation")
    files = (file for part in parts for file in sorted((home / part).glob("*.py")))
    return short_hash([file_sha256(file) for file in files])


@dataclass(frozen=True)
class Evaluation:
    """Everything that decides what an evaluation finds.

    run: what is evaluated, for people.  settings: what sets it apart from others, by key.
    data: name of the data.  surrogates: other targets, by name.  slots: samples attacked side by
    side.  code: hashes of the user's own files, by name.
    """

    run: str
    model: nn.Module
    traits: Traits
    samples: Samples
    data: str
    threat: Threat
    protocol: Protocol
    seed: int = 0
    slots: int = 250
    speed: Speed = field(default_factory=Speed)
    keep_images: bool = False
    code: Mapping[str, str] = field(default_factory=dict)
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UserError(f"a batch size of {self.slots} is not at least 1")
        for name, surrogate in self.surrogates.items():
            if learns(surrogate.model):  # it would write into statistics that it shares
                raise UserError(
                    f"surrogate '{name}' is in training mode: call .eval() on its model"
                )

    def stages(self) -> tuple[Stage, ...]:
        """The plan. Raises UserError where model, data and protocol do not fit."""
        classes = probe(self.model, self.samples, self.traits)
        stages = self.protocol.plan(self.subject(classes))
        if any(stage.follows_model for stage in stages):
            check_gradient(self.model, self.samples)
        followed = {stage.target for stage in stages if stage.attack.gradient}
        for name, surrogate in self.surrogates.items():
            if name in followed:
                probe_surrogate(name, surrogate, self.samples, classes)
        return stages

    def reasons(self, stages: Sequence[Stage]) -> list[str]:
        """What the plan follows from, in words."""
        return self.protocol.reasons(self.subject(0), stages)

    def subject(self, classes: int) -> Subject:
        """What the plan is made from."""
        return Subject(self.traits, classes, self.threat, self.seed, self.surrogates)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two evaluations to be the same one."""
        ids = self.samples.ids.numpy().astype("<i8").tobytes()
        return {
            "model_sha256": model_sha256(self.model),
            "traits": asdict(self.traits),
            "surrogates": {
                name: model_sha256(surrogate.model) for name, surrogate in self.surrogates.items()
            },
            "data": {
                "name": self.data,
                "split": "test",
                "n": len(self.samples),
                "sha256": self.samples.split.sha256(),
                "samples": hashlib.sha256(ids).hexdigest(),
            },
            "threat": {"norm": self.threat.norm, "eps": self.threat.radius},
            "protocol": self.protocol.to_json(),
            "seed": self.seed,
            "batch_size": self.slots,
            "speed": asdict(self.speed),
            "keep_images": self.keep_images,
            "code": dict(self.code),
            "device": self.samples.device.type,
            "versions": {
                name: version(name)
                for name in ("advbench", "torch", "pyautoattack", "torchattacks")
            }
            | {"search": _own_code()},
        }

    def execute(
        self,
        folder: Path | None,
        stages: tuple[Stage, ...],
        progress: Progress | None = None,
        *,
        crew: Crew | None = None,
        archive: Path | None = None,
        budget: float | None = None,
    ) -> Results:
        """Run what is missing and return the results; with a folder, leave them there.

        A folder that holds an interrupted run of this evaluation is gone on with.
        crew: the processes that share the work; each calls this, with the same folder.
        archive: other evaluations, whose records are used where they are what this one would find.
        budget: seconds after which to stop; the results then name the stages that are missing.
        Raises UserError for a folder that holds another evaluation.
        """
        hurry, progress = Deadline(budget), progress or NullProgress()
        crew = crew or Crew(self.samples.device)
        identity = self.identity()
        started = datetime.now(timezone.utc)
        if folder is not None and crew.rank == 0:
            claim(folder, identity, stages, self.reasons(stages))
        crew.wait()
        if folder is not None and (known := finished_results(folder)) is not None:
            clear_journal(folder)  # of a process that was killed before it could
            return known
        store = Store(folder, crew.rank)
        work = Engine(
            model=self.model,
            samples=self.samples,
            threat=self.threat,
            seed=self.seed,
            slots=self.slots,
            speed=self.speed,
            traits=self.traits,
            surrogates=self.surrogates,
            keep_images=self.keep_images,
            share=(crew.rank, crew.size),
            progress=progress,
            archive=None if archive is None else Archive(archive, folder, identity, stages),
            hurry=hurry,
        )
        work.run(stages, store)
        crew.wait()
        store.read_journal()
        crew.wait()  # nobody clears the journal while another one reads it
        results = summarise(self, identity, stages, store, started)
        if folder is not None and crew.rank == 0:
            if not results.missing:
                store.finish([CLEAN, *(stage.name for stage in stages)])
                self._save_images(folder, store)
            results.save(folder / RESULTS)
            if not results.missing:
                clear_journal(folder)
        crew.wait()
        return results

    def _save_images(self, folder: Path, store: Store) -> None:
        images = store.images()
        if self.keep_images and images is not None:
            samples, x = images
            content = {"sample": samples, "x": x.astype(np.float32)}
            write_atomic(folder / "adversarial.safetensors", lambda path: save_file(content, path))


def finished_results(folder: Path) -> Results | None:
    """The results of an evaluation that is complete; None for another."""
    path = folder / RESULTS
    results = Results.load(path) if path.exists() else None
    return results if results is not None and not results.missing else None


def claim(
    folder: Path, identity: dict[str, Any], stages: tuple[Stage, ...], reasons: list[str]
) -> None:
    """Make ``folder`` the home of this evaluation. Raises UserError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    planned = [stage.to_json() for stage in stages]
    plan = {"identity": identity, "reasons": reasons, "stages": planned}
    plan = json.loads(json.dumps(plan))
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            differs = [k for k in identity if known["identity"].get(k) != plan["identity"][k]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{path}' is damaged: give another directory") from None
        if known != plan:
            what = ", ".join(differs) or "stages"
            raise UserError(
                f"'{folder}' holds another evaluation (it differs in: {what}); "
                "give another directory (hydra.run.dir=DIR)"
            )
    else:
        write_json(path, plan)


def summarise(
    evaluation: Evaluation,
    identity: dict[str, Any],
    stages: tuple[Stage, ...],
    store: Store,
    started: datetime,
) -> Results:
    """The results, computed from the records alone: of the samples that were looked at."""
    clean = store.records(CLEAN)
    n, unseen = len(clean), len(clean) < len(evaluation.samples)
    correct = n - int(clean.broken.sum())
    clean_accuracy = Accuracy.of(correct, n)
    rows, names = [], [stage.name for stage in stages]
    missing = [CLEAN] if unseen else []
    left = owed = clean.sample[~clean.broken]
    for stage in stages:
        records = store.records(stage.name)
        if not np.isin(owed, records.sample).all() or unseen:
            missing.append(stage.name)
        owed = np.setdiff1d(owed, records.sample[records.alone])  # as the engine goes on
        broken = int(np.isin(left, records.sample[records.broken]).sum())
        left = np.setdiff1d(left, records.sample[records.broken])
        correct -= broken
        rows.append(
            StageResult(
                name=stage.name,
                attack=type(stage.attack).__name__,
                target=stage.target,
                why=stage.why,
                robust_acc=correct / max(n, 1),
                attacked=int((records.forwards > 0).sum()),
                broken=broken,
                seconds=round(store.seconds(stage.name), 3),
                forwards=int(records.forwards.sum()),
                backwards=int(records.backwards.sum()),
            )
        )
    data = identity["data"]
    device = evaluation.samples.device
    return Results(
        run=evaluation.run,
        settings=dict(evaluation.settings),
        data={key: data[key] for key in ("name", "split", "n", "sha256")},
        threat=identity["threat"],
        protocol={**identity["protocol"], "seed": evaluation.seed},
        clean=clean_accuracy,
        robust=Accuracy.of(correct, n),
        measures=measures(evaluation.traits, n, [clean, *map(store.records, names)], correct),
        stages=tuple(rows),
        missing=tuple(missing),
        provenance={
            **provenance.code(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "seed": evaluation.seed,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(
                sum(store.seconds(name) for name in (CLEAN, *(stage.name for stage in stages))), 3
            ),
            "model_sha256": identity["model_sha256"],
        },
    )
