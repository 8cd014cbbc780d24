"""HTML whose text is escaped because there is no other way to put it in."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | float | None | Iterable["Child"]

_EMPTY = {"meta", "input", "img", "br"}


def attribute(value: object) -> str:
    return html.escape(str(value), quote=True)


def render(child: Child) -> str:
    """HTML of a child: Markup as it is, other text escaped, the parts of a list in order."""
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return html.escape(str(child))
    return "".join(render(part) for part in child)


def el(tag: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. ``class_`` is class, ``data_x`` is data-x; True is a bare attribute, and what is
    None or False is left out."""
    words = [tag]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{attribute(value)}"')
    opening = f"<{' '.join(words)}>"
    if tag in _EMPTY:
        return Markup(opening)
    return Markup(f"{opening}{render(children)}</{tag}>")
