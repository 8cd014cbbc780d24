"""One evaluation: plan, run, judge, save the results. Command line and API share it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from advbench.devices import full_float32, name_of
from advbench.errors import UserError
from advbench.evaluation.checks import check_gradient, probe, probe_surrogate
from advbench.evaluation.deadline import Budget, Deadline, PassCounter
from advbench.evaluation.engine import Engine
from advbench.evaluation.identity import (
    behaviour,
    differences,
    has_tensors,
    keeps_images,
    stages_of,
    versions,
)
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.measured import Measured
from advbench.evaluation.phases import Findings, Judge, extended, stage_records
from advbench.evaluation.protocol import Plan, Protocol, Stage, Subject
from advbench.evaluation.resources import ProcessGroup
from advbench.evaluation.stage_cache import Archive
from advbench.evaluation.store import IMAGES, SAMPLES, Store, clear_journal
from advbench.evaluation.summary import summarise, undecided
from advbench.progress import NullProgress, Progress
from advbench.runs import manifest
from advbench.runs.fingerprint import model_sha256
from advbench.runs.judgement import Verdict
from advbench.runs.manifest import CONFIG, PLAN
from advbench.runs.results import RESULTS, Results


@dataclass(frozen=True)
class Evaluation:
    """A job, the protocol that attacks it, and their names in files and on the screen."""

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
    notices: tuple[str, ...] = ()
    """What a person should know of how the model was loaded, a line each."""
    needs_images: bool = False
    """Whether an evaluation without the adversarial images would be another than the one wanted."""
    judge: Judge | None = None
    """Computes the verdict, on which follow-ups may rest too; None for none."""

    def plan(self) -> Plan:
        """The plan. Hashes the model and the data, once.

        Raises:
            UserError: where model, data and protocol do not fit.
        """
        with full_float32():
            return self._plan()

    def _plan(self) -> Plan:
        job = self.job
        classes, notes = probe(job.model, job.samples, job.traits, job.batch_size)
        subject = Subject(job.traits, classes, job.threat, job.seed, job.surrogates)
        stages = self.protocol.plan(subject)
        if any(stage.follows_model for stage in stages):
            notes += check_gradient(job.model, job.samples)
        attacked_surrogates = {stage.victim for stage in stages if stage.attack.gradient}
        for name, surrogate in job.surrogates.items():
            if name in attacked_surrogates:
                probe_surrogate(name, surrogate, job.samples, classes)
        reasons = tuple(self.protocol.reasons(subject, stages))
        return Plan(
            self.identity(),
            reasons,
            stages,
            tuple(self.protocol.may_follow(subject)),
            behaviour(job),
            has_tensors(job.model),
            job.keep_images,
            notes=(*self.notices, *notes),
        )

    def identity(self) -> dict[str, Any]:
        """What is attacked and how, named and hashed."""
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
            "speed": job.fast_model.to_json(),
            "code": dict(self.code),
            "device": name_of(job.samples.device),
            "versions": versions(),
        }

    def execute(
        self,
        folder: Path | None,
        plan: Plan | None = None,
        progress: Progress | None = None,
        *,
        group: ProcessGroup | None = None,
        archive: Path | None = None,
        budget: float | Budget | None = None,
    ) -> Results:
        """Run what is missing and return the results; with a folder, leave them there.

        Args:
            folder: of the evaluation; an interrupted one of the same plan is resumed there.
            plan: from ``plan``, which is called if it is None.
            progress: shows how far the work is.
            group: the processes that share the work; each calls this, with the same folder.
            archive: holds other evaluations, whose records are used where this one would find the
                same.
            budget: after which to stop; a number is seconds. The results then name the stages that
                are missing.

        Raises:
            UserError: for a folder that holds another evaluation.
        """
        limit = budget if isinstance(budget, Budget) else Budget(seconds=budget)
        deadline, plan = Deadline(limit.seconds), plan or self.plan()
        group = group or ProcessGroup(self.job.samples.device)
        started = datetime.now(timezone.utc)
        progress = progress or NullProgress()
        if folder is not None and group.rank == 0:
            for note in claim(folder, plan, self.needs_images):
                progress.note(note)
        group.wait()
        if folder is not None and (finished := finished_results(folder)) is not None:
            return self._with_verdict(finished, folder, plan, progress, group, deadline)
        store = Store(folder, group.rank)
        if store.unchecked and group.rank == 0:
            progress.note(f"the interrupted evaluation was {manifest.UNCHECKED}")
        job = replace(
            self.job,
            keep_images=folder is not None and keeps_images(saved_plan(folder) or {}),
            rank=group.rank,
            world_size=group.world_size,
            progress=progress,
            deadline=deadline,
            passes=PassCounter((limit.passes or math.inf) / group.world_size),
        )
        for note in plan.notes if group.rank == 0 else ():
            job.progress.note(f"note: {note}")
        cache = None if archive is None else Archive(archive, folder, plan)
        stages, findings = self._run_phases(job, plan, store, group, Engine(job, cache))
        results = summarise(
            job,
            plan.identity,
            stages,
            store,
            run=self.run,
            settings=self.settings,
            started=started,
        )
        if findings is not None:
            results = replace(results, estimate=self.protocol.estimate(plan, findings))
        if findings is not None and self.judge is not None and results.attacked:
            results = _judged(results, self.judge, findings)
        judged = findings is not None or bool(results.missing)
        if not judged:
            results = replace(results, verdict=Verdict(label=None, indicators=[], unfinished=True))
        if folder is not None and group.rank == 0:
            if not results.missing:
                store.finish([CLEAN, *(stage.name for stage in stages)])
            final_files = () if results.missing else (SAMPLES, IMAGES, CONFIG)
            results.save(folder / RESULTS, (PLAN, *final_files))
            if judged and not results.missing:
                clear_journal(folder)
        group.wait()
        return results

    def _run_phases(
        self, job: Job, plan: Plan, store: Store, group: ProcessGroup, engine: Engine
    ) -> tuple[tuple[Stage, ...], Findings | None]:
        """Run the plan and its follow-up stages.

        Returns:
            The stages that ran or are missing, and what they found; None while some are missing,
            or an indicator is.
        """
        stages, measured = plan.stages, Measured(store.folder)
        while True:
            engine.run(stages, store)
            group.wait()
            store.read_journal()
            group.wait()  # nobody writes into the journal, or clears it, while another reads it
            if undecided(job, stages, store):
                return stages, None
            findings = self._findings(job, stages, store, group, measured)
            follow_up = None if findings is None else self.protocol.follow_up(plan, findings)
            if follow_up is None:
                return stages, findings
            stages = extended(stages, follow_up.stages)
            if group.rank == 0:
                job.progress.note(follow_up.reason)

    def _with_verdict(
        self,
        finished: Results,
        folder: Path,
        plan: Plan,
        progress: Progress,
        group: ProcessGroup,
        deadline: Deadline,
    ) -> Results:
        """The results of a finished evaluation, with the verdict where it lacks what is wanted."""
        if self.judge is None or not finished.attacked or not self.judge.adds_to(finished.verdict):
            clear_journal(folder)  # of a process that was killed before it could
            return finished
        if group.rank == 0:
            progress.note("the attacks are finished; the verdict is computed")
        stages_by_name = {stage.name: stage for stage in (*plan.stages, *plan.follow_ups)}
        stages = tuple(stages_by_name[row.name] for row in finished.stages)
        job = replace(self.job, progress=progress, deadline=deadline)
        measured = Measured() if self.judge.only else Measured(folder, finished.verdict)
        findings = self._findings(job, stages, Store.finished(folder), group, measured)
        if findings is None:
            return finished
        results = _judged(finished, self.judge, findings)
        if group.rank == 0:
            results.save(folder / RESULTS, (PLAN, SAMPLES, IMAGES, CONFIG))
            clear_journal(folder)
        group.wait()
        return results

    def _findings(
        self,
        job: Job,
        stages: tuple[Stage, ...],
        store: Store,
        group: ProcessGroup,
        measured: Measured,
    ) -> Findings | None:
        """What was found; None where time was up before the last indicator.

        The first process computes the indicators for all.
        """
        records = stage_records(stages, store)
        if self.judge is None or not stages:
            return Findings(stages, records, job.seed)
        result = None
        if group.rank == 0:
            result = self.judge.indicators(job, stages, store, measured), measured.passes
        indicators, passes = json.loads(group.of_first(json.dumps(result)))
        if indicators is None:
            if group.rank == 0:
                job.progress.note("time was up before the verdict was computed")
            return None
        return Findings(stages, records, job.seed, tuple(indicators), tuple(passes))


def _judged(results: Results, judge: Judge, findings: Findings) -> Results:
    """The results with the verdict."""
    nothing_left = results.robust.acc == 0
    verdict = judge.verdict(findings.indicators, findings.passes, nothing_left)
    return replace(results, verdict=verdict)


def finished_results(folder: Path) -> Results | None:
    """The results of an evaluation that is complete, with its verdict; None for another.

    Raises:
        UserError: where its files are not what it wrote.
    """
    path = folder / RESULTS
    results = Results.load(path) if path.exists() else None
    if results is None or not results.complete:
        return None
    manifest.check(folder)
    return results


def saved_plan(folder: Path) -> dict[str, Any] | None:
    """The plan in a folder, as JSON; None if there is none or it is damaged."""
    try:
        plan = manifest.read_json(folder / PLAN)
        _ = plan["identity"]["data"], [stage["name"] for stage in plan["stages"]]
        return plan
    except (OSError, ValueError, KeyError, TypeError, manifest.Damaged):
        return None


def is_home(folder: Path, plan: Plan, needs_images: bool = False) -> bool:
    """Whether the folder holds this evaluation: finished by the same code, or to be resumed.

    Args:
        folder: an evaluation's, or any other.
        plan: of this evaluation.
        needs_images: whether one that keeps no images is another one.
    """
    saved, wanted = saved_plan(folder), plan.to_json()
    if saved is None or differences(wanted, saved):
        return False
    if needs_images and not keeps_images(saved):
        return False
    same_code = saved["identity"].get("versions") == wanted["identity"]["versions"]
    return same_code or finished_results(folder) is None


def claim(folder: Path, plan: Plan, needs_images: bool = False) -> list[str]:
    """Save this plan in ``folder``; returns notes for the user.

    An evaluation that other code started is resumed: the plan then says which code ran which
    stages. One that keeps no images is resumed without.

    Args:
        folder: is made where it is missing.
        plan: of this evaluation.
        needs_images: whether one that keeps no images is refused.

    Raises:
        UserError: if the folder is another evaluation's, or is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted, notes = folder / PLAN, plan.to_json(), []
    if not path.exists():
        finished_results(folder)  # which names its plan
        manifest.write_json(path, wanted)
        return notes
    if (saved := saved_plan(folder)) is None:
        raise UserError(
            f"'{path}' is damaged: copy the run anew, or give another directory (hydra.run.dir=DIR)"
        )
    if differs := differences(wanted, saved):
        raise UserError(
            f"'{folder}' holds another evaluation (it differs in: {', '.join(differs)}); "
            "give another directory (hydra.run.dir=DIR)"
        )
    if needs_images and not keeps_images(saved):
        raise UserError(
            f"'{folder}' keeps no adversarial images: give another directory (hydra.run.dir=DIR), "
            "or leave adversarial=true out"
        )
    if finished_results(folder) is not None and manifest.without_checksums(folder):
        notes.append(f"the evaluation was {manifest.UNCHECKED}")
    if manifest.edited(folder):
        notes.append(f"{CONFIG} was changed since; what was attacked, and how, is in {PLAN}")
    if "behaviour" not in saved:
        notes.append(
            "this evaluation was started before logits were kept: that the model's code outside of "
            "its module is the same was not checked"
        )
    own_versions = wanted["identity"]["versions"]
    resumed = saved.get("resumed", [])
    last_versions = resumed[-1]["versions"] if resumed else saved["identity"].get("versions")
    if last_versions != own_versions:
        version = (last_versions or {}).get("advbench", "?")
        if finished_results(folder) is not None:
            notes.append(
                f"it was finished by other code (advbench {version}); nothing was attacked"
            )
            return notes
        store = Store(folder)
        finished = [name for name in (CLEAN, *stage_names(saved)) if len(store.records(name))]
        saved["resumed"] = [*resumed, {"versions": own_versions, "begun_before": finished}]
        manifest.write_json(path, saved)
        notes.append(f"started by other code (advbench {version}), resumed by this: see {PLAN}")
    return notes


def stage_names(plan: Mapping[str, Any]) -> list[str]:
    """The names of the stages of a saved plan, with those that may follow."""
    return [stage["name"] for stage in stages_of(plan)]
