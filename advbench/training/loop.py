"""The training loop.

defense.prepare(model, splits)                   # once, not again after an interruption
for each epoch, for each batch x, y of its feed: # original and extra images
    seed the generators by (seed, process, step)
    x, y, targets = augment(x, y)                # targets: soft labels, where images are mixed
    x' = recipe.perturb(model, x, y)             # eval mode, parameters frozen
    with recipe.displaced(model):                # the weights may be elsewhere meanwhile
        terms = recipe.loss_terms + defense.loss_terms    # one forward in train mode
        backward
    clip, optimizer.step
    defense.after_step, average of the weights
    about once a second: loss finite? progress; every ``save_every`` seconds: resume.pt
after each epoch: validation, the best so far -> model.safetensors, metrics.csv, resume.pt
summary.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.data.base import Splits
from advbench.defenses.base import Defense
from advbench.errors import UserError
from advbench.recipes.base import Recipe
from advbench.training.averaging import averaged
from advbench.training.checkpoint import load_resume, save_resume, save_weights
from advbench.training.feed import Feed
from advbench.training.guards import FiniteLoss
from advbench.training.metrics import Means, Row, write_table
from advbench.training.optimizers import Optimizer
from advbench.training.pace import Pace
from advbench.training.processes import share_buffers
from advbench.training.randomness import derive
from advbench.training.settings import Settings
from advbench.training.step import TrainingStep
from advbench.training.summary import Report, Summary
from advbench.training.validation import accuracies


@dataclass
class Position:
    """How far a training is.

    epoch, batch: finished epochs, and finished steps of the one that runs.
    rows: of metrics.csv.
    best: what the best epoch so far was chosen by, larger is better; best_epoch: from 1.
    seconds, epoch_seconds: of work so far, over all sessions.
    """

    epoch: int = 0
    batch: int = 0
    rows: list[Row] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0


@dataclass
class Fit:
    """One call of ``Trainer.fit``, which describes the fields; ``identity`` is plain JSON here."""

    settings: Settings
    fabric: Fabric
    model: Classifier
    splits: Splits
    recipe: Recipe
    defense: Defense
    schedule: Optimizer
    threat: Threat | None
    seed: int
    folder: Path
    identity: Mapping[str, Any]
    report: Report

    def __post_init__(self) -> None:
        settings, fabric = self.settings, self.fabric
        self.began = time.perf_counter()
        self._check_sizes()
        self.share = settings.batch_size // fabric.world_size
        self.feed = Feed(
            self.splits, self.seed, settings.batch_size, fabric.global_rank, fabric.world_size
        )
        self.steps_per_epoch = self.feed.steps
        self.mixed = settings.precision == "bf16-mixed"
        self.select_robust = "adversarial" in self.recipe.parts

        saved = load_resume(self.folder / "resume.pt", self.identity)
        # Saves a CPU 5 to 25 % of a step, as measured; made for tensor cores; not proven elsewhere.
        known = fabric.device.type in ("cpu", "cuda")
        self.layout = torch.channels_last if known else torch.contiguous_format
        self.model.to(fabric.device)
        self.model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        if saved is None:
            torch.manual_seed(derive(self.seed, "prepare"))
            self.model.eval()
            self.defense.prepare(self.model, self.splits)
        self.average = averaged(self.model, settings.ema) if settings.ema else None
        self.kept = self.average.module if self.average else self.model
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("nothing to train: every parameter of the model is frozen")
        self.optimizer = self.schedule.build(trainable)
        self.training_step = TrainingStep(self.model, self.recipe, self.defense)
        self.forward, self.stepper = fabric.setup(self.training_step, self.optimizer)

        self.generator = torch.Generator(fabric.device)
        self.guard = FiniteLoss(fabric.device, self.steps_per_epoch)
        self.means = Means()
        self.position = Position()
        if saved is not None:
            self._restore(saved)
        self.pace = Pace(fabric, settings.save_every)

    def _check_sizes(self) -> None:
        batch_size, ranks = self.settings.batch_size, self.fabric.world_size
        if batch_size > len(self.splits.train):
            raise UserError(
                f"trainer.batch_size={batch_size} is more than the {len(self.splits.train)} "
                "training samples"
            )
        if batch_size % ranks:
            raise UserError(
                f"trainer.batch_size={batch_size} cannot be dealt evenly over {ranks} devices; "
                f"take {batch_size // ranks * ranks or ranks}"
            )
        if len(self.splits.val) < ranks:
            raise UserError("the validation split is empty: give data.val=0.1")

    @property
    def step(self) -> int:
        """Finished steps over all epochs."""
        return self.position.epoch * self.steps_per_epoch + self.position.batch

    def run(self) -> Summary:
        while self.position.epoch < self.settings.epochs:
            self._train_epoch()
            self._end_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        position = self.position
        self.forward.train()
        for x, y in self.feed.batches(position.epoch, position.batch, self.fabric.device):
            self._train_step(x, y)
            position.batch += 1
            if self.pace.due() and position.batch < self.steps_per_epoch:
                self._glance()

    def _train_step(self, x: Tensor, y: Tensor) -> None:
        fabric, step = self.fabric, self.step
        torch.manual_seed(derive(self.seed, "step", fabric.global_rank, step))
        self.generator.manual_seed(derive(self.seed, "augment", fabric.global_rank, step))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)

        x, y, targets = self.splits.augmented(x, y, self.generator)
        x = x.contiguous(memory_format=self.layout)
        inputs = {"clean": x}
        cast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=self.mixed)
        with cast:
            if "adversarial" in self.recipe.parts:
                inputs["adversarial"] = self.recipe.perturb(self.model, x, y)
        given = inputs, y, self.position.epoch, step, targets

        def here() -> Tensor:
            with cast:
                return _total(self.training_step(*given))

        self.stepper.zero_grad()
        with self.recipe.displaced(self.model, here, self.position.epoch):
            with cast:
                terms: dict[str, Tensor] = self.forward(*given)
            loss = _total(terms)
            fabric.backward(loss)
        if self.settings.clip_grad is not None:
            fabric.clip_gradients(
                self.forward,
                self.stepper,
                max_norm=self.settings.clip_grad,
                error_if_nonfinite=False,  # it would wait for the device; the guard finds it
            )
        self.stepper.step()

        record = self.training_step.record
        with torch.no_grad():
            self.recipe.after_step(self.model, record)
            self.defense.after_step(self.model, record)
        share_buffers(self.training_step, fabric)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.guard.watch(loss, step)
        accuracy = {
            f"train_{name}": (part.logits.argmax(1) == y).float().mean()
            for name, part in record.parts.items()
        }
        self.means.add(
            {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}, **accuracy}
        )

    def _lr(self, step: int) -> float:
        return self.schedule.lr_at(step, self.settings.epochs, self.steps_per_epoch)

    def _glance(self) -> None:
        """The only place inside an epoch that waits for the device."""
        self.guard.check(self.fabric)
        self._tell()
        if self.pace.meet():
            self._save()

    def _tell(self) -> None:
        text = f"epoch {self.position.epoch + 1}/{self.settings.epochs}"
        if self.position.batch:
            text += f"  loss {self.means.last('loss'):.3f}"
        self.report.progress(self.step, self.settings.epochs * self.steps_per_epoch, text)

    def _end_epoch(self) -> None:
        position = self.position
        self.guard.check(self.fabric)
        row: Row = {"epoch": position.epoch + 1, "step": self.step, "lr": self._lr(self.step - 1)}
        row |= self.means.read(self.fabric)
        with torch.no_grad():
            self.defense.after_epoch(self.kept.eval(), self.splits)
        clean, robust = accuracies(
            self.kept,
            self.splits.val,
            self.threat,
            steps=self.settings.val_steps,
            seed=self.seed,
            batch_size=self.share,
            fabric=self.fabric,
        )
        row["val_clean"] = clean
        if robust is not None:
            row["val_robust"] = robust
        self._tick()
        row["seconds"] = position.epoch_seconds
        position.rows.append(row)

        merit = [robust, clean] if self.select_robust and robust is not None else [clean]
        best = merit >= position.best  # at first the list is empty, and less than any other
        if best:
            position.best, position.best_epoch = merit, position.epoch + 1
        if self.fabric.is_global_zero:
            save_weights(self.kept, self.folder / "last.safetensors")
            if best:
                save_weights(self.kept, self.folder / "model.safetensors")
            write_table(self.folder / "metrics.csv", position.rows)
        position.epoch += 1
        position.batch = 0
        position.epoch_seconds = 0.0
        self.means = Means()
        self.report.epoch(row)
        self._tell()
        # Last: until it is written, a killed run repeats what came before, with the same result.
        self._save()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.position.seconds += now - self.began
        self.position.epoch_seconds += now - self.began
        self.began = now

    def _save(self) -> None:
        self._tick()
        state = {
            "devices": self.fabric.world_size,
            "position": asdict(self.position),
            "means": self.means.state(self.fabric),
            "model": self.model.state_dict(),
            "memory": memory.state_dict() if (memory := self.training_step.memory) else None,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }
        if self.fabric.is_global_zero:
            save_resume(self.folder / "resume.pt", state, self.identity)
        self.pace.saved()

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["devices"] != self.fabric.world_size:
            raise UserError(
                f"{self.folder} was begun with trainer.devices={state['devices']}: go on with as "
                "many"
            )
        self.model.load_state_dict(state["model"])
        if self.training_step.memory is not None:
            self.training_step.memory.load_state_dict(state["memory"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.position = Position(**state["position"])
        self.means.load(state["means"], self.fabric)
        self.report.note(
            f"going on at epoch {self.position.epoch + 1} of {self.settings.epochs}, "
            f"step {self.position.batch + 1} of {self.steps_per_epoch}"
        )

    def _finish(self) -> Summary:
        self._tick()
        position, device = self.position, self.fabric.device
        row = position.rows[position.best_epoch - 1]
        robust = row.get("val_robust")
        summary = Summary(
            identity=self.identity,
            epochs=position.epoch,
            steps=self.step,
            best_epoch=position.best_epoch,
            selected_by=("robust" if len(position.best) == 2 else "clean") + " validation accuracy",
            val={
                "n": len(self.splits.val),
                "clean": row["val_clean"],
                "robust": robust,
                "attack": f"PGD-{self.settings.val_steps}, {self.threat}"
                if robust is not None
                else None,
            },
            seconds=position.seconds,
            parameters=sum(p.numel() for p in self.model.parameters()),
            torch=torch.__version__,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            devices=self.fabric.world_size,
            precision=self.settings.precision,
        )
        if self.fabric.is_global_zero:
            summary.save(self.folder / "summary.json")
            (self.folder / "resume.pt").unlink(missing_ok=True)
        self.fabric.barrier()
        return summary


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
