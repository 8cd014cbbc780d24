"""Two evaluations of the same images, image by image."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advbench.errors import UserError
from advbench.report.collection import NAMES, UNKNOWN, Entry, Group, find, varying
from advbench.report.conditions import Wording, differences, text_of
from advbench.runs.accuracy import Z95
from advbench.text import printable

if TYPE_CHECKING:  # records are read with torch, which takes seconds to import
    from advbench.report.evidence import Evidence

SCHEMA = "advbench.comparison/1"
ALPHA = 0.05
BORDERLINE = "borderline, the interval excludes 0 and the exact test does not"


@dataclass(frozen=True)
class Paired:
    """Which images A and B got right: counts that add up to n."""

    both: int
    a_only: int
    b_only: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.a_only + self.b_only + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of A less that of B, in [-1, 1]."""
        return (self.a_only - self.b_only) / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        """Of the difference, see ``tango``."""
        return tango(self.a_only, self.b_only, self.n)

    @property
    def p(self) -> float:
        """Of no difference, see ``mcnemar``."""
        return mcnemar(self.a_only, self.b_only)


@dataclass(frozen=True)
class Comparison:
    """What two evaluations say of the images that both have seen.

    robust: None unless both were attacked.  a_lost, b_lost: by stage, how many images that the
    other held.  notes: what is to be known.
    """

    a: Entry
    b: Entry
    clean: Paired
    robust: Paired | None
    a_lost: dict[str, int]
    b_lost: dict[str, int]
    notes: tuple[str, ...]


def mcnemar(a_only: int, b_only: int) -> float:
    """McNemar's exact test, two-sided: whether pairs that differ do so either way alike.

    Twice the smaller tail of a binomial distribution with p = 1/2, at most 1.
    """
    m, low = a_only + b_only, min(a_only, b_only)
    tail, term = 0, 1
    for k in range(low + 1):
        tail += term
        term = term * (m - k) // (k + 1)
    return min(1.0, 2 * tail / 2**m)


def tango(a_only: int, b_only: int, n: int) -> tuple[float, float]:
    """Tango's 95 % score interval of a difference of paired proportions (Tango 1998, eq. 4, 11).

    All differences that the score test does not reject; at 0 that test is McNemar's, without
    continuity correction.
    """

    def score(delta: float) -> float:
        """Normal score of the hypothesis that the difference is ``delta``; falls with it."""
        first = 2 * n
        second = -a_only - b_only + (2 * n - a_only + b_only) * delta
        third = -b_only * delta * (1 - delta)
        root = math.sqrt(max(second * second - 4 * first * third, 0.0))
        share = (root - second) / (2 * first)  # of pairs that b alone got right, if it were so
        variance = n * (2 * share + delta * (1 - delta))
        surplus = a_only - b_only - n * delta
        if variance <= 0:
            return math.copysign(math.inf, surplus) if surplus else 0.0
        return surplus / math.sqrt(variance)

    middle = (a_only - b_only) / n
    return _root(score, -1.0, middle, Z95), _root(score, middle, 1.0, -Z95)


