"""The learning curves of a run as a picture in its directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from advbench.files import write_atomic
from advbench.report import plots
from advbench.report.run_figures import read_metrics
from advbench.report.style import CLEAN, MUTED, ROBUST, style

DPI = 160
TRAINING = {"training, clean": CLEAN, "training, adversarial": ROBUST}


def draw(folder: Path, best: int | None = None) -> None:
    """Write ``curves.png`` beside metrics.csv, atomically: accuracies, losses, learning rate.

    best: the epoch that is kept, from 1; found in the table if it is not given. Raises UserError
    for a table without epochs.
    """
    columns = read_metrics(folder / "metrics.csv")
    best = best or best_epoch(columns)
    with style():
        figure = plots.learning(columns, best)
        figure.set_size_inches(5.4, 4.6)
        upper, lower = figure.axes[:2]
        for line in upper.lines:  # of training and validation, in the colour of what they measure
            if line.get_label() in TRAINING:
                line.set_color(TRAINING[str(line.get_label())])
        figure.legends[0].remove()
        upper.legend(loc="lower right", ncols=2)
        upper.set_title(f"{folder.name}, best epoch {best} (upright)", loc="left", color=MUTED)
        if "lr" in columns:
            rate = lower.twinx()
            rate.plot(columns["epoch"], columns["lr"], ":", color=MUTED, linewidth=1.2)
            rate.set_ylim(0, 1.05 * float(columns["lr"].max()) or 1)
            rate.set_ylabel("learning rate (dotted)", color=MUTED)
            rate.spines["right"].set_visible(True)
            rate.grid(False)
        write_atomic(
            folder / "curves.png",
            lambda path: figure.savefig(path, format="png", dpi=DPI),
        )


def best_epoch(columns: dict[str, np.ndarray]) -> int:
    """The epoch that a training has chosen so far, as ``Trainer.fit`` describes it."""
    merit = [columns["val_clean"]]
    if "train_adversarial" in columns and "val_robust" in columns:
        merit.insert(0, columns["val_robust"])
    rows = list(zip(*merit, columns["epoch"], strict=True))
    return int(max(rows)[-1])  # of equals the later
