"""Figures over several evaluations: leaderboard, sweeps, and curves over the radius."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from advbench.report import plots
from advbench.report.collection import (
    NAMES,
    SEED,
    UNKNOWN,
    Entry,
    Group,
    Mean,
    groups,
    varying,
)
from advbench.report.conditions import place, protocol_of, text_of
from advbench.report.leaderboard import rank, value_of
from advbench.report.run_figures import Plate

FEWEST_IN_SWEEP = 3


def ranked(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Evaluations under the same conditions together, the most robust first and last what did not
    finish or was not attacked; strong protocols before weak ones."""

    def where(entry: Entry) -> tuple[bool, bool, float]:
        results = entry.results
        return not results.attacked, bool(results.missing), -(results.robust.acc or 0)

    alike: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=where):
        alike.setdefault(repr(sorted(entry.conditions.items())), []).append(entry)
    return sorted(alike.values(), key=lambda same: place(Group((same[0],))))


@dataclass(frozen=True)
class Sweep:
    """Evaluations that differ in the number ``key`` alone, in its order, three values or more.

    repeated: some value was measured several times; its row is the lowest, the closest bound.
    """

    key: str
    first: Entry
    rows: tuple[tuple[float, Mean, Mean], ...]
    repeated: bool = False

    def plates(self) -> Iterator[Plate]:
        about = ", ".join([_model(self.first), self.first.threat_name, protocol_of(self.first)])
        if self.repeated:
            about += ". Of repeated evaluations the lowest"
        seeds = _over_seeds(share for _, *shares in self.rows for share in shares)
        yield Plate(
            "tradeoff",
            f"Clean against robust, by {self.key}",
            f"{about}. Bars: Wilson 95 %.{seeds}",
            lambda: plots.tradeoff(self.key, self.rows),
        )
        yield Plate(
            "sweep",
            f"Accuracy over {self.key}",
            f"{about}. Bands: Wilson 95 %.{seeds}",
            lambda: plots.sweep(self.key, self.rows),
        )


def sweeps(same: Sequence[Entry]) -> list[Sweep]:
    """What was swept among evaluations that may be ranked together."""
    collected = []
    families: dict[tuple[str, str], dict[float, list[tuple[Mean, Mean, Group]]]] = {}
    for group in groups(e for e in same if not e.results.missing):
        clean, robust = group.clean, group.robust
        if clean is None or robust is None:
            continue
        settings = {k: v for k, v in group.first.results.settings.items() if k != SEED}
        for key, value in settings.items():
            if key in NAMES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            rest = repr(sorted((k, repr(v)) for k, v in settings.items() if k != key))
            values = families.setdefault((key, rest), {})
            values.setdefault(float(value), []).append((clean, robust, group))
    for (key, _), values in families.items():
        if len(values) >= FEWEST_IN_SWEEP:
            lowest = {
                v: min(values[v], key=lambda collected: collected[1].acc) for v in sorted(values)
            }
            rows = tuple((v, clean, robust) for v, (clean, robust, _) in lowest.items())
            repeated = any(len(alike) > 1 for alike in values.values())
            collected.append(Sweep(key, lowest[min(values)][-1].first, rows, repeated))
    return collected


def labels(found: Sequence[Group]) -> list[str]:
    """What to call each in a figure: the settings that vary among them, or else its run.

    Those that look alike get what tells them apart: seed of the training, seed of the attacks, run,
    or place. A mean says of how many trainings.
    """
    varied = varying(group.first for group in found)
    texts = []
    for group in found:
        values = {key: value_of(group.first, key) for key in varied}
        words = [f"{k.rpartition('.')[2]} {text_of(v)}" for k, v in values.items() if v is not None]
        several = len(group.entries) > 1
        name = ", ".join(words) or (_model(group.first) if several else group.first.results.run)
        texts.append(f"{name} ({len(group.entries)} seeds)" if several else name)
    details: tuple[Callable[[Entry], str], ...] = (
        lambda entry: f"seed {entry.seed}",
        lambda entry: f"attack seed {entry.results.protocol.get(SEED)}",
        lambda entry: entry.results.run,
        lambda entry: entry.folder.as_posix(),
    )
    for detail in details:
        pairs = [(text, detail(group.first)) for text, group in zip(texts, found, strict=True)]
        kinds = Counter(text for text, _ in set(pairs))
        texts = [f"{text}, {more}" if kinds[text] > 1 else text for text, more in pairs]
    return texts


def _model(entry: Entry) -> str:
    """The names of a model; its run's if it has none. Each training has a run of its own."""
    names = [entry.name(key) for key in NAMES if entry.name(key) != UNKNOWN]
    return ", ".join(names) or entry.results.run


def _hollow(shown: Sequence[Group]) -> str:
    return f" {plots.HOLLOW}." if any(group.unfinished for group in shown) else ""


def _over_seeds(shares: Iterable[Mean | None]) -> str:
    """What to say of means over trainings; empty if there are none."""
    counts = {share.count for share in shares if share is not None}
    if max(counts, default=1) == 1:
        return ""
    least, most = min(counts), max(counts)
    seeds = f"{most}" if least == most else f"{least} to {most}"
    return f" Means over {seeds} training seeds; wide: ± sd over them."


def board_plate(same: Sequence[Entry]) -> Plate:
    """The leaderboard, for print."""
    ordered = sorted(groups(same), key=rank)
    rows = {
        f"unfinished: {name}" if group.unfinished else name: (group.clean, group.robust)
        for name, group in zip(labels(ordered), ordered, strict=True)
    }
    return Plate(
        "leaderboard",
        "Leaderboard",
        f"Bars: Wilson 95 %.{_hollow(ordered)}{_over_seeds(group.clean for group in ordered)}",
        lambda: plots.board(rows),
    )


def curves_plate(same: Sequence[Entry]) -> Plate | None:
    """Evaluations over radii in one figure, the most robust first; None for fewer than two.

    Of one model that was evaluated several times the lowest, which is the closest bound.
    """
    models: dict[str, list[Entry]] = {}
    for entry in same:
        results = entry.results
        if plots.radii(results) and not results.missing:
            identity = sorted(results.settings.items()), results.provenance.get("model_sha256")
            models.setdefault(repr((results.run, identity)), []).append(entry)
    lowest = [min(alike, key=_robust) for alike in models.values()]
    curves = [Group((entry,)) for entry in sorted(lowest, key=_robust, reverse=True)]
    shown = curves[: len(plots.SERIES)]
    if len(shown) < 2:
        return None
    rows = {name: group.first.results for name, group in zip(labels(shown), shown, strict=True)}
    omitted = f" The best {len(shown)} of {len(curves)}." if len(curves) > len(shown) else ""
    repeated = any(len(alike) > 1 for alike in models.values())
    omitted += " Of repeated evaluations the lowest." if repeated else ""
    return Plate(
        "curves",
        "Robust accuracy over the radius",
        f"{same[0].data}, {same[0].n} images. Bands: Wilson 95 %.{omitted}",
        lambda: plots.curve(rows),
    )


def _robust(entry: Entry) -> float:
    return entry.results.robust.acc or 0
