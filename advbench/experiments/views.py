"""How a training and an evaluation show their progress on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from advbench.console import Bar, Meter, Screen
from advbench.progress import NullProgress
from advbench.runs.results import CLEAN
from advbench.text import duration, number


class TrainingView(NullProgress):
    """Shows the ``Progress`` of a training.

    batch_size: samples of a step, over all devices.
    """

    def __init__(self, screen: Screen, bar: Bar, batch_size: int) -> None:
        self.screen, self.bar, self.batch_size = screen, bar, batch_size
        self.meter = Meter()
        self.total = 0
        self.last = ""

    def note(self, text: str) -> None:
        self.screen.line(text)

    def stage(self, name: str, total: int) -> None:
        self.meter, self.total = Meter(), total
        self.bar.begin(name)

    def update(self, done: int, text: str = "", **_: float | None) -> None:
        total = self.total
        self.meter.at(done)
        if done == total:
            return
        rate, parts = self.meter.rate, [text]
        if rate is not None:
            parts.append(f"{duration((total - done) / rate)} left of the training")
        if self.last:
            parts.append(self.last)
        if rate is not None:
            parts.append(f"{number(rate * self.batch_size)} samples/s")
        self.bar.update(done, total, parts)

    def epoch(self, row: Mapping[str, float]) -> None:
        shown = ("train_clean", "train_adversarial", "val_clean", "val_robust")
        parts = [f"{key} {100 * row[key]:5.1f} %" for key in shown if row.get(key) is not None]
        losses = [f"{k} {v:.3f}" for k, v in row.items() if k == "loss" or k.startswith("loss_")]
        losses = losses if len(losses) > 2 else losses[:1]  # one term is the sum
        text = "  ".join([f"epoch {int(row['epoch']):3d}", *losses, *parts])
        self.screen.line(f"{text}  {row['seconds']:.1f} s")
        self.bar.rest()
        values = [row[key] for key in ("val_clean", "val_robust") if row.get(key) is not None]
        self.last = f"val {' / '.join(f'{100 * value:.1f}' for value in values)} %"


class EvaluationView(NullProgress):
    """Shows the ``Progress`` of an evaluation.

    stages: names of all stages, in order.
    """

    def __init__(self, screen: Screen, bar: Bar, stages: Sequence[str] = ()) -> None:
        self.screen, self.bar, self.stages = screen, bar, list(stages)
        self.name = ""
        self.before = self.total = 0
        self.meter = Meter()

    def stage(self, name: str, total: int) -> None:
        if name == self.name:  # the next group of the same stage
            self.before, self.total = self.before + self.total, total
            return
        self.name, self.before, self.total = name, 0, total
        self.meter = Meter()
        self.meter.at(0)
        prefix = ""
        if name in self.stages:
            prefix = f"[{self.stages.index(name) + 1}/{len(self.stages)}] "
        self.bar.begin(f"{prefix}{name}")
        self.screen.line(f"{prefix}{name}: {total} samples")

    def update(
        self,
        done: int,
        text: str = "",
        *,
        correct: int | None = None,
        samples: int | None = None,
        seconds_left: float | None = None,
    ) -> None:
        done += self.before
        self.meter.at(done)
        parts = []
        if correct is not None and samples is not None:
            share = f"{100 * correct / max(samples, 1):.1f} %"
            parts.append(share if self.name == CLEAN else f"at most {share}")
        if seconds_left:
            parts.append(f"{duration(seconds_left)} left of this stage")
        if text:
            parts.append(text)
        if correct is not None and samples is not None:
            parts.append(f"{correct} alive, {samples - correct} broken")
        if self.meter.rate is not None:
            parts.append(f"{number(self.meter.rate)} samples/s")
        self.bar.update(done, self.before + self.total, parts)

    def note(self, text: str) -> None:
        self.screen.line(text)
