"""Two groups of evaluations, of trainings that differ in the seed alone, paired by that seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from advbench.errors import UserError
from advbench.report.collection import SEED, Entry, find, varying
from advbench.report.compare import comparable, evidence_of
from advbench.report.conditions import text_of
from advbench.runs.accuracy import Z95
from advbench.text import count, percent, printable

if TYPE_CHECKING:
    import numpy as np

SCHEMA = "advbench.comparison-of-seeds/1"
HOW = "--compare RUN_A1 RUN_A2 ... --with RUN_B1 RUN_B2 ..."


@dataclass(frozen=True)
class Pooled:
    """The difference between two groups, on the same images, over their seeds."""

    a: float
    """Accuracy of A, the mean over the seeds, in [0, 1]."""
    b: float
    """Accuracy of B."""
    difference: float
    """A less B."""
    ci95: tuple[float, float]
    """Of the difference, for other images: its variance is that of the images' means over seeds, so
    an image that all seeds share counts once."""
    p: float
    """Two-sided, of no difference, by the same normal approximation."""
    by_seed: tuple[float, ...]
    """The difference at each seed."""
    sd: float | None
    """Sample standard deviation over the seeds; None for one."""


@dataclass(frozen=True)
class Comparison:
    """What the evaluations of two groups say of the images that all have seen."""

    pairs: tuple[tuple[Entry, Entry], ...]
    """Evaluations of A and B of equal seed, in its order."""
    n: int
    """Images."""
    clean: Pooled
    """On clean images."""
    robust: Pooled | None
    """Under attack; None unless all were attacked."""
    notes: tuple[str, ...]
    """What a reader must know."""


def pooled(a: np.ndarray, b: np.ndarray) -> Pooled:
    """The paired difference of two groups.

    Args:
        a: (seeds, images) bool: which images A got right.
        b: The same of B.

    Returns:
        The difference with its interval and its p.
    """
    change = a.astype(float) - b.astype(float)
    images, seeds = change.mean(0), change.mean(1)
    difference = float(images.mean())
    error = float(images.std(ddof=1)) / math.sqrt(len(images)) if len(images) > 1 else 0.0
    p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(difference == 0)
    return Pooled(
        a=float(a.mean()),
        b=float(b.mean()),
        difference=difference,
        ci95=(max(difference - Z95 * error, -1.0), min(difference + Z95 * error, 1.0)),
        p=p,
        by_seed=tuple(map(float, seeds)),
        sd=statistics.stdev(seeds.tolist()) if len(seeds) > 1 else None,
    )


def of(first: Sequence[Entry], second: Sequence[Entry], mix: bool = False) -> Comparison:
    """Compare two groups, paired by the seed of the training.

    Args:
        first: Evaluations of A.
        second: Evaluations of B.
        mix: Allow other threats and protocols.

    Raises:
        UserError: For seeds that are unknown or repeated, for no seed in common, and where two
            evaluations can't be compared, see ``compare.comparable``.
    """
    import numpy as np

    a, b = _by_seed(first, "A"), _by_seed(second, "B")
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise UserError(f"A has the seeds {_list(a)} and B has {_list(b)}: none in common")
    pairs = [(a[seed], b[seed]) for seed in shared]
    notes = [note for pair in pairs for note in comparable(*pair, mix)]
    notes += [comparable_within(group) for group in (first, second)]
    if alone := sorted(a.keys() ^ b.keys()):
        notes.append(f"left out, for only one group has them: seeds {_list(alone)}")
    evidence = [[evidence_of(entry) for entry in pair] for pair in pairs]
    common = evidence[0][0].sample
    for found in (one for pair in evidence for one in pair):
        common = np.intersect1d(common, found.sample)
    if not len(common):
        raise UserError("the evaluations have no image in common: evaluate all with the same n")
    fell = [
        np.stack([pair[side].fell[np.searchsorted(pair[side].sample, common)] for pair in evidence])
        for side in (0, 1)
    ]
    attacked = all(entry.results.attacked for pair in pairs for entry in pair)
    return Comparison(
        pairs=tuple(pairs),
        n=len(common),
        clean=pooled(fell[0] != 0, fell[1] != 0),
        robust=pooled(fell[0] < 0, fell[1] < 0) if attacked else None,
        notes=tuple(dict.fromkeys(note for note in notes if note)),
    )


def comparable_within(group: Sequence[Entry]) -> str:
    """A note on what differs in a group besides the seed; empty if nothing does."""
    keys = varying(group)
    return f"a group differs in more than the seed: {', '.join(keys)}" if keys else ""


def two_groups(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Evaluations by all settings but the seed.

    Raises:
        UserError: Unless they make two groups.
    """
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        settings = sorted((k, v) for k, v in entry.results.settings.items() if k != SEED)
        alike.setdefault(repr(settings or entry.results.run), []).append(entry)
    if len(alike) != 2:
        raise UserError(
            f"apart from the seed these are {count(len(alike), 'model')}, not 2: name the groups, "
            f"{HOW}"
        )
    first, second = alike.values()
    return first, second


