"""The results of an evaluation: ``results.json``, schema ``advbench.results/3``.

The classes here are the schema. They check types and ranges when they are made, and ``Results``
checks that its numbers agree with each other, so a file that contradicts itself cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from typing_extensions import NotRequired, TypedDict

from advbench.errors import UserError, reason_of
from advbench.runs import manifest
from advbench.runs.accuracy import (
    CLOSED,
    MOST,
    OPEN,
    SLACK,
    Accuracy,
    Count,
    Estimate,
    Known,
    Real,
    Setting,
    Share,
    Text,
    Whole,
)
from advbench.runs.judgement import Verdict
from advbench.runs.manifest import RESULTS as RESULTS
from advbench.text import percent

SCHEMA = "advbench.results/3"
BEFORE = ("advbench.results/2", "advbench.results/1")
"""Schemas of earlier versions, which are still read: /2 had no verdict, /1 no ``unfinished``."""
CLEAN = "clean"


FINISHED = "stages are listed as missing, and all samples are decided"


@dataclass(frozen=True, config=CLOSED)
class StageResult:
    """One stage of a protocol."""

    name: Text
    """Unique in the protocol."""
    attack: Text
    """Class of the attack."""
    target: Text
    """The model whose gradient was followed: ``model``, or the name of a surrogate."""
    why: Text
    """Why the stage is in the plan, in words."""
    robust_acc: Known
    """Share of all samples still correct after it; null while clean images are unfinished."""
    attacked: Count
    """Samples that it began to attack."""
    broken: Count
    """Samples that it broke first."""
    seconds: Real
    """Time spent on it, over all sittings."""
    forwards: Count
    """Rows passed forward through its target and the model."""
    backwards: Count
    """Rows passed backward."""


@dataclass(frozen=True, config=CLOSED)
class Unfinished:
    """How far an evaluation came whose budget was spent."""

    decided: Count
    """Samples that no stage has left to attack: broken, or robust to every stage."""
    of: Count
    """Samples to be decided: those classified correctly without an attack."""

    def __str__(self) -> str:
        return f"{self.decided} of {self.of} samples decided"


class Data(TypedDict):
    """The images."""

    name: Text
    """Of the data set."""
    split: NotRequired[Text | None]
    """``test``."""
    n: Annotated[Count, Field(ge=1)]
    """Images evaluated."""
    sha256: NotRequired[Text | None]
    """Of the whole split."""
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]


class ThreatModel(TypedDict):
    """The norm and the budget."""

    norm: Text
    """``linf``, ``l2`` or ``l1``."""
    eps: Real
    """In pixel units of [0, 1]."""
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]


class Protocol(TypedDict):
    """The protocol; all its parameters stand beside these keys."""

    name: Text
    """Such as ``autoattack``."""
    version: Text
    """Numbers of two versions are never ranked together."""
    seed: NotRequired[Whole | None]
    """Of the attacks."""
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]


class Provenance(TypedDict):
    """Where the number comes from: versions, device, time; any other key may stand here too."""

    seconds: Real
    """Time spent on the evaluation, over all sittings."""
    model_sha256: NotRequired[Text | None]
    """Of the model's tensors and code."""
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]


