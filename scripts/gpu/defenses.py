#!/usr/bin/env python
"""The five defenses on the card: a short training of each, then msa.

    python scripts/gpu/defenses.py --data FILE.npz [--tiny]

Short trainings: whether everything runs there and what it costs; benchmarks/defenses.md has the
robust accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sitting import Sitting, advbench, parser, results, settings

DEFENSES = {
    "hpm": "defense=hpm",
    "awnet": "defense=awnet recipe=trades",
    "sparta": "defense=sparta",
    "jumprelu": "defense=jumprelu recipe=standard",
    "mfdv_snn": "defense=mfdv_snn recipe=standard",
}


def defend(folder: Path, words: list[str], n: int, quick: list[str]) -> Mapping[str, Any]:
    """Train and evaluate one defense."""
    trained = advbench("train", *words, f"hydra.run.dir={folder}")
    judged = folder.with_name(f"{folder.name}-msa")
    advbench("eval", f"run={folder}", "protocol=msa", f"n={n}", *quick, f"hydra.run.dir={judged}")
    return {"train_seconds": trained, **results(judged)}


def main() -> int:
    given = parser(__doc__).parse_args()
    sitting = Sitting("defenses", given)
    common = settings(given)
    if given.tiny:
        common = [*common, "trainer.epochs=1"]
    else:
        common = [*common, "trainer.epochs=3", "trainer.precision=bf16-mixed"]
    n, quick = (20, ["protocol.square=5", "protocol.draws=2"]) if given.tiny else (200, [])
    for name, defense in DEFENSES.items():
        if given.tiny and name != "jumprelu":
            continue
        words = [*common, *defense.split()]
        sitting.cases[name] = partial(defend, sitting.folder / name, words, n, quick)
    return sitting.run()


if __name__ == "__main__":
    raise SystemExit(main())
