"""Figures over results. Each function returns a Matplotlib figure, made and saved under ``style``.

Accuracies are in per cent, with Wilson's 95 % interval wherever a whole accuracy is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from advbench.report.evidence import Evidence
from advbench.report.gallery import Gallery, class_name, to_uint8
from advbench.report.style import (
    CELL,
    CLEAN,
    DENSE,
    GRID,
    INK,
    MARKERS,
    MUTED,
    ROBUST,
    SERIES,
    Share,
    canvas,
    deviations,
    percent_axis,
    points,
    short,
    whiskers,
)
from advbench.runs.accuracy import Accuracy
from advbench.runs.results import Results, StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 25
"""Of a heat map with numbers in it."""

WIDE = "wide: ± sd over training seeds"
"""How to read the bars of ``deviations``."""

HOLLOW = "Hollow: unfinished, at most that much"
"""How to read the points of ``points`` that are bounds so far."""


# --- one evaluation -----------------------------------------------------------------------------


def _after(results: Results, stages: Sequence[StageResult]) -> list[Accuracy]:
    """Accuracy on clean images and after each of the stages that were started."""
    n, accuracies = results.data["n"], [results.clean]
    for stage in stages:
        share = stage.robust_acc or 0.0
        ended = stage.name not in results.missing
        accuracies.append(Accuracy.of(round(share * n), n) if ended else Accuracy(share))
    return accuracies


def stages(results: Results) -> Figure:
    """What is left after each stage that was started, from the top to the bottom."""
    names = ["clean"] + [
        f"unfinished: {stage.name}" if stage.name in results.missing else stage.name
        for stage in results.begun
    ]
    figure, axes = canvas(0.62 + 0.2 * len(names))
    remaining = _after(results, results.begun)
    y = range(len(names))
    axes.step(whiskers(remaining)[0], y, where="pre", color=GRID, linewidth=1.2, zorder=1)
    for i in y:
        points(axes, remaining[i : i + 1], [i], CLEAN if i == 0 else ROBUST)
    axes.set_yticks(y, [short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    percent_axis(axes, "x")
    axes.set_xlabel("accuracy (%)")
    return figure


def radii(results: Results) -> list[float]:
    """The radii that an evaluation over radii finished; empty for another protocol."""
    names = [stage.name.removeprefix("eps-") for stage in results.finished]
    try:
        return [float(name) for name in names] if results.protocol["name"] == "curve" else []
    except ValueError:  # no result of ours
        return []


def curve(rows: Mapping[str, Results]) -> Figure:
    """Robust accuracy over the radius, of one evaluation or of several, by name.

    The curve of one that did not finish ends where it stopped, before the radius of the threat.
    """
    figure, axes = canvas(2.3 if len(rows) == 1 else 2.3 + 0.17 * len(rows))
    for i, (name, results) in enumerate(rows.items()):
        x = np.array([0.0, *radii(results)])
        centre, lengths = whiskers(_after(results, results.finished))
        colour = SERIES[i % len(SERIES)]
        marker = MARKERS[i % len(MARKERS)]
        axes.fill_between(
            x, centre - lengths[0], centre + lengths[1], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(x, centre, color=colour, marker=marker, label=short(name, 44), clip_on=False)
    percent_axis(axes)
    axes.grid(True, axis="x")
    threat = next(iter(rows.values())).threat
    axes.set_xlim(0, 1.02 * threat["eps"])
    if todo := sum(len(r.stages) - len(r.finished) for r in rows.values()):
        axes.set_title(f"unfinished: {todo} radii to go", loc="left", color=MUTED)
    axes.set_xlabel(f"radius ({threat['norm']}, pixels in [0, 1])")
    axes.set_ylabel("robust accuracy (%)")
    if len(rows) > 1:
        figure.legend(loc="outside upper left")
    return figure


def _cells(axes: Axes, share: np.ndarray, numbers: np.ndarray | None) -> None:
    """A heat map of shares in [0, 1]: opacity instead of a colour, so that any ground will do."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    if numbers is None:
        image = np.tile(np.array(to_rgba(CELL)), (*share.shape, 1))
        image[..., 3] = DENSE * share
        axes.imshow(image, aspect="auto", interpolation="nearest")
        return
    shaded = np.argwhere(share > 0)
    colours = [to_rgba(CELL, DENSE * float(share[i, j])) for i, j in shaded]
    squares = [Rectangle((j - 0.47, i - 0.47), 0.94, 0.94) for i, j in shaded]
    axes.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))
    for i, j in np.ndindex(*share.shape):
        if numbers[i, j]:
            axes.text(j, i, str(numbers[i, j]), ha="center", va="center", fontsize=6.5)
    axes.set_xlim(-0.5, share.shape[1] - 0.5)
    axes.set_ylim(share.shape[0] - 0.5, -0.5)


