"""The learner: the model, its optimizer, its averaged weights, and one step of all three."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advbench.backbones.base import Classifier
from advbench.data.base import Splits
from advbench.defenses.base import Defense
from advbench.devices import full_float32
from advbench.errors import UserError
from advbench.recipes.base import Recipe
from advbench.training.attack_model import AttackModel, attack_model
from advbench.training.averaging import Average
from advbench.training.compilation import compiled
from advbench.training.optimizers import Optimizer
from advbench.training.processes import share_buffers
from advbench.training.randomness import derive
from advbench.training.settings import Settings
from advbench.training.step import TrainingStep
from advbench.training.syncnorm import synchronise


class Learner:
    """All that changes in a step, on its device.

    Args:
        settings: of the trainer.
        fabric: the devices.
        model: with the defense applied; it is moved to its device.
        splits: the data.
        recipe, defense: whose hooks are called.
        schedule: makes the optimizer.
        seed: of the run.
        fresh: the training begins, so the defense is prepared, unless ``prepared`` says that what
            that would find came with the weights. Otherwise ``restore`` comes next.

    Attributes:
        attack_model: what the attack passes through, where that is not the model itself.
        notes: lines worth telling about how it runs.
        saved_model: what is validated and saved: the average of the weights, where there is one.

    Raises:
        UserError: if nothing of the model can be trained.
    """

    def __init__(
        self,
        settings: Settings,
        fabric: Fabric,
        model: Classifier,
        splits: Splits,
        recipe: Recipe,
        defense: Defense,
        schedule: Optimizer,
        seed: int,
        fresh: bool,
        prepared: bool = False,
    ) -> None:
        self.settings, self.fabric, self.seed = settings, fabric, seed
        self.model, self.splits, self.recipe, self.defense = model, splits, recipe, defense
        self.notes: list[str] = []
        mixed = settings.precision == "bf16-mixed"
        self.cast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=mixed)
        # Saves a CPU 5 to 25 % of a step, as measured; made for tensor cores; not proven elsewhere.
        proven = fabric.device.type in ("cpu", "cuda")
        self.layout = torch.channels_last if proven else torch.contiguous_format
        if settings.sync_batchnorm:
            synchronise(model)
        model.to(fabric.device)
        model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        if fresh and not prepared:
            torch.manual_seed(derive(seed, "prepare"))
            model.eval()
            with full_float32():
                defense.prepare(model, splits)
        self.average = Average(model, settings.ema) if settings.ema else None
        self.saved_model = self.average.module if self.average else model
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("nothing to train: every parameter of the model is frozen")
        self.optimizer = schedule.build(trainable)
        self.training_step = TrainingStep(model, recipe, defense)
        self.forward, self.stepper = fabric.setup(self.training_step, self.optimizer)
        self.attack_model: AttackModel | None = None
        if settings.compile is not None:
            rows = settings.batch_size // fabric.world_size  # it compiles for one shape
            self.notes += compiled(model, settings.compile, *self._images(rows), self.cast)
        elif fresh and "adversarial" in recipe.parts:
            self.attack_model = attack_model(model, *self._images(4))
        self.generator = torch.Generator(fabric.device)

    def step(self, x: Tensor, y: Tensor, epoch: int, step: int, lr: float) -> dict[str, Tensor]:
        """One step; the model is in training mode. Nothing in it waits for the device.

        Args:
            x, y: the images and classes of this process.
            epoch, step: both from 0, over all epochs.

        Returns:
            The loss, its terms, and the accuracy on each part of the batch.
        """
        fabric = self.fabric
        torch.manual_seed(derive(self.seed, "step", fabric.global_rank, step))
        self.generator.manual_seed(derive(self.seed, "augment", fabric.global_rank, step))
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        x, y, targets = self.splits.augmented(x, y, self.generator)
        x = x.contiguous(memory_format=self.layout)
        inputs = {"clean": x}
        if self.attack_model is not None:
            self.attack_model.refresh()
        if "adversarial" in self.recipe.parts:
            with self.cast:
                victim = self.attack_model or self.model
                inputs["adversarial"] = self.recipe.perturb(victim, x, y)
        batch = inputs, y, epoch, step, targets

        def loss_here() -> Tensor:
            with self.cast:
                return _total(self.training_step(*batch))

        self.stepper.zero_grad()
        with self.recipe.displaced(self.model, loss_here, epoch):
            with self.cast:
                terms: dict[str, Tensor] = self.forward(*batch)
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
            self.average.update(self.model, step)
        accuracy = {
            f"train_{name}": (part.logits.argmax(1) == y).float().mean()
            for name, part in record.parts.items()
        }
        return {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}, **accuracy}

    def state(self) -> dict[str, Any]:
        """All state, from which ``restore`` continues with the same bits."""
        memory = self.training_step.memory
        return {
            "model": self.model.state_dict(),
            "memory": memory.state_dict() if memory else None,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
            "target": self.attack_model is not None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.training_step.memory is not None:
            self.training_step.memory.load_state_dict(state["memory"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        # Decided once: at other weights the check might decide otherwise.
        folded = state["target"]
        self.attack_model = (self.attack_model or AttackModel(self.model)) if folded else None

    def _images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first so many training images, or all, and their classes."""
        ids = torch.arange(min(count, len(self.splits.train)))
        x, y = self.splits.train.fetch(ids, self.fabric.device)
        return x.contiguous(memory_format=self.layout), y


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
