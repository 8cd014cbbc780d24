"""What reports read: evaluations, with what each says of its model and of how it was attacked."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advbench import config
from advbench.config.roles import Role
from advbench.errors import UserError
from advbench.runs.accuracy import Accuracy, Estimate, wilson
from advbench.runs.directory import CONFIG
from advbench.runs.results import RESULTS, Results, Unfinished
from advbench.text import printable, threat_name

if TYPE_CHECKING:  # a table does not need them, and importing torch takes seconds
    from advbench.evaluation.store import Records

NAMES = ("defense", "backbone", "recipe", "model")
"""Settings that name a model; ``model`` is that of one of the user's own."""
INSIDE = {group: f"{group}.{key}" for group, key in config.INSIDE.items()}
"""Settings that name what a component holds."""
SEED = "seed"
UNKNOWN = "-"


@dataclass(frozen=True, eq=False)
class Entry:
    """One evaluation, as reports read it. Nothing but results.json is read before it is asked for.

    folder: its directory; whatever else it may hold is looked for there.
    """

    folder: Path
    results: Results

    def name(self, key: str) -> str:
        """One of NAMES, with what is inside it, such as ``chain(sparta+hpm)``; or UNKNOWN."""
        settings = self.results.settings
        inside = settings.get(INSIDE.get(key, ""))
        return str(settings.get(key, UNKNOWN)) + (f"({inside})" if inside else "")

    @property
    def defense(self) -> str:
        return self.name("defense")

    @property
    def seed(self) -> int | None:
        """Of the training; None for a model that advbench did not train."""
        seed = self.results.settings.get(SEED)
        return seed if isinstance(seed, int) else None

    @property
    def data(self) -> str:
        return str(self.results.data["name"])

    @property
    def n(self) -> int:
        """Images evaluated."""
        return self.results.data["n"]

    @property
    def threat_name(self) -> str:
        """Such as ``linf 8/255``."""
        return threat_name(self.results.threat["norm"], self.results.threat["eps"])

    @property
    def protocol(self) -> str:
        """Title and version."""
        return f"{self.results.protocol['name']} {self.results.protocol['version']}"

    @property
    def verdict(self) -> str | None:
        """Its label; None where there is none."""
        return self.results.verdict.get("label")

    @property
    def seconds(self) -> float:
        """Time spent on the evaluation."""
        return self.results.provenance["seconds"]

    @property
    def passes(self) -> int:
        """Rows that all stages passed through the model, forwards and backwards."""
        return sum(stage.forwards + stage.backwards for stage in self.results.stages)

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """What must be equal for two evaluations to be ranked together, by key of the config.

        The images are known by the hash of the split and n: ``advbench.evaluation.samples.subset``
        makes of the two the same indices always. The seed of the attacks is not a condition.
        """
        data, threat = self.results.data, self.results.threat
        protocol = {k: v for k, v in self.results.protocol.items() if k != SEED}
        return {
            "data": data["name"],
            "data.split": data.get("split"),
            "data.sha256": data.get("sha256"),
            "n": data["n"],
            "threat.norm": threat["norm"],
            "threat.eps": float(threat["eps"]),
            **{"protocol" if k == "name" else f"protocol.{k}": v for k, v in protocol.items()},
        }

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The evaluation's config.yaml; empty if there is none, as from a notebook."""
        return _config(self.folder)

    @cached_property
    def training(self) -> Path | None:
        """The training run that was evaluated, if it is still there and has the same settings.

        A relative path is looked up from where the evaluation was started, and from here.
        """
        named = self.config.get("run")
        if not isinstance(named, str):
            return None
        # An evaluation lives at outputs/eval/NAME unless it was told otherwise.
        for start in (*self.folder.parents[:3], *self.folder.resolve().parents[:3], Path()):
            if (start / named / CONFIG).is_file() and self._is_of(start / named):
                return start / named
        return None

    def _is_of(self, run: Path) -> bool:
        """Whether a training has the settings that the results name: of two of one name it may be
        the other. What the evaluation chose of the defense counts as little as runs it began from.
        """
        from advbench.runs import settings

        try:
            trained = config.read(run / CONFIG)
            expected = settings.with_roles(trained, trained.defense)
        except (UserError, AttributeError, KeyError, TypeError, ValueError):
            return False  # something else lives there
        recorded, defense = self.results.settings, self.config.get("defense")
        overrides = defense if isinstance(defense, Mapping) else {}
        chosen = {
            "defense" if k == "_target_" else k for k, v in overrides.items() if v is not None
        }

        def open_to(key: str, role: Role) -> bool:
            word = key.rpartition(".")[2]  # other runs were looked up from elsewhere
            return bool(role & Role.NAMES_RUN) or (key.startswith("defense") and word in chosen)

        return {"backbone", "recipe", SEED} <= recorded.keys() and all(
            recorded.get(key, value) == value or open_to(key, role)
            for key, (value, role) in expected.items()
        )

    @cached_property
    def records(self) -> Mapping[str, Records]:
        """The records of every sample, by stage, ``clean`` first.

        Raises UserError if there are none, as of an evaluation that did not finish.
        """
        from advbench.evaluation.store import read_samples

        if not (self.folder / "samples.parquet").is_file():
            advice = "it did not finish: resume it with the same command"
            why = advice if self.results.missing else "only results.json is left of it"
            raise UserError(f"'{self.folder}' has no samples.parquet: {why}")
        try:
            return read_samples(self.folder)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(f"'{self.folder}/samples.parquet' is damaged: {problem}") from problem


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return config.plain(config.read(folder / CONFIG))
    except UserError:
        return {}