def text(
    paths: Sequence[Path], others: Sequence[Path], mix: bool = False, form: str | None = None
) -> str:
    """The comparison in words, or as JSON.

    Args:
        paths: Evaluations of A; those of both groups if ``others`` is empty.
        others: Evaluations of B.
        mix: Allow other threats and protocols.
        form: None for words, or "json".

    Raises:
        UserError: For another format, and as ``of``.
    """
    if form not in (None, "json"):
        raise UserError(f"--compare makes words or --format json, not '{form}'")
    if not paths:
        raise UserError(f"--compare takes two groups of evaluations: {HOW}")
    entries = find(paths)
    first, second = (entries, find(others)) if others else two_groups(entries)
    comparison = of(first, second, mix)
    if form == "json":
        plain = {
            "schema": SCHEMA,
            "pairs": [[entry.folder.as_posix() for entry in pair] for pair in comparison.pairs],
            "n": comparison.n,
            "robust": comparison.robust and asdict(comparison.robust),
            "clean": asdict(comparison.clean),
            "notes": list(comparison.notes),
        }
        return json.dumps(plain, indent=2) + "\n"
    return "".join(f"{printable(line)}\n" for line in _lines(comparison))


def _lines(comparison: Comparison) -> list[str]:
    first, second = comparison.pairs[0]
    keys = varying([first, second])
    lines = []
    for name, entry in (("A", first), ("B", second)):
        values = [f"{key}={text_of(entry.results.settings.get(key))}" for key in keys]
        lines.append(f"{name}: {', '.join(values) or entry.results.run}")
    seeds = ", ".join(str(pair[0].seed) for pair in comparison.pairs)
    lines += [f"on the same {comparison.n} images, paired by the seeds {seeds}", ""]
    for name, part in (("robust", comparison.robust), ("clean", comparison.clean)):
        if part is None:
            lines.append("robust: no comparison, for they were not all attacked")
            continue
        low, high = (100 * end for end in part.ci95)
        p = f"p = {part.p:.2g}" if part.p >= 0.001 else "p < 0.001"
        lines.append(
            f"{name}: A - B = {100 * part.difference:+.1f} points [{low:+.1f}, {high:+.1f}]; "
            f"{percent(part.a)} and {percent(part.b)}; {p}"
        )
        each = ", ".join(f"{100 * value:+.1f}" for value in part.by_seed)
        spread = "" if part.sd is None else f"; sd {100 * part.sd:.1f}"
        lines.append(f"  by seed: {each}{spread}")
    lines += ["", *comparison.notes]
    lines.append("[95 % interval for other images, each counted once; sd: over training seeds]")
    return lines


def _by_seed(entries: Sequence[Entry], name: str) -> dict[int, Entry]:
    members: dict[int, Entry] = {}
    for entry in entries:
        if entry.seed is None:
            raise UserError(f"'{entry.folder}' has no training seed to pair it by")
        if entry.seed in members:
            raise UserError(f"{name} has the seed {entry.seed} twice: '{entry.folder}'")
        members[entry.seed] = entry
    return members


def _list(seeds: Sequence[int] | dict[int, Entry]) -> str:
    return ", ".join(map(str, sorted(seeds)))