def _root(falling: Callable[[float], float], low: float, high: float, value: float) -> float:
    """Where a falling function takes a value, by bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        if falling(middle) > value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def of(paths: Sequence[Path], mix: bool = False) -> Comparison:
    """Compare two evaluations on the images that both have.

    mix: other threats and protocols may differ. Raises UserError if they do without it, for other
    data, for records that are missing or not those of the results, and for no image in common.
    """
    a, b = _two(paths)
    return _compared(a, b, comparable(a, b, mix))


def comparable(a: Entry, b: Entry, mix: bool = False) -> list[str]:
    """What a reader must know of a comparison of two evaluations.

    Args:
        a: One evaluation.
        b: The other.
        mix: Allow other threats and protocols.

    Returns:
        Notes; none where the conditions are equal.

    Raises:
        UserError: For other data, and for other conditions without ``mix``.
    """
    wording = Wording([Group((a,)), Group((b,))])
    differing = differences([a.conditions, b.conditions])
    if any(key == "data" or key.startswith("data.") for key in differing):
        data = [wording.of(entry)["data"] for entry in (a, b)]
        raise UserError(f"A is of {data[0]} and B of {data[1]}: other images can't be paired")
    unlike = [key for key in differing if key != "n"]
    if unlike and not mix:
        raise UserError(
            f"A and B differ in {wording.differing(unlike)}: add --mix to compare them all the same"
        )
    return [f"they differ in more than the model: {wording.differing(unlike)}"] if unlike else []


def _two(paths: Sequence[Path]) -> tuple[Entry, Entry]:
    if len(paths) != 2:
        raise UserError(
            "--compare takes two evaluations, RUN_A RUN_B, or two groups: RUN_A... --with RUN_B..."
        )
    entries = []
    for path in paths:
        matches = find([path])
        if len(matches) != 1:
            raise UserError(f"'{path}' holds {len(matches)} evaluations: name the directory of one")
        entries += matches
    return entries[0], entries[1]


def _compared(a: Entry, b: Entry, notes: list[str]) -> Comparison:
    import numpy as np

    first, second = evidence_of(a), evidence_of(b)
    common, mine, yours = np.intersect1d(
        first.sample, second.sample, assume_unique=True, return_indices=True
    )
    if len(common) == 0:
        raise UserError("A and B have no image in common: evaluate both with the same n")
    if len(common) < max(len(first), len(second)):
        notes.insert(
            0, f"{len(common)} images are common to the {len(first)} of A and {len(second)} of B"
        )
    fell_a, fell_b = first.fell[mine], second.fell[yours]

    attacked = a.results.attacked and b.results.attacked

    def paired(right_a: np.ndarray, right_b: np.ndarray) -> Paired:
        both, either = int((right_a & right_b).sum()), int((right_a | right_b).sum())
        a_right, b_right = int(right_a.sum()), int(right_b.sum())
        return Paired(both, a_right - both, b_right - both, len(common) - either)

    def lost(fell: np.ndarray, stages: Sequence[str], robust: np.ndarray) -> dict[str, int]:
        counts = {name: int(((fell == i) & robust).sum()) for i, name in enumerate(stages)}
        return {name: count for name, count in counts.items() if count}

    return Comparison(
        a=a,
        b=b,
        clean=paired(fell_a != 0, fell_b != 0),
        robust=paired(fell_a < 0, fell_b < 0) if attacked else None,
        a_lost=lost(fell_a, first.stages, fell_b < 0),
        b_lost=lost(fell_b, second.stages, fell_a < 0),
        notes=tuple(notes),
    )


def evidence_of(entry: Entry) -> Evidence:
    """The records of an evaluation. Raises UserError unless its results follow from them."""
    from advbench.report.evidence import Evidence

    records = entry.records
    try:
        evidence = Evidence.of(records)
    except ValueError as problem:
        raise UserError(f"'{entry.folder}/samples.parquet' is damaged: {problem}") from problem
    robust = int((evidence.fell < 0).sum())
    share = (entry.results.robust if entry.results.attacked else entry.results.clean).acc or 0.0
    if (len(evidence), robust) != (entry.n, round(share * entry.n)):
        raise UserError(f"'{entry.folder}': samples.parquet is not that of results.json")
    return evidence


def text(paths: Sequence[Path], mix: bool = False, form: str | None = None) -> str:
    """The comparison in words, or as JSON. Raises UserError for another format, and as ``of``."""
    if form not in (None, "json"):
        raise UserError(f"--compare makes words or --format json, not '{form}'")
    comparison = of(paths, mix)
    if form == "json":
        return json.dumps(_plain(comparison), indent=2) + "\n"
    return "".join(f"{printable(line)}\n" for line in _lines(comparison))


def _lines(comparison: Comparison) -> list[str]:
    a, b, n = comparison.a, comparison.b, comparison.clean.n
    wording = Wording([Group((a,)), Group((b,))])
    conditions = wording.of(a)
    unlike = {key for key in differences([a.conditions, b.conditions]) if key != "n"}
    shared = [conditions["data"], conditions["threat"], conditions["protocol"]]
    lines = [f"A: {_who(a, b)}", f"B: {_who(b, a)}"]
    lines.append(f"on the same {n} images" + ("" if unlike else f": {', '.join(shared)}"))
    lines.append("")
    for name, paired in (("robust", comparison.robust), ("clean", comparison.clean)):
        if paired is None:
            lines.append("robust: no comparison, for they were not both attacked")
            continue
        word = "robust" if name == "robust" else "accurate on clean images"
        lines.append(f"{name}: {sentence(paired, word)}")
        lines.append(
            f"  right: {paired.both} both, {paired.a_only} A alone, {paired.b_only} B alone, "
            f"{paired.neither} neither"
        )
    for one, other, lost in (("A", "B", comparison.a_lost), ("B", "A", comparison.b_lost)):
        if lost:
            stages = ", ".join(f"{count} by {name}" for name, count in lost.items())
            lines.append(f"lost by {one} and held by {other}: {stages}")
    lines.append("")
    lines += comparison.notes
    lines.append("[Tango's 95 % score interval]; p of McNemar's exact test")
    models = [entry.results.provenance.get("model_sha256") for entry in (a, b)]
    if models[0] is not None and models[0] == models[1]:
        lines.append("A and B are one model: the lower number is the closer bound")
    else:
        each = "" if None in (a.seed, b.seed) else "one training seed each: "
        lines.append(f"{each}this is about these two models, and not about how they were made")
    return lines


def sentence(paired: Paired, word: str) -> str:
    """Which one is more ``word``, by how much, and how sure that is.

    The exact test is the stricter of the two: where it shows a difference, the interval excludes 0.
    """
    low, high = paired.ci95
    p = f"p = {paired.p:.2g}" if paired.p >= 0.001 else "p < 0.001"
    accuracies = [
        100 * (paired.both + alone) / paired.n for alone in (paired.a_only, paired.b_only)
    ]
    shares = f"{accuracies[0]:.1f} % and {accuracies[1]:.1f} %; {p}"
    points = 100 * paired.difference
    if paired.p >= ALPHA:
        agreed = low <= 0 <= high
        result = "no difference shown" if agreed else BORDERLINE
        interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
        return f"{result}: A - B = {points:+.1f} points {interval}; {shares}"
    if points < 0:
        points, low, high = -points, -high, -low
    more = "more" if paired.difference > 0 else "less"
    return (
        f"A is {more} {word} than B by {points:.1f} points "
        f"[{100 * low:.1f}, {100 * high:.1f}]; {shares}"
    )


def _who(entry: Entry, other: Entry) -> str:
    """An evaluation by the names of its model and by the settings that the other has not."""
    names = [entry.name(key) for key in NAMES if entry.name(key) != UNKNOWN]
    values = entry.results.settings
    names += [
        f"{key}={text_of(values[key])}"
        for key in varying([entry, other])
        if key in values.keys() - set(NAMES)
    ]
    seed = [] if entry.seed is None else [f"seed {entry.seed}"]
    return f"{', '.join([*names, *seed]) or entry.results.run} ({entry.folder})"


def _plain(comparison: Comparison) -> dict[str, Any]:
    def numbers(paired: Paired | None) -> dict[str, Any] | None:
        if paired is None:
            return None
        more = {"difference": paired.difference, "ci95": paired.ci95, "p": paired.p}
        return {"n": paired.n, **asdict(paired), **more}

    return {
        "schema": SCHEMA,
        **{
            key: {"folder": entry.folder.as_posix(), "conditions": entry.conditions}
            for key, entry in (("a", comparison.a), ("b", comparison.b))
        },
        "robust": numbers(comparison.robust),
        "clean": numbers(comparison.clean),
        "a_lost": comparison.a_lost,
        "b_lost": comparison.b_lost,
        "notes": list(comparison.notes),
    }