def find(paths: Sequence[Path]) -> list[Entry]:
    """All evaluations at or below the paths. A damaged file does not hide the others.

    Raises UserError for a missing path, if there are none, and for a damaged file that is alone.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no '{path}'")
        files += [path] if path.is_file() else sorted(path.rglob(RESULTS))
    if not files:
        listed = ", ".join(map(str, paths))
        raise UserError(f"there are no results in {listed}: make some with 'advbench eval'")
    entries = []
    for file in {file.resolve(): file for file in files}.values():
        try:
            entries.append(Entry(file.parent, Results.load(file)))
        except UserError as problem:
            if len(files) == 1:
                raise
            print(printable(f"left out: {problem}"), file=sys.stderr)
    if not entries:
        raise UserError("none of the results can be read")
    return entries


@dataclass(frozen=True)
class Mean:
    """An accuracy over training seeds, shares in [0, 1]."""

    acc: float
    """The mean."""
    sd: float | None
    """Sample standard deviation over the seeds; None for one seed."""
    count: int
    """Seeds."""
    ci95: tuple[float, float] | None
    """Wilson's interval at the mean, for n images; None for a bound so far. The seeds share their
    images, so they do not add to n: this says how far other images could move the mean, ``sd`` how
    far other seeds could."""

    @classmethod
    def of(cls, accuracies: Sequence[Accuracy], n: int) -> Mean | None:
        """The mean of accuracies on the same n images; None if one of them is unknown."""
        values = [accuracy.acc for accuracy in accuracies if accuracy.acc is not None]
        if len(values) < len(accuracies):
            return None
        bounds = any(accuracy.ci95 is None for accuracy in accuracies)
        if len(values) == 1:
            return cls(values[0], None, 1, accuracies[0].ci95)
        mean, sd = statistics.fmean(values), statistics.stdev(values)
        return cls(mean, sd, len(values), None if bounds else wilson(mean * n, n))


@dataclass(frozen=True, eq=False)
class Group:
    """Evaluations that differ in the training seed alone, in its order; often a single one."""

    entries: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        return self.entries[0]

    @property
    def clean(self) -> Mean | None:
        """None where not all clean images were classified."""
        return Mean.of([entry.results.clean for entry in self.entries], self.first.n)

    @property
    def robust(self) -> Mean | None:
        """None where nothing was attacked."""
        return Mean.of([entry.results.robust for entry in self.entries], self.first.n)

    @property
    def estimates(self) -> list[Estimate]:
        """What a stronger suite would leave, of each evaluation; empty if one claims nothing."""
        known = [entry.results.estimate for entry in self.entries]
        given = [estimate for estimate in known if estimate is not None]
        return given if len(given) == len(known) else []

    @property
    def estimate(self) -> Mean | None:
        """Their mean, with the exact interval of a single one; no rank follows from it."""
        if not (known := self.estimates):
            return None
        values = [estimate.acc for estimate in known]
        if len(values) == 1:
            return Mean(values[0], None, 1, known[0].ci95)
        return Mean(statistics.fmean(values), statistics.stdev(values), len(values), None)

    @property
    def audited(self) -> str:
        """From how many survivors the estimates are, in words."""
        known = self.estimates
        return f"{sum(e.audited for e in known)} of {sum(e.survivors for e in known)}"

    @property
    def unfinished(self) -> Unfinished | None:
        """How far all evaluations together came; None for finished ones."""
        parts = [entry.results.unfinished for entry in self.entries]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        return Unfinished(sum(part.decided for part in known), sum(part.of for part in known))

    @property
    def seeds(self) -> list[int]:
        """Of the trainings that are known to have one."""
        return [entry.seed for entry in self.entries if entry.seed is not None]

    @property
    def seconds(self) -> float:
        """Of one evaluation, on average."""
        return statistics.fmean(entry.seconds for entry in self.entries)

    @property
    def passes(self) -> float:
        """Of one evaluation and image, on average."""
        return statistics.fmean(entry.passes / max(entry.n, 1) for entry in self.entries)

    @property
    def verdict(self) -> str | None:
        """The least favourable label: of several seeds the number is as good as the worst."""
        labels = [entry.verdict for entry in self.entries]
        for label in ("unreliable", "inconclusive", None):
            if label in labels:
                return label
        return labels[0]


def groups(entries: Iterable[Entry]) -> list[Group]:
    """Evaluations with the same conditions and settings, but for the training seed, together.

    A seed of the attacks is a repetition of the same measurement and no other training: one model
    evaluated twice makes two groups. So does whatever can't be told to differ in the seed alone.
    """
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        settings = {k: v for k, v in entry.results.settings.items() if k != SEED}
        same = (sorted(entry.conditions.items()), sorted(settings.items()), entry.results.missing)
        alike.setdefault(repr(same), []).append(entry)
    collected = []
    for members in alike.values():
        collected += [Group(tuple(part)) for part in _by_training(members)]
    return collected


def _by_training(members: list[Entry]) -> list[list[Entry]]:
    """Split evaluations that are alike into sets of different trainings, each in order of seeds."""
    parts: dict[Any, list[Entry]] = {None: members}
    if not _distinct(members):
        parts = {}
        for entry in members:
            parts.setdefault(entry.results.protocol.get(SEED), []).append(entry)
    collected = []
    for part in parts.values():
        if _distinct(part):
            collected.append(sorted(part, key=lambda entry: entry.seed or 0))
        else:
            collected += [[entry] for entry in part]
    return collected


def _distinct(members: list[Entry]) -> bool:
    """Whether each has a training seed of its own."""
    seeds = [entry.seed for entry in members]
    return len(members) == 1 or (None not in seeds and len(set(seeds)) == len(seeds))


def varying(entries: Iterable[Entry]) -> list[str]:
    """What a sweep varied: keys of settings that take several values among runs alike otherwise.

    Keys that tell apart runs of other NAMES are those names. The training seed is none of them.
    """
    keys: dict[str, None] = {}
    families: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        families.setdefault(tuple(entry.name(key) for key in NAMES), []).append(entry)
    for i, name in enumerate(NAMES):
        if len({key[i] for key in families}) > 1:
            keys[name] = None
    for family in families.values():
        values: dict[str, set[str]] = {}
        for entry in family:
            for key, value in entry.results.settings.items():
                values.setdefault(key, set()).add(repr(value))
        keys |= dict.fromkeys(k for k, v in sorted(values.items()) if len(v) > 1 and k != SEED)
    return list(keys)
