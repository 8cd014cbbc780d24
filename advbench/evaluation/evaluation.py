"""One evaluation from start to end: plan, run, summarise. The command line and the API share it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from advbench.errors import UserError
from advbench.evaluation.checks import check_gradient, probe, probe_surrogate
from advbench.evaluation.deadline import Deadline
from advbench.evaluation.engine import Engine
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.protocol import Plan, Protocol, Subject
from advbench.evaluation.resources import ProcessGroup
from advbench.evaluation.stage_cache import Archive
from advbench.evaluation.store import Store, clear_journal
from advbench.evaluation.summary import summarise
from advbench.files import file_sha256, read_json, short_hash, write_atomic, write_json
from advbench.progress import NullProgress, Progress
from advbench.runs.fingerprint import model_sha256
from advbench.runs.results import RESULTS, Results

PLAN = "plan.json"
IMAGES = "adversarial.safetensors"


@cache
def _own_code() -> str:
    """Hash of the code that decides what is found, between two versions too."""
    home, parts = Path(__file__).parents[1], ("attacks", "backbones", "defenses", "evaluation")
    files = (file for part in parts for file in sorted((home / part).glob("*.py")))
    return short_hash([file_sha256(file) for file in files])


@dataclass(frozen=True)
class Evaluation:
    """A job, the protocol that it is attacked with, and what people and files call it."""

    run: str
    """What is evaluated, for people."""
    data: str
    """Name of the data."""
    protocol: Protocol
    """Makes the plan."""
    job: Job
    """What is attacked, and how."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the user's own files, by name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What sets the evaluated thing apart from others, by key."""

    def plan(self) -> Plan:
        """The plan. Hashes the model and the data, once.

        Raises UserError where model, data and protocol do not fit.
        """
        job = self.job
        classes = probe(job.model, job.samples, job.traits)
        subject = Subject(job.traits, classes, job.threat, job.seed, job.surrogates)
        stages = self.protocol.plan(subject)
        if any(stage.follows_model for stage in stages):
            check_gradient(job.model, job.samples)
        followed = {stage.victim for stage in stages if stage.attack.gradient}
        for name, surrogate in job.surrogates.items():
            if name in followed:
                probe_surrogate(name, surrogate, job.samples, classes)
        return Plan(self._identity(), tuple(self.protocol.reasons(subject, stages)), stages)

    def _identity(self) -> dict[str, Any]:
        job = self.job
        ids = job.samples.ids.numpy().astype("<i8").tobytes()
        return {
            "model_sha256": model_sha256(job.model),
            "traits": asdict(job.traits),
            "surrogates": {
                name: model_sha256(surrogate.model) for name, surrogate in job.surrogates.items()
            },
            "data": {
                "name": self.data,
                "split": "test",
                "n": len(job.samples),
                "sha256": job.samples.split.sha256(),
                "samples": hashlib.sha256(ids).hexdigest(),
            },
            "threat": {"norm": job.threat.norm, "eps": job.threat.radius},
            "protocol": self.protocol.to_json(),
            "seed": job.seed,
            "batch_size": job.batch_size,
            "speed": asdict(job.fast_model),
            "keep_images": job.keep_images,
            "code": dict(self.code),
            "device": job.samples.device.type,
            "versions": {
                name: version(name)
                for name in ("advbench", "torch", "pyautoattack", "torchattacks")
            }
            | {"search": _own_code()},
        }

    def execute(
        self,
        folder: Path | None,
        plan: Plan | None = None,
        progress: Progress | None = None,
        *,
        group: ProcessGroup | None = None,
        archive: Path | None = None,
        budget: float | None = None,
    ) -> Results:
        """Run what is missing and return the results; with a folder, leave them there.

        Args:
            folder: of the evaluation; an interrupted one of the same plan is resumed there.
            plan: from ``plan``, which is called if it is None.
            progress: shows how far the work is.
            group: the processes that share the work; each calls this, with the same folder.
            archive: holds other evaluations, whose records are used where this one would find the
                same.
            budget: seconds after which to stop; the results then name the stages that are missing.

        Raises:
            UserError: for a folder that holds another evaluation.
        """
        deadline, plan = Deadline(budget), plan or self.plan()
        group = group or ProcessGroup(self.job.samples.device)
        started = datetime.now(timezone.utc)
        if folder is not None and group.rank == 0:
            claim(folder, plan)
        group.wait()
        if folder is not None and (known := finished_results(folder)) is not None:
            clear_journal(folder)  # of a process that was killed before it could
            return known
        store = Store(folder, group.rank)
        job = replace(
            self.job,
            rank=group.rank,
            world_size=group.world_size,
            progress=progress or NullProgress(),
            deadline=deadline,
        )
        others = None if archive is None else Archive(archive, folder, plan)
        Engine(job, others).run(plan.stages, store)
        group.wait()
        store.read_journal()
        group.wait()  # nobody clears the journal while another one reads it
        results = summarise(
            job,
            plan.identity,
            plan.stages,
            store,
            run=self.run,
            settings=self.settings,
            started=started,
        )
        if folder is not None and group.rank == 0:
            if not results.missing:
                store.finish([CLEAN, *(stage.name for stage in plan.stages)])
                if job.keep_images:
                    _save_images(folder, store)
            results.save(folder / RESULTS)
            if not results.missing:
                clear_journal(folder)
        group.wait()
        return results


def _save_images(folder: Path, store: Store) -> None:
    if (images := store.images()) is not None:
        samples, x = images
        content = {"sample": samples, "x": x.astype(np.float32)}
        write_atomic(folder / IMAGES, lambda path: save_file(content, path))


def finished_results(folder: Path) -> Results | None:
    """The results of an evaluation that is complete; None for another."""
    path = folder / RESULTS
    results = Results.load(path) if path.exists() else None
    return results if results is not None and not results.missing else None


def claim(folder: Path, plan: Plan) -> None:
    """Make ``folder`` the home of this plan. Raises UserError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / PLAN, plan.to_json()
    if not path.exists():
        write_json(path, wanted)
        return
    try:
        known = read_json(path)
        theirs, ours = known["identity"], wanted["identity"]
        differs = [key for key in ours if theirs.get(key) != ours[key]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"'{path}' is damaged: give another directory") from None
    if known != wanted:
        what = ", ".join(differs) or "stages"
        raise UserError(
            f"'{folder}' holds another evaluation (it differs in: {what}); "
            "give another directory (hydra.run.dir=DIR)"
        )
