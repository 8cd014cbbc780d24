"""Accuracies with their intervals, and the types of the numbers in results."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import (
    ConfigDict,
    Field,
    GetPydanticSchema,
    InstanceOf,
    model_validator,
)
from pydantic.dataclasses import dataclass
from scipy.special import betaincinv

from advbench.text import percent

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


MOST = 2**63
"""Every number of a result is smaller."""


SLACK = 1e-6
"""Rounding of a stored share; one sample of 500,000 is more."""


CLOSED = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True, extra="forbid")


OPEN = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True, extra="allow")


Text = InstanceOf[str]


Whole = Annotated[int, Field(strict=True, gt=-MOST, lt=MOST)]


Count = Annotated[int, Field(strict=True, ge=0, lt=MOST)]


Real = Annotated[float, Field(strict=True, ge=0, lt=MOST)]


Number = Annotated[float, Field(strict=True, gt=-MOST, lt=MOST)]


Share = Annotated[float, Field(strict=True, ge=0, le=1)]


Known = Annotated[Any, GetPydanticSchema(lambda _, handler: handler(Share | None))]
"""A share or None; to a type checker anything, since callers know which evaluations finished."""


Flag = Annotated[bool, Field(strict=True)]


Plain = Flag | Whole | Annotated[float, Field(strict=True)] | Text | None


Setting = Annotated[Any, GetPydanticSchema(lambda _, handler: handler(Plain))]


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927).

    Args:
        successes: At most n; not whole for a mean over seeds.
        n: Trials.

    Returns:
        Lower and upper end in [0, 1]; (0, 1) for n = 0.
    """
    if n == 0:
        return 0.0, 1.0
    z = Z95
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends are exact there, where rounding would leave a trace.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == n else centre + half


def clopper_pearson(successes: int, n: int) -> tuple[float, float]:
    """Exact 95 % interval of a binomial proportion (Clopper & Pearson 1934).

    Args:
        successes: At most n.
        n: Trials.

    Returns:
        Lower and upper end in [0, 1]; (0, 1) for n = 0.
    """
    low = betaincinv(successes, n - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, n - successes, 0.975) if successes < n else 1.0
    return float(low), float(high)


@dataclass(frozen=True, config=CLOSED)
class Accuracy:
    """A share of correct samples with its interval.

    Raises:
        ValueError: the share is outside [0, 1] or outside its interval.
    """

    acc: Known = None
    """Share of all samples, in [0, 1]; null where nothing was measured."""
    ci95: tuple[Share, Share] | None = None
    """Wilson's 95 % interval; null where ``acc`` is null, or is no more than a bound so far."""

    @model_validator(mode="after")
    def _agree(self) -> Accuracy:
        if self.ci95 is None:
            return self
        low, high = self.ci95
        if self.acc is None or not low - SLACK <= self.acc <= high + SLACK:
            share = "nothing" if self.acc is None else f"{100 * self.acc:.1f} %"
            raise ValueError(f"{share} is not in [{100 * low:.1f}, {100 * high:.1f}]")
        return self

    @classmethod
    def of(cls, correct: int, n: int) -> Accuracy:
        """The accuracy of ``correct`` samples of ``n``; empty for n = 0."""
        return cls(correct / n, wilson(correct, n)) if n else cls()

    def __str__(self) -> str:
        if self.acc is None:
            return "-"
        share = f"{100 * self.acc:.1f} %"
        if self.ci95 is None:
            return share
        low, high = self.ci95
        return f"{share} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True, config=CLOSED)
class Estimate:
    """What a suite of attacks would leave of the images, judged by those that it attacked."""

    of: Text
    """The suite, such as ``AutoAttack``."""
    acc: Share
    """Estimated robust accuracy on these images."""
    ci95: tuple[Share, Share]
    """Its exact 95 % interval: of these images, not of others like them."""
    survivors: Count
    """Samples that the other stages left."""
    audited: Count
    """Of these, drawn by key, attacked by the suite."""
    broken: Count
    """Of these, broken by it."""

    @model_validator(mode="after")
    def _agree(self) -> Estimate:
        if not self.broken <= self.audited <= self.survivors:
            raise ValueError(
                "an audit breaks some of what it attacks, and attacks some of what is left"
            )
        if not self.ci95[0] - SLACK <= self.acc <= self.ci95[1] + SLACK:
            raise ValueError("the estimate lies outside of its interval")
        return self

    def __str__(self) -> str:
        low, high = (f"{100 * end:.1f}" for end in self.ci95)
        return (
            f"{self.of}: {percent(self.acc)} [{low}, {high}] estimated from "
            f"{self.audited:,} of {self.survivors:,} survivors"
        )