@dataclass(frozen=True, config=CLOSED)
class Results:
    """The outcome of an evaluation.

    Raises:
        ValueError: numbers contradict each other (``pydantic.ValidationError``).
    """

    run: Text
    """What was evaluated, for people."""
    data: Data
    """The images."""
    threat: ThreatModel
    """The norm and the budget."""
    protocol: Protocol
    """The protocol with its parameters."""
    clean: Accuracy
    """Accuracy without an attack; null while not all clean images were classified."""
    robust: Accuracy
    """What the attacks left: an upper bound of robust accuracy; null where nothing was attacked."""
    stages: tuple[StageResult, ...]
    """The plan in its order, with what each stage found."""
    provenance: Provenance
    """Where the number comes from."""
    verdict: Verdict = field(default_factory=lambda: Verdict(label=None, indicators=[]))
    """Whether it can be trusted."""
    missing: tuple[Text, ...] = ()
    """Stages that did not come to their end because the budget was spent; ``clean`` among
    them while not all clean images were classified."""
    unfinished: Unfinished | None = None
    """Given exactly if a stage is missing: ``robust`` is a bound so far, without an interval."""
    estimate: Estimate | None = None
    """Of what a stronger suite would leave; given where a protocol attacked a sample with it."""
    measures: dict[Text, Share] = field(default_factory=dict)
    """Other ways to say it, see MEASURES; empty while unfinished."""
    settings: dict[Text, Setting] = field(default_factory=dict)
    """What sets the model apart from others, such as {"defense.jump": 0.5}."""
    schema: Text = SCHEMA
    """``advbench.results/3``."""

    @property
    def begun(self) -> tuple[StageResult, ...]:
        """Stages that were started, with those that had no sample left to attack."""
        if CLEAN in self.missing:
            return ()
        return tuple(s for s in self.stages if s.attacked or s.name not in self.missing)

    @property
    def finished(self) -> tuple[StageResult, ...]:
        """Stages that came to their end."""
        return tuple(s for s in self.stages if s.name not in self.missing)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be resumed, neither of the attacks nor of the verdict."""
        return not self.missing and not self.verdict.get("unfinished")

    @property
    def attacked(self) -> bool:
        """Whether any attack was started: without one there is no robust accuracy."""
        return bool(self.begun)

    def bound(self) -> str:
        """Robust accuracy in words, as what it is: a number, a bound so far, or nothing."""
        if self.unfinished is not None:
            so_far = f"at most {self.robust}, " if self.attacked else ""
            return f"UNFINISHED: {so_far}{self.unfinished}"
        return f"{self.robust}, an upper bound" if self.attacked else "- (nothing attacked)"

    def estimated(self) -> str | None:
        """The estimate in words, beside what was proven; None without one."""
        if self.estimate is None:
            return None
        return f"{self.estimate}; at most {percent(self.robust.acc)} proven"

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the file."""
        values = asdict(self)
        values["stages"], values["missing"] = list(values["stages"]), list(values["missing"])
        first = ("schema", "run", "settings", "data", "threat", "protocol", "clean", "robust")
        rest = ("estimate", "unfinished", "stages", "measures", "missing", "verdict", "provenance")
        return {key: values[key] for key in (*first, *rest)}

    def save(self, path: Path, belonging: Iterable[str] = ()) -> None:
        """Write ``results.json`` atomically, with its checksum.

        Args:
            path: of the file.
            belonging: names of files beside it, whose checksums are kept in it.
        """
        manifest.write_json(path, self.to_json(), belonging)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a ``results.json``, of earlier schemas too.

        Args:
            path: of the file.

        Raises:
            UserError: For a file of another kind, and for one that contradicts itself or has
                another content than was written.
        """
        try:
            values = json.loads(
                path.read_text(encoding="utf-8"),
                parse_constant=_refuse,
                parse_float=_number,
                parse_int=_number,
            )
            values = manifest.opened(values, path)
            if values["schema"] not in (SCHEMA, *BEFORE):
                raise UserError(f"{path} has schema {values['schema']!r}, not {SCHEMA!r}")
            return _reader().validate_python(_upgraded(values))
        except ValidationError as problem:
            raise UserError(f"{path} is not a result of advbench: {_first(problem)}") from None
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as bad:
            raise UserError(f"{path} is not a result of advbench: {reason_of(bad)}") from bad

    @model_validator(mode="after")
    def _agree(self) -> Results:
        """Raise ValueError for numbers that contradict each other."""
        names = [stage.name for stage in self.stages]
        plan = [CLEAN, *names] if CLEAN in self.missing else names
        if list(self.missing) != plan[len(plan) - len(self.missing) :]:
            raise ValueError("the missing stages are not the last ones of the plan")
        if (self.unfinished is None) != (not self.missing):
            raise ValueError("'missing' and 'unfinished' do not agree")
        if self.attacked != (self.robust.acc is not None):
            raise ValueError("there is a robust accuracy exactly if something was attacked")
        if (CLEAN in self.missing) != (self.clean.acc is None):
            raise ValueError("there is a clean accuracy exactly if all clean images are classified")
        if self.verdict.get("label") and not (self.attacked and self.unfinished is None):
            raise ValueError("there is a verdict, and nothing was attacked or a stage is missing")
        self._check_shares()
        if self.unfinished is None:
            self._check_measures()
        elif self.robust.ci95 is not None or self.measures:
            raise ValueError("an unfinished evaluation has no interval and no measures")
        elif not self.unfinished.decided < self.unfinished.of <= self.data["n"]:
            raise ValueError(FINISHED)
        return self

    def _check_shares(self) -> None:
        """Shares are of n samples, and each stage leaves what it did not break."""
        n, before = self.data["n"], self.clean.acc
        shares = [self.clean.acc, self.robust.acc, *(stage.robust_acc for stage in self.stages)]
        for share in shares:
            if share is not None and abs(share * n - round(share * n)) > SLACK * n:
                raise ValueError(f"{100 * share:.3f} % is no share of {n} samples")
        for stage in self.stages:
            if not stage.broken <= stage.attacked <= n:
                raise ValueError(
                    f"stage {stage.name}: {stage.broken} broken of {stage.attacked} attacked of {n}"
                )
            if (before is None) != (stage.robust_acc is None):
                raise ValueError(f"stage {stage.name} has no robust accuracy, or nothing before it")
            if before is not None and stage.robust_acc is not None:
                if abs(before - stage.broken / n - stage.robust_acc) > SLACK:
                    raise ValueError(
                        f"stage {stage.name}: {100 * before:.1f} % before, {stage.broken} of {n} "
                        f"broken, {100 * stage.robust_acc:.1f} % after"
                    )
                before = stage.robust_acc
        if self.attacked and abs((self.robust.acc or 0) - (before or 0)) > SLACK:
            raise ValueError("robust accuracy is not what the last stage left")

    def _check_measures(self) -> None:
        if "wra" not in self.measures:
            return
        if self.clean.acc is None or self.robust.acc is None:
            raise ValueError("there is a mean of clean and robust accuracy without both")
        if abs(self.measures["wra"] - (self.clean.acc + self.robust.acc) / 2) > 2 * SLACK:
            raise ValueError("wra is not the mean of clean and robust accuracy")


@cache
def _reader() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def _first(problem: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    (error, *_) = problem.errors(include_url=False, include_context=False, include_input=False)
    key = ".".join(map(str, error["loc"]))
    message = " ".join(str(error["msg"]).removeprefix("Value error, ").split())
    return f"{key}: {message}" if key else message


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _number(text: str) -> int | float:
    """A number of a file. Raises ValueError for one that no computation could have left there."""
    value = float(text) if any(sign in text for sign in ".eE") else int(text)
    if not -MOST < value < MOST:
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Values of an earlier schema, in today's: /1 gave bounds the looks of finished numbers."""
    schema, values = values["schema"], {**values, "schema": SCHEMA}
    if schema != BEFORE[1]:
        return values
    missing = values.get("missing", ())
    stages, n = values["stages"], values["data"]["n"]
    begun = [s for s in stages if s["attacked"] or s["name"] not in missing]
    unseen = CLEAN in missing
    if unseen:
        values["clean"] = {}
        values["stages"] = [{**stage, "robust_acc": None} for stage in stages]
        values["unfinished"] = {"decided": 0, "of": n}
    elif missing:
        of = round(values["clean"]["acc"] * n)
        robust = stages[-1]["attacked"] - stages[-1]["broken"]
        decided = robust + sum(stage["broken"] for stage in stages)
        if decided >= of and "single_image" not in values["measures"]:  # counted in other ways
            raise ValueError(FINISHED)
        values["unfinished"] = {"decided": min(decided, of - 1), "of": of}
    if missing:
        values["robust"] = {"acc": values["robust"]["acc"]}
        values["measures"] = {}
    if unseen or not begun:
        values["robust"] = {}
        values["measures"] = {k: v for k, v in values.get("measures", {}).items() if k != "wra"}
    return values


MEASURES: Mapping[str, str] = {
    "wra": "mean of clean and robust (WRA)",
    "mean_draw": "if a single draw decides, on average",
    "worst_draw": "if the worst of the draws decides",
    "single_image": "not broken as the only altered image of a batch",
}
"""What ``results.measures`` means, in words."""
