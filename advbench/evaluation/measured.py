"""What indicators measured, kept as it comes: no passes are spent twice on one question.

In the journal each is one small file, written atomically and with a checksum. A killed evaluation
reads them back, and so do later phases of the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advbench.errors import UserError
from advbench.evaluation.store import JOURNAL
from advbench.runs.judgement import Indicator, Verdict
from advbench.runs.manifest import Damaged, plan_key, read_sealed, write_sealed

NOTHING = {"entry": None, "forwards": 0, "backwards": 0}


class Measured:
    """What the indicators of one evaluation measured, in all of its phases.

    Args:
        folder: of the evaluation; None keeps it in memory.
        known: the verdict of a finished evaluation, whose indicators need not be computed again.

    Raises:
        UserError: for a file that is damaged.
    """

    def __init__(self, folder: Path | None = None, known: Verdict | None = None) -> None:
        self._journal = None if folder is None else folder / JOURNAL
        self._key = "" if folder is None else plan_key(folder)
        self._parts: dict[str, Mapping[str, Any]] = _parts(known or Verdict())
        for path in () if self._journal is None else sorted(self._journal.glob("verdict-*.json")):
            try:
                content = json.loads(read_sealed(path, self._key)[0].getvalue())
                self._parts[path.stem.removeprefix("verdict-")] = {k: content[k] for k in NOTHING}
            except (Damaged, OSError, ValueError, LookupError, TypeError):
                raise UserError(
                    f"'{path}' is damaged or another run's: remove it to compute it again"
                ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def entry(self, name: str) -> Indicator | None:
        """What an indicator measured; None where it did not apply."""
        return self._parts[name]["entry"]

    def keep(self, name: str, entry: Indicator | None, forwards: int, backwards: int) -> None:
        """Keep it, on disk before this returns.

        Args:
            name: of the indicator, and what it was computed from.
            entry: what it measured; None where it does not apply.
            forwards: rows passed forward to find that out.
            backwards: rows passed backward.
        """
        part = {"entry": entry, "forwards": forwards, "backwards": backwards}
        if self._journal is not None:
            self._journal.mkdir(exist_ok=True)
            text = json.dumps(part, allow_nan=False)
            write_sealed(
                self._journal / f"verdict-{name}.json",
                lambda path: path.write_text(text, encoding="utf-8"),
                self._key,
            )
        self._parts[name] = part

    @property
    def passes(self) -> tuple[int, int]:
        """Rows passed forward and backward, over all phases and sittings."""
        parts = self._parts.values()
        return sum(part["forwards"] for part in parts), sum(part["backwards"] for part in parts)


def _parts(known: Verdict) -> dict[str, Mapping[str, Any]]:
    """What a verdict says: its indicators, and the passes of those of earlier phases."""
    signs = known.get("indicators", [])
    parts = {
        f"{sign['id']}-{sign.get('basis', '')}": {
            "entry": sign,
            "forwards": sign.get("forwards", 0),
            "backwards": sign.get("backwards", 0),
        }
        for sign in signs
    }
    spent = {
        key: max(0, known.get(key, 0) - sum(part[key] for part in parts.values()))
        for key in ("forwards", "backwards")
    }
    return {**parts, "": {**NOTHING, **spent}}
