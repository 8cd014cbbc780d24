"""What an evaluation leaves behind: schema ``advbench.results/1``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from advbench.errors import UserError
from advbench.files import write_json

SCHEMA = "advbench.results/1"
RESULTS = "results.json"


Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = Z95
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends are exact there, where rounding would leave a trace.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == n else centre + half


@dataclass(frozen=True)
class Accuracy:
    """A share of correct samples, in [0, 1], with its Wilson 95 % interval."""

    acc: float
    ci95: tuple[float, float]

    def __post_init__(self) -> None:
        low, high = self.ci95
        if not all(0 <= share <= 1 for share in (self.acc, low, high)):
            raise ValueError(f"{self.acc} [{low}, {high}] is not a share of the samples")

    @classmethod
    def of(cls, correct: int, n: int) -> Accuracy:
        return cls(correct / n if n else 0.0, wilson(correct, n))

    def __str__(self) -> str:
        low, high = self.ci95
        return f"{100 * self.acc:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


MOST = 2**63
"""No number of a result is as large."""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _number(text: str) -> int | float:
    """A number of a file. Raises ValueError for one that no computation could have left there."""
    value = float(text) if any(sign in text for sign in ".eE") else int(text)
    if not -MOST < value < MOST:
        raise ValueError(f"{text[:20]} is out of range")
    return value


@dataclass(frozen=True)
class StageResult:
    """One stage of a protocol.

    robust_acc: share of all samples still correct after it.  attacked, broken: samples.
    forwards, backwards: rows passed through the model.
    """

    name: str
    attack: str
    target: str
    why: str
    robust_acc: float
    attacked: int
    broken: int
    seconds: float
    forwards: int
    backwards: int


@dataclass(frozen=True)
class Results:
    """The outcome of an evaluation. ``robust`` is an upper bound: what these attacks left.

    settings: what sets the model apart from others, such as {"defense.jump": 0.5}.
    measures: other ways to say it, see ``advbench.evaluation.evaluation.measures``.
    missing: stages that did not come to their end, because time was up; "clean" where not even all
        clean images were looked at, and the shares are of those that were.
    """

    run: str
    data: Mapping[str, Any]
    threat: Mapping[str, Any]
    protocol: Mapping[str, Any]
    clean: Accuracy
    robust: Accuracy
    stages: tuple[StageResult, ...]
    provenance: Mapping[str, Any]
    verdict: Mapping[str, Any] = field(default_factory=lambda: {"label": None, "indicators": []})
    missing: tuple[str, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA

    @property
    def begun(self) -> tuple[StageResult, ...]:
        """Stages that were gone into: those that had nobody left to attack too."""
        return tuple(s for s in self.stages if s.attacked or s.name not in self.missing)

    @property
    def finished(self) -> tuple[StageResult, ...]:
        """Stages that came to their end."""
        return tuple(s for s in self.stages if s.name not in self.missing)

    @property
    def attacked(self) -> bool:
        """Whether any attack was begun: without one ``robust`` says nothing but ``clean``."""
        return bool(self.begun)

    def to_json(self) -> dict[str, Any]:
        order = (
            "schema",
            "run",
            "settings",
            "data",
            "threat",
            "protocol",
            "clean",
            "robust",
            "stages",
        )
        values = asdict(self)
        values["stages"] = list(values["stages"])
        values["missing"] = list(values["missing"])
        rest = ("measures", "missing", "verdict", "provenance")
        return {key: values[key] for key in (*order, *rest)}

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    def check(self) -> None:
        """Raise KeyError, TypeError or ValueError for what no evaluation leaves behind."""
        data, threat, protocol = self.data, self.threat, self.protocol
        number, plain = int | float, bool | int | float | str | None
        counts = ("attacked", "broken", "forwards", "backwards")
        for name, values, kind in (
            ("run", [self.run], str),
            ("settings", self.settings.values(), plain),
            ("seed", [self.settings.get("seed"), protocol.get("seed")], int | None),
            ("data", [data["name"]], str),
            ("data", [data.get("split"), data.get("sha256")], str | None),
            ("data.n", [data["n"]], int),
            ("threat.norm", [threat["norm"]], str),
            ("threat.eps", [threat["eps"]], number),
            ("protocol", [protocol["name"], protocol["version"]], str),
            ("missing", self.missing, str),
            ("measures", self.measures.values(), number),
            ("verdict.label", [self.verdict.get("label")], str | None),
            ("provenance.seconds", [self.provenance["seconds"]], number),
            ("provenance", [self.provenance.get("model_sha256")], str | None),
            ("stages", [getattr(s, key) for s in self.stages for key in counts], int),
            ("stages", [v for s in self.stages for v in (s.seconds, s.robust_acc)], number),
            ("stages", [v for s in self.stages for v in (s.name, s.attack, s.target, s.why)], str),
        ):
            for value in values:
                truth = isinstance(value, bool) and kind is not plain  # which is an int in Python
                if truth or not isinstance(value, kind):
                    raise TypeError(f"{name} has {value!r}")
        if data["n"] < 1 or threat["eps"] < 0:
            raise ValueError("n or eps is out of range")
        for stage in self.stages:
            least = min(stage.seconds, *(getattr(stage, key) for key in counts))
            if least < 0 or not 0 <= stage.robust_acc <= 1:
                raise ValueError(f"stage {stage.name} has a number out of range")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results.json. Raises UserError for a file of another kind."""
        try:
            values = json.loads(
                path.read_text(encoding="utf-8"),
                parse_constant=_refuse,
                parse_float=_number,
                parse_int=_number,
            )
            if values["schema"] != SCHEMA:
                raise UserError(f"{path} has schema {values['schema']!r}, not {SCHEMA!r}")
            accuracy = {
                key: Accuracy(values[key]["acc"], tuple(values[key]["ci95"]))
                for key in ("clean", "robust")
            }
            stages = tuple(StageResult(**stage) for stage in values["stages"])
            lists = {"stages": stages, "missing": tuple(values.get("missing", ()))}
            results = cls(**{**values, **accuracy, **lists})
            results.check()
            return results
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as problem:
            raise UserError(f"{path} is not a result of advbench: {problem}") from problem


MEASURES = {
    "wra": "mean of clean and robust (WRA)",
    "mean_draw": "if a single draw decides, on average",
    "worst_draw": "if the worst of the draws decides",
    "single_image": "not broken as the only altered image of a batch",
}
"""What ``results.measures`` means, in words."""
