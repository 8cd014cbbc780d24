"""The training loop.

defense.prepare(model, splits)                   # once, unless its state came with the weights
for each epoch, for each batch x, y of its feed: # original and extra images
    seed the generators by (seed, process, step)
    x, y, targets = augment(x, y)                # targets: soft labels, where images are mixed
    x' = recipe.perturb(model, x, y)             # eval mode, parameters frozen
    with recipe.displaced(model):                # the weights may be elsewhere meanwhile
        terms = recipe.loss_terms + defense.loss_terms    # one forward in train mode
        backward
    clip, optimizer.step
    defense.after_step, average of the weights
    about once a second: loss sound? progress; every ``save_every`` seconds: resume.pt
after each epoch: loss and weights sound? validation, epoch.pt, and what follows from it:
    last.safetensors, the best so far -> model.safetensors, metrics.csv;
    catastrophic overfitting: stop
where loss or weights are lost: back to epoch.pt at a tenth of the rate, once
defense.finish on the best and the last weights    # what is chosen on a finished net
summary.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.base import Splits
from advbench.defenses.base import Defense
from advbench.devices import full_float32, name_of
from advbench.errors import UserError
from advbench.progress import Progress
from advbench.recipes.base import Recipe
from advbench.runs import manifest
from advbench.runs.directory import BASE, CONFIG, SUMMARY, WEIGHTS
from advbench.training.checkpoint import (
    LAST,
    METRICS,
    Checkpoints,
    read_best,
    remove_progress,
    save_weights,
    weights_of,
)
from advbench.training.compilation import uncompiled
from advbench.training.feed import Feed
from advbench.training.guards import (
    SLOWER,
    Diverged,
    Divergence,
    catastrophic_overfitting,
    describe,
    robust_overfitting,
)
from advbench.training.learner import Learner
from advbench.training.metrics import Means, Row, write_table
from advbench.training.optimizers import Optimizer
from advbench.training.pace import Pace
from advbench.training.position import Position
from advbench.training.processes import share_buffers
from advbench.training.settings import Settings
from advbench.training.summary import Summary, measured
from advbench.training.validation import accuracies


@dataclass
class Fit:
    """One call of ``Trainer.fit``."""

    settings: Settings
    """How to train."""
    fabric: Fabric
    """The devices, launched."""
    model: Classifier
    """The defended model."""
    splits: Splits
    """The data."""
    recipe: Recipe
    """Makes inputs and loss of a step."""
    defense: Defense
    """Has its own terms and hooks."""
    schedule: Optimizer
    """Makes the optimizer, and says its learning rate."""
    threat: Threat | None
    """Of the robust validation accuracy."""
    seed: int
    """Of all random numbers."""
    folder: Path
    """The run's directory."""
    identity: Mapping[str, Any]
    """What makes this run this run, as plain JSON."""
    progress: Progress
    """Shows how far the training is."""
    prepared: bool
    """Whether the defense's state came with the weights."""

    def __post_init__(self) -> None:
        settings, fabric = self.settings, self.fabric
        self.began = time.perf_counter()
        settings.check(self.model, self.splits, fabric.device, fabric.world_size)
        self.recipe.check(self.model.num_classes)
        self.share = settings.batch_size // fabric.world_size
        self.feed = Feed(
            self.splits, self.seed, settings.batch_size, fabric.global_rank, fabric.world_size
        )
        self.steps_per_epoch = self.feed.steps
        self.select_robust = "adversarial" in self.recipe.parts

        self.checkpoints = Checkpoints(self.folder, self.identity, fabric.is_global_zero)
        saved = self.checkpoints.newest()
        fabric.barrier()  # before the first writes there
        self.learner = Learner(
            settings,
            fabric,
            self.model,
            self.splits,
            self.recipe,
            self.defense,
            self.schedule,
            self.seed,
            fresh=saved is None,
            prepared=self.prepared,
        )
        for note in self.learner.notes:
            self.progress.note(note)
        self.guard = Divergence(fabric.device, self.steps_per_epoch, self.model.num_classes)
        self.means = Means()
        self.position = Position()
        self.pace = Pace(fabric, settings.save_every)
        self.best: dict[str, Tensor] = {}
        if saved is None:
            self._save_start()
            return
        self._restore(saved)
        self.best = self._best_before(saved)
        self._publish(everything=True)
        self.progress.note(
            f"resuming at epoch {self.position.epoch + 1} of {settings.epochs}, "
            f"step {self.position.batch + 1} of {self.steps_per_epoch}"
        )

    @property
    def step(self) -> int:
        """Finished steps over all epochs."""
        return self.position.epoch * self.steps_per_epoch + self.position.batch

    def run(self) -> Summary:
        self.progress.stage("training", self.settings.epochs * self.steps_per_epoch)
        while self.position.epoch < self.settings.epochs and not self.position.stopped:
            try:
                self._train_epoch()
                self._end_epoch()
            except Diverged as problem:
                self._go_back(str(problem))
        return self._finish()

    def _train_epoch(self) -> None:
        position = self.position
        self.learner.forward.train()
        for x, y in self.feed.batches(position.epoch, position.batch, self.fabric.device):
            step = self.step
            values = self.learner.step(x, y, position.epoch, step, self._lr(step))
            self.guard.watch(values["loss"], step)
            self.means.add(values)
            position.batch += 1
            if self.pace.due() and position.batch < self.steps_per_epoch:
                self._glance()

    def _lr(self, step: int) -> float:
        lr = self.schedule.lr_at(step, self.settings.epochs, self.steps_per_epoch)
        return lr * self.position.guards["diverged"]["rate"] if self._slowed else lr

    @property
    def _slowed(self) -> bool:
        return "diverged" in self.position.guards

    def _glance(self) -> None:
        """The only place inside an epoch that waits for the device."""
        self.guard.check(self.fabric)
        self._tell()
        if self.pace.meet():
            self.checkpoints.save_inside(self._state())
            self.pace.saved()

    def _tell(self) -> None:
        text = f"epoch {self.position.epoch + 1}/{self.settings.epochs}"
        if self.position.batch:
            text += f"  loss {self.means.last('loss'):.3f}"
        self.progress.update(self.step, text)

    def _end_epoch(self) -> None:
        position, fabric = self.position, self.fabric
        self.guard.check(fabric)
        row: Row = {"epoch": position.epoch + 1, "step": self.step, "lr": self._lr(self.step - 1)}
        row |= self.means.read(fabric)
        with torch.no_grad(), uncompiled():
            self.defense.after_epoch(self.learner.saved_model.eval(), self.splits)
        # Before anything is written: no file is to hold a NaN.
        self.guard.check_weights(fabric, position.epoch + 1, self.model, self.learner.saved_model)
        row |= self._validate()
        clean, robust = row["val_clean"], row.get("val_robust")
        self._tick()
        row["seconds"] = position.epoch_seconds
        position.rows.append(row)

        merit = [robust, clean] if self.select_robust and robust is not None else [clean]
        if merit >= position.best:  # at first the list is empty, and less than any other
            position.best, position.best_epoch = merit, position.epoch + 1
            self.best = weights_of(self.learner.saved_model)
        if collapse := catastrophic_overfitting(position.rows, len(self.splits.val)):
            position.guards["catastrophic_overfitting"] = collapse
        position.epoch += 1
        position.batch = 0
        position.epoch_seconds = 0.0
        self.means = Means()
        # Until it is written, a killed run repeats the epoch; on a GPU perhaps with other bits, so
        # nothing else may be left of the first attempt.
        self._save_start()
        self.pace.saved()
        self._publish()
        self.progress.epoch(row)
        if collapse:
            self.progress.note(describe(collapse))
        self._tell()

    def _validate(self) -> Row:
        model = self.learner.saved_model
        with uncompiled():
            clean, robust = accuracies(
                model,
                self.splits.val,
                self.threat,
                steps=self.settings.val_steps,
                seed=self.seed,
                batch_size=self.share,
                fabric=self.fabric,
                traits=self.defense.traits(model),
            )
        return {"val_clean": clean} | ({} if robust is None else {"val_robust": robust})

    def _finish_defense(self, rows: list[Row]) -> tuple[dict[str, Any], list[Row]]:
        """Let the defense choose on the best and on the last weights what it chooses at the end.

        rows: of the best and of the last epoch.  Returns what it chose on the best, and the rows
        measured again, where it chose anything. A run that is killed in here repeats it all.
        """
        model = self.learner.saved_model.eval()
        chosen, last = self._choose(LAST)
        if not chosen:
            return {}, rows
        best = last
        if self.position.best_epoch != self.position.epoch:
            final = weights_of(model)
            model.load_state_dict(self.best)
            chosen, best = self._choose(WEIGHTS)
            model.load_state_dict(final)
        elif self.fabric.is_global_zero:
            save_weights(model, self.folder / WEIGHTS)
        values = ", ".join(f"{key}={value}" for key, value in chosen.items())
        self.progress.note(f"chosen on the validation split: {values}")
        return chosen, [best, last]

    def _choose(self, name: str) -> tuple[dict[str, Any], Row]:
        model = self.learner.saved_model
        with torch.no_grad():
            with full_float32(), uncompiled():
                chosen = self.defense.finish(model, self.splits)
            share_buffers(model, self.fabric)
        if not chosen:
            return {}, {}
        row = self._validate()
        if self.fabric.is_global_zero:
            save_weights(model, self.folder / name)
        return chosen, row

    def _publish(self, everything: bool = False) -> None:
        """The files of the epoch that ended, or all: what a killed run has of them is not used."""
        position = self.position
        if not self.fabric.is_global_zero or not position.rows:
            return
        if not position.batch:  # inside an epoch there are newer weights than those of its start
            save_weights(self.learner.saved_model, self.folder / LAST)
        if everything or position.best_epoch == position.epoch:
            save_weights(self.best, self.folder / WEIGHTS)
        write_table(self.folder / METRICS, position.rows)

    def _save_start(self) -> None:
        """The state at the start of an epoch, with the weights of the best epoch so far."""
        self.checkpoints.save_start({**self._state(), "best": self.best})

    def _best_before(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights of the best epoch so far; a state of an earlier version has none."""
        position = self.position
        if "best" in saved or not position.rows:
            return saved.get("best", {})
        self.progress.note(f"the interrupted run was {manifest.UNCHECKED}")
        last = position.best_epoch == position.epoch and not position.batch
        return weights_of(self.learner.saved_model) if last else read_best(self.folder / WEIGHTS)

    def _go_back(self, why: str) -> None:
        """To the start of the epoch, wherever in it this is, so that no save or kill matters."""
        repeated = self._slowed
        seconds = self.position.seconds, self.position.epoch_seconds
        self._restore(self.checkpoints.start())
        self.position.seconds, self.position.epoch_seconds = seconds
        self.guard.forget()
        epoch = self.position.epoch + 1
        if repeated:
            self._give_up(why)
        self.position.guards["diverged"] = {"epoch": epoch, "why": why, "rate": SLOWER}
        self._save_start()
        self.fabric.barrier()  # the others may have to read it next
        self.progress.note(f"{why}: back to the start of epoch {epoch}, at {SLOWER:g} of the rate")

    def _give_up(self, why: str) -> NoReturn:
        weights = f"the weights of epoch {self.position.epoch} are"
        if self.fabric.is_global_zero and not self.position.rows:
            for name in (WEIGHTS, LAST):
                save_weights(self.learner.saved_model, self.folder / name)
        if not self.position.rows:
            weights = "the weights of the start are"
        before = self.position.guards["diverged"]["why"]
        raise UserError(
            f"the training diverged twice: {before}, and then, at {SLOWER:g} of the rate, {why}; "
            f"{weights} kept in {self.folder / LAST}; try a lower optimizer.lr"
        )

    def _tick(self) -> None:
        now = time.perf_counter()
        self.position.seconds += now - self.began
        self.position.epoch_seconds += now - self.began
        self.began = now

    def _state(self) -> dict[str, Any]:
        """All that decides what comes next."""
        self._tick()
        return {
            "devices": self.fabric.world_size,
            "position": asdict(self.position),
            "means": self.means.state(self.fabric),
            **self.learner.state(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["devices"] != self.fabric.world_size:
            raise UserError(
                f"{self.folder} was started with trainer.devices={state['devices']}: continue "
                "with as many"
            )
        self.learner.restore(state)
        self.position = Position(**state["position"])
        self.means = Means()
        self.means.load(state["means"], self.fabric)

    def _finish(self) -> Summary:
        self._tick()
        position, device = self.position, self.fabric.device
        n = len(self.splits.val)
        rows = [position.rows[position.best_epoch - 1], position.rows[-1]]
        val, last = (measured(row, n, self.settings.val_steps, self.threat) for row in rows)
        if len(position.best) == 2 and robust_overfitting(val["robust"], last["robust"], n):
            fall = {"best": val["robust"], "last": last["robust"]}
            position.guards["robust_overfitting"] = fall
            self.progress.note(
                f"robust overfitting: {100 * fall['best']:.1f} % under PGD at epoch "
                f"{position.best_epoch} and {100 * fall['last']:.1f} % at the last; "
                "model.safetensors is the former"
            )
        chosen, rows = self._finish_defense(rows)
        val, last = (measured(row, n, self.settings.val_steps, self.threat) for row in rows)
        summary = Summary(
            identity=self.identity,
            epochs=position.epoch,
            steps=self.step,
            best_epoch=position.best_epoch,
            selected_by=("robust" if len(position.best) == 2 else "clean") + " validation accuracy",
            val=val,
            last=last,
            guards=position.guards,
            chosen=chosen,
            seconds=position.seconds,
            parameters=sum(p.numel() for p in self.model.parameters()),
            torch=torch.__version__,
            device=name_of(device),
            devices=self.fabric.world_size,
            precision=self.settings.precision,
        )
        if self.fabric.is_global_zero:
            summary.save(self.folder / SUMMARY, (WEIGHTS, LAST, METRICS, BASE, CONFIG))
            remove_progress(self.folder)
        self.fabric.barrier()
        return summary
