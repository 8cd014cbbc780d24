"""The types of the verdict in ``results.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from advbench.runs.accuracy import OPEN, Count, Flag, Number, Plain, Text

Label = Literal["reliable", "inconclusive", "unreliable"]

Question = Literal["number", "gradient"]

Class = Annotated[
    Literal["proof", "evidence", "thin"],
    Field(description="How much it weighs when it is triggered, see ``advbench.verdict.label``."),
]

_Class = TypedDict("_Class", {"class": Class})
"""Apart, since the key is a word of Python."""


class Indicator(_Class):
    """One reason to trust the number, or not to."""

    id: Text
    """Such as ``zero_gradient``."""
    kind: Text
    """Two pieces of evidence count as two only if their kinds differ."""
    question: Question
    """What it answers: is the number too high, or does the model hide its gradient?"""
    value: NotRequired[Plain]
    """What was measured."""
    threshold: NotRequired[Plain]
    """Beyond it the indicator is triggered."""
    interval: NotRequired[tuple[Number, Number] | None]
    """95 % interval of the value, exact where the value is a share."""
    triggered: Flag
    """Whether it counts against the number."""
    why: Text
    """One sentence for people."""
    source: NotRequired[Text]
    """A paper, or where the definition is from."""
    settles: NotRequired[Text]
    """What settles the doubt."""
    forwards: NotRequired[Count]
    """Rows passed forward to compute it."""
    backwards: NotRequired[Count]
    """Rows passed backward."""
    basis: NotRequired[Text]
    """Hash of what it was computed from: where it is the same, so is what was measured."""
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]


class Verdict(TypedDict):
    """Whether the number can be trusted."""

    label: NotRequired[Label | None]
    """Null without indicators, while unfinished, and where nothing was attacked."""
    unfinished: NotRequired[Flag]
    """Given, and true, where time was up before all indicators were computed."""
    indicators: NotRequired[list[Indicator]]
    """What the label rests on."""
    looked_at: NotRequired[list[Text]]
    """Ids of all indicators that were computed, those that do not apply to the model too."""
    forwards: NotRequired[Count]
    """Rows passed forward to compute them, in all phases of the evaluation."""
    backwards: NotRequired[Count]
    """Rows passed backward."""
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]
