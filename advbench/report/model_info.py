"""An evaluation as an entry of RobustBench's leaderboard (model_info/DATA/THREAT/NAME.json there).

The fields and their forms are those of the entries in that repository: accuracies are percentages
as text. What an evaluation can't know is empty, for a person to fill in.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from advbench.errors import UserError
from advbench.files import write_json
from advbench.report.collection import UNKNOWN
from advbench.report.conditions import text_of, unusual
from advbench.runs.results import RESULTS, Results
from advbench.text import printable

TO_FILL = ("link", "name", "authors", "additional_data", "venue", "reported")
THREATS = {"linf": "Linf", "l2": "L2"}
AUTOATTACK = "autoattack"
WIDER = ("msa", "adaptive")
"""Protocols that contain AutoAttack and go further: what RobustBench calls external."""


def model_info(results: Results) -> dict[str, Any]:
    """The entry of a finished evaluation, in the order of RobustBench's fields.

    Raises UserError for results that the leaderboard has no place for.
    """
    name = results.protocol["name"]
    noisy = "mean_draw" in results.measures  # which only a stochastic model has
    if results.missing:
        raise UserError(
            f"the evaluation is unfinished ({', '.join(results.missing)}): finish it first"
        )
    if results.threat["norm"] not in THREATS:
        raise UserError(f"RobustBench has no leaderboard for {results.threat['norm']}")
    if name not in (AUTOATTACK, *WIDER):
        raise UserError(
            f"protocol={name} is weaker than what RobustBench reports: evaluate with "
            "protocol=autoattack, msa or adaptive"
        )
    if results.protocol.get("attacks") is not None:
        raise UserError(
            "protocol.attacks leaves out members of AutoAttack: evaluate with protocol=autoattack"
        )
    if results.protocol.get("suite") == "rand" and not noisy:
        raise UserError(
            "protocol.suite=rand leaves out two attacks and is for stochastic models, which this "
            "one is not: evaluate with protocol=autoattack"
        )
    if results.clean.acc is None or results.robust.acc is None or results.robust.ci95 is None:
        raise UserError("nothing was attacked: there is no robust accuracy to report")
    clean, robust = _percent(results.clean.acc), _percent(results.robust.acc)
    low, high = results.robust.ci95
    label, settings = results.verdict.get("label"), results.settings
    info: dict[str, Any] = {
        **dict.fromkeys(TO_FILL[:4], ""),
        "number_forward_passes": "" if noisy else 1,
        "dataset": results.data["name"],
        "venue": "",
        "architecture": settings.get("backbone.name") or settings.get("backbone", ""),
        "eps": _budget(results.threat["norm"], results.threat["eps"]),
        "clean_acc": clean,
        "reported": "",
        "autoattack_acc": robust if name == AUTOATTACK else "",
    }
    if name in WIDER:
        info["external"] = robust
    provenance = results.provenance
    changes = "".join(f", {key} {text_of(value)}" for key, value in unusual(results).items())
    info["footnote"] = (
        f"advbench {provenance.get('advbench') or UNKNOWN}, protocol {name} "
        f"{results.protocol['version']}{changes}, n = {results.data['n']} test images, "
        f"95 % interval [{_percent(low)}, {_percent(high)}]; "
        f"model sha256 {(provenance.get('model_sha256') or UNKNOWN)[:16]}"
    )
    info["unreliable"] = "" if label is None else label == "unreliable"
    return info


def export(run: Path, out: Path | None) -> None:
    """Write the entry of an evaluation into a file, or print it.

    Raises UserError for a directory without results, and rather than overwrite a file.
    """
    path = run / RESULTS if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"'{run}' holds no results.json: give the directory of an evaluation")
    results = Results.load(path)
    info = model_info(results)
    if out is None:
        print(json.dumps(info, indent=2))
    else:
        if out.exists():
            raise UserError(f"'{out}' exists already: move it away first")
        if not out.parent.is_dir():
            raise UserError(f"there is no directory '{out.parent}'")
        write_json(out, info)
        print(out)
    empty = [key for key, value in info.items() if value == ""]
    target = f"model_info/{info['dataset']}/{THREATS[results.threat['norm']]}/NAME.json"
    print(printable(f"for {target}; to be filled in: {', '.join(empty)}"), file=sys.stderr)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _budget(norm: str, eps: float) -> str:
    """Such as 8/255 or 0.5."""
    steps = eps * 255
    if norm == "linf" and abs(steps - round(steps)) < 1e-6:
        return f"{round(steps)}/255"
    return str(float(Fraction(eps).limit_denominator(1000)))
