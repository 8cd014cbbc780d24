"""``Reading``: the measurement of one indicator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from advbench.runs.accuracy import Accuracy, clopper_pearson
from advbench.runs.judgement import Question
from advbench.text import count

Class = Literal["proof", "evidence", "thin"]
"""How much a triggered indicator weighs, see ``label``."""


@dataclass(frozen=True)
class Reading:
    """The measurement of an indicator."""

    value: float | int | str | None
    """What was measured."""
    threshold: float | int | str | None
    """Beyond it the indicator is triggered."""
    triggered: bool
    """Whether it counts against the number, or against the gradient."""
    why: str
    """One sentence for people, whether triggered or not."""
    interval: tuple[float, float] | None = None
    """95 % interval of the value, exact where the value is a share."""
    weight: Class | None = None
    """Class of this reading, where it is another than the indicator's."""
    question: Question | None = None
    """The question that this reading answers, where it is another than the indicator's."""
    settles: str | None = None
    """What settles this reading, where it is something else than the indicator's."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Numbers for a picture, of plain types."""


def of_share(
    hits: int,
    of: int,
    threshold: float,
    why: str,
    *,
    more: str = "",
    proof: float | None = None,
    **data: Any,
) -> Reading:
    """The reading of a share, judged by its exact interval.

    Args:
        hits: images that speak against the number, of ``of``.
        threshold: triggered where the lower end of the 95 % interval is above it.
        more: what the sentence goes on with where it is triggered.
        proof: of an indicator of class proof: up to this lower end it is evidence.
        why: the sentence.
        data: numbers for a picture.
    """
    low, high = clopper_pearson(hits, of)
    triggered, value = low > threshold, hits / of if of else None
    weight = "evidence" if triggered and proof is not None and low <= proof else None
    why += more if triggered else ""
    return Reading(value, threshold, triggered, why, (low, high), weight, data=data)


def fall(hits: int, of: int, left: int, n: int) -> tuple[float, bool]:
    """How far a robust accuracy falls that counts images which a search breaks.

    Args:
        hits: survivors that the search breaks, of ``of``.
        of: survivors that it attacked, chosen at random. Of the others, the lower end of the exact
            95 % interval is taken to break.
        left: survivors of all ``n`` images.
        n: images of the evaluation.

    Returns:
        The fall, a share of the n images, and whether it ends below the 95 % interval of the
        number: a proof that the number is too high.
    """
    share = hits / of if of == left else clopper_pearson(hits, of)[0]
    return share * left / n, below_interval(left * (1 - share), left, n)


def below_interval(after: float, left: int, n: int) -> bool:
    """Whether ``after`` survivors of n images are fewer than the 95 % interval of ``left`` has."""
    return after / n < (Accuracy.of(left, n).ci95 or (0.0, 1.0))[0]


def images(number: int) -> str:
    """Such as ``1 image`` or ``3 images``."""
    return count(number, "image")
