"""Numbers and names as people read them."""

from __future__ import annotations


def threat_name(norm: str, eps: float) -> str:
    """A threat in words: linf 8/255, l2 0.5."""
    near = round(eps * 255)
    if norm == "linf" and near and abs(eps * 255 - near) < 1e-6:
        return f"{norm} {near}/255"
    return f"{norm} {eps:g}"


def printable(text: str) -> str:
    """One line without control characters, which could steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def percent(share: float | None) -> str:
    """A share in [0, 1] in per cent, to a tenth; - for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes such as 0 bytes, 812 kB, 3.4 MB or 12 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {units[power]}" if power and count < 10 else f"{count:.0f} {units[power]}"


def number(value: float) -> str:
    """With as many digits as a person wants: 0.42, 3.1, 57, 1,230."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def count(number: int, noun: str) -> str:
    """Such as 1 image, 2 images."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