def worst_classes(evidence: Evidence) -> np.ndarray:
    """Rows of ``by_class`` to show: all, or those with the lowest robust accuracy, ascending."""
    robust, total = evidence.by_class()
    order = np.argsort(robust[:, -1] / total, kind="stable")[:MOST_CLASSES]
    return np.sort(order) if len(total) <= MOST_CLASSES else order


def classes(evidence: Evidence, names: Sequence[str]) -> Figure:
    """Accuracy of each class on clean images and after the stages that broke something, in %."""
    rows = worst_classes(evidence)
    robust, total = evidence.by_class()
    share = (robust / total[:, None])[rows]
    figure, axes = canvas(0.75 + 0.19 * len(rows))
    _cells(axes, share, np.char.mod("%.0f", 100 * share))
    labels = [class_name(names, c) for c in evidence.classes()[rows]]
    axes.set_yticks(
        range(len(rows)), [f"{name} ({total[r]})" for name, r in zip(labels, rows, strict=True)]
    )
    columns = [short(evidence.stages[c], 14) for c in evidence.columns()]
    slanted = len(columns) > 4
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=35 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    _bare(axes)
    axes.set_ylabel("class (images)")
    return figure


def confusion(evidence: Evidence, names: Sequence[str]) -> Figure:
    """True class against the class after the attack; a row's shades add up to one."""
    labels, counts = evidence.confusion()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = canvas(3.1)
    few = len(labels) <= MOST_CLASSES
    _cells(axes, share, np.where(counts > 0, counts.astype(str), "") if few else None)
    every = max(1, -(-len(labels) // 25))
    ticks = range(0, len(labels), every)
    words = [short(class_name(names, labels[i]), 12) for i in ticks]
    long = max(map(len, words)) > 3
    axes.set_xticks(ticks, words, rotation=90 if long else 0)
    axes.set_yticks(ticks, words)
    _bare(axes)
    axes.set_xlabel("class after the attack")
    axes.set_ylabel("true class")
    return figure


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def margins(evidence: Evidence) -> Figure:
    """How far samples are from an error, on clean images and at the worst point found."""
    figure, axes = canvas()
    parts = [evidence.clean_margin, evidence.final_margin]
    finite = np.concatenate([part[np.isfinite(part)] for part in parts])
    # A few extreme values would squeeze the rest.
    low, high = np.percentile(finite, [0.5, 99.5]) if len(finite) else (-1.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    edges = np.linspace(low, high if high > low else low + 1, 31)
    for part, colour, label in zip(
        parts, (CLEAN, ROBUST), ("clean", "after the attack"), strict=True
    ):
        part = np.clip(part[~np.isnan(part)], edges[0], edges[-1])
        axes.hist(part, edges, color=colour, alpha=0.25)
        axes.hist(part, edges, color=colour, histtype="step", linewidth=1.2, label=label)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    axes.grid(False, axis="x")
    axes.set_xlabel("margin: true logit minus the best wrong one")
    axes.set_ylabel("images")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


# --- a training ---------------------------------------------------------------------------------

_ACCURACIES = {
    "train_clean": ("training, clean", MUTED),
    "train_adversarial": ("training, adversarial", MUTED),
    "val_clean": ("validation, clean", CLEAN),
    "val_robust": ("validation, robust", ROBUST),
}


def learning(columns: Mapping[str, np.ndarray], best: int | None = None) -> Figure:
    """Accuracy and loss over the epochs of a training.

    columns: of metrics.csv, NaN where a row has none.  best: the epoch that was chosen.
    """
    figure, (upper, lower) = canvas(3.1, rows=2)
    epoch = columns["epoch"]
    marker = "o" if len(epoch) < 2 else None
    for key, (label, colour) in _ACCURACIES.items():
        if key in columns and np.isfinite(columns[key]).any():
            line = "--" if colour is MUTED else "-"
            values = 100 * columns[key]
            upper.plot(epoch, values, line, color=colour, label=label, marker=marker)
    percent_axis(upper)
    upper.set_ylabel("accuracy (%)")
    terms = [key for key in columns if key.startswith("loss_")]
    shown = ["loss", *(terms if len(terms) > 1 else [])]
    for i, key in enumerate(key for key in shown if key in columns):
        colour = INK if key == "loss" else SERIES[i % len(SERIES)]
        label = "sum" if key == "loss" else key.removeprefix("loss_")
        lower.plot(epoch, columns[key], color=colour, label=label, marker=marker)
    lower.set_ylabel("loss")
    lower.set_xlabel("epoch")
    lower.xaxis.get_major_locator().set_params(integer=True)
    lower.grid(False, axis="x")
    if len(shown) > 1:
        lower.legend(ncols=2)
    for axes in (upper, lower):
        if best is not None:
            axes.axvline(best, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


# --- several evaluations ------------------------------------------------------------------------


Row = tuple[float, Share, Share]
"""A value of the swept setting, with clean and robust accuracy."""


def tradeoff(key: str, rows: Sequence[Row]) -> Figure:
    """Clean against robust accuracy of a sweep, joined in the order of ``key``, whose values are
    written beside the points."""
    figure, axes = canvas(2.8)
    x, across = whiskers([clean for _, clean, _ in rows])
    y, along = whiskers([robust for _, _, robust in rows])
    axes.plot(x, y, color=MUTED, linewidth=1, zorder=1)
    axes.errorbar(x, y, xerr=across, yerr=along, fmt="none", ecolor=ROBUST, alpha=0.35)
    wide = deviations(axes, x, y, [clean for _, clean, _ in rows], upright=False)
    deviations(axes, x, y, [robust for _, _, robust in rows], upright=True)
    axes.plot(x, y, "o", color=ROBUST)
    axes.margins(0.06)
    for i, position in enumerate(_apart(axes, x, y)):
        axes.annotate(f"{rows[i][0]:g}", (x[i], y[i]), (6, position), textcoords="offset points")
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel("robust accuracy (%)")
    note = f"\n{WIDE}" if wide else ""
    axes.set_title(f"at the points: {short(key, 40)}{note}", loc="left", color=MUTED)
    return figure


def _apart(axes: Axes, x: np.ndarray, y: np.ndarray) -> list[float]:
    """How far above its point each label goes, in points, so that neighbours do not collide."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    across, up = 200 * (x - left) / (right - left), 150 * (y - low) / (high - low)
    lifts = np.zeros(len(x))
    placed: list[int] = []
    for i in np.argsort(up, kind="stable"):
        lifts[i] = 3.0
        for j in placed:
            if abs(across[i] - across[j]) < 24:
                lifts[i] = max(lifts[i], up[j] + lifts[j] + 8.5 - up[i])
        placed.append(int(i))
    return lifts.tolist()


def sweep(key: str, rows: Sequence[Row]) -> Figure:
    """Clean and robust accuracy over the swept value."""
    figure, axes = canvas(2.8)
    x = [value for value, _, _ in rows]
    for label, colour, mark, part in (
        ("clean", CLEAN, "s", [clean for _, clean, _ in rows]),
        ("robust", ROBUST, "o", [robust for _, _, robust in rows]),
    ):
        centre, lengths = whiskers(part)
        axes.fill_between(
            x, centre - lengths[0], centre + lengths[1], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(x, centre, color=colour, marker=mark, label=label)
        if deviations(axes, x, centre, part, upright=True):
            axes.set_title(WIDE, loc="left", color=MUTED)
    percent_axis(axes)
    ticks = _legible(x)
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xlabel(short(key, 44))
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _legible(values: Sequence[float]) -> list[float]:
    """The values in order, without those whose tick would touch the one before; both ends stay."""
    least = 0.12 * (values[-1] - values[0])
    shown = [values[0]]
    for value in values[1:-1]:
        if value - shown[-1] >= least and values[-1] - value >= least:
            shown.append(value)
    return [*shown, values[-1]]


def board(rows: Mapping[str, tuple[Share | None, Share | None]]) -> Figure:
    """Clean and robust accuracy of models, by name, from the top to the bottom."""
    figure, axes = canvas(0.75 + 0.2 * len(rows))
    for label, colour, mark, part in (
        ("clean", CLEAN, "s", [clean for clean, _ in rows.values()]),
        ("robust", ROBUST, "o", [robust for _, robust in rows.values()]),
    ):
        y = [i for i, share in enumerate(part) if share is not None]
        part = [share for share in part if share is not None]
        if not part:
            continue
        points(axes, part, y, colour, mark, label)
        if deviations(axes, whiskers(part)[0], y, part, upright=False):
            axes.set_title(WIDE, loc="left", color=MUTED)
    axes.set_yticks(range(len(rows)), [short(name, 34) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    percent_axis(axes, "x")
    axes.set_xlabel("accuracy (%)")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def pictures(shown: Gallery) -> Figure:
    """Clean image, amplified perturbation and adversarial image, a row for each sample."""
    figure, axes = canvas(1.15 * len(shown.pictures) + 0.3, len(shown.pictures), 3)
    for row, picture in zip(axes, shown.pictures, strict=True):
        parts = (picture.clean, shown.change(picture), picture.adversarial)
        for panel, image in zip(row, parts, strict=True):
            panel.imshow(to_uint8(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.grid(False)
        row[0].set_ylabel(f"#{picture.sample}", color=MUTED)
        row[0].set_title(short(picture.truth, 18))
        row[1].set_title(f"{shown.norm} {picture.distance:.3g}, times {shown.factor:.3g}")
        row[2].set_title(short(picture.taken_for, 18), color=ROBUST)
    return figure
