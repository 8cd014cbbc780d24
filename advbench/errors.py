"""The one exception that a user's mistake raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user: one line that says what is wrong and what to type instead.

    The command line prints the message without a traceback and exits with code 2.
    """


def causes(problem: BaseException | None) -> list[BaseException]:
    """The exception and what led to it, outermost first."""
    links: list[BaseException] = []
    while problem is not None and problem not in links:
        links.append(problem)
        problem = problem.__cause__ or problem.__context__
    return links


def reason_of(problem: BaseException) -> str:
    """What somebody else's exception says, in one line; its kind where it says nothing."""
    return " ".join(str(problem).split()) or type(problem).__name__


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """A hint with the nearest of ``choices``, or all of them when none is near and they are few.

    Returns text that starts with "; " and so can follow any message; empty without a hint.
    """
    names = sorted(set(choices))
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(word).lower(), lower, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{lower[near[0]]}'?"
    return f"; there is: {', '.join(names)}" if 0 < len(names) <= 20 else ""


def describe(problem: BaseException) -> str:
    """An exception of somebody else's code in one line."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
