"""Results of evaluations that nobody ran, for tests of tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluations
import numpy as np

from advbench.evaluation.store import Records, Store, clear_journal
from advbench.report.collection import Entry
from advbench.runs.results import Results

SETTINGS = {"backbone": "convnet", "defense": "none", "recipe": "pgd_at", "seed": 0}
DATA = {"name": "digits", "split": "test", "n": 200, "sha256": "c0ffee00" * 8}
THREAT = {"norm": "linf", "eps": 8 / 255}
AUTOATTACK = {"name": "autoattack", "version": "1", "suite": "standard", "seed": 0}
PGD = {"name": "pgd", "version": "1", "steps": 50, "seed": 0}


def results(held: int = 100, **changes: Any) -> Results:
    """Results of a plausible evaluation, in which so many images held.

    changes: of fields; those of a mapping are merged into it.
    """
    n, missing = changes.get("data", {}).get("n", DATA["n"]), changes.pop("missing", ())
    held = min(held, n)
    correct = max(n - 10, held)
    lost = {} if changes.get("stages") == () else {"apgd-ce": correct - held, "square": 0}
    values: dict[str, Any] = {
        "run": "a-run",
        "settings": SETTINGS,
        "data": DATA,
        "threat": THREAT,
        "protocol": AUTOATTACK,
        **evaluations.found(n, correct, lost, missing, "APGD"),
        "provenance": {"seconds": 12.5, "model_sha256": None},
    }
    for key, value in changes.items():
        whole = key in ("protocol",) or not isinstance(values.get(key), dict)
        values[key] = value if whole else {**values[key], **value}
    return Results(**values)


def put(folder: Path, held: int = 100, **changes: Any) -> Path:
    """An evaluation directory with results and nothing else."""
    folder.mkdir(parents=True)
    results(held, **changes).save(folder / "results.json")
    return folder


def jumps(folder: Path, values: Sequence[float], **changes: Any) -> None:
    """A sweep of a retrofit, the more robust the smaller its rest by 7."""
    for jump in values:
        settings = {"defense": "jumprelu", "defense.jump": jump}
        name = "-".join([str(jump), *map(str, changes)])
        put(folder / name, 100 + int(10 * jump) % 7, settings=settings, **changes)


def entries(*found: Results) -> list[Entry]:
    return [Entry(Path(f"run{i}"), each) for i, each in enumerate(found)]


def seeds(*numbers: int | None, **changes: Any) -> list[Results]:
    extra = changes.pop("settings", {})
    return [results(settings={"seed": seed, **extra}, **changes) for seed in numbers]


# --- formats ------------------------------------------------------------------------------------

NASTY = "[red]a|b_*<b>&\\input{x}$%#~^\"'` \x1b[31m\r\n\ud800 =1+1 é→[/red]"


STAGES = ("clean", "apgd-ce", "square")


def evaluated(
    folder: Path, fell: Sequence[int], ids: Sequence[int] | None = None, **more: Any
) -> Path:
    """An evaluation with records. fell: index of the stage in which each image was lost, or -1."""
    where, n = np.asarray(fell), len(fell)
    sample = np.arange(n) if ids is None else np.asarray(ids)
    more["data"] = {"n": n, **more.get("data", {})}
    lost = {name: int((where == stage).sum()) for stage, name in enumerate(STAGES) if stage}
    if more.get("stages") == ():
        lost = {}
    put(folder, **{**evaluations.found(n, int((where != 0).sum()), lost), **more})
    store = Store(folder)
    for stage, name in enumerate(STAGES):
        there = (where < 0) | (where >= stage)  # a later stage sees the survivors
        broken = (where == stage)[there]
        zeros = np.zeros(len(broken))
        store.append(
            name,
            Records(
                **{
                    key: np.asarray(value, Records.DTYPES[key])
                    for key, value in {
                        "sample": sample[there], "broken": broken, "label": zeros, "margin": zeros,
                        "distance": zeros, "wrong": zeros, "alone": broken, "forwards": zeros,
                        "backwards": zeros,
                    }.items()
                }
            ),
            0.0,
        )  # fmt: skip
    store.finish(list(STAGES))
    clear_journal(folder)
    return folder
