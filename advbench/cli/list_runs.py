"""The list of runs with their progress. Reads small files only and does not import torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import yaml
from filelock import FileLock, Timeout
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from advbench.config.nodes import LOADER, text_of
from advbench.console import FAILED, WIDE, table_console
from advbench.errors import UserError
from advbench.files import read_rows
from advbench.runs import directory, manifest
from advbench.runs.results import RESULTS, Results
from advbench.text import printable

STYLES = {"finished": "green", "at work": "cyan", "failed": "red", "damaged": "red"}
MOST_SETTINGS = 4  # of those that set a run apart, are shown
STAMP = len("2026-01-01 00:00:00 ")  # before each line of a log


@dataclass(frozen=True)
class Run:
    """A run directory as a list shows it.

    kind: train or eval.  state: finished, at work, failed, interrupted or damaged.  where: how far
    it came, or what is wrong.  robust: its robust accuracy in words.  changed: when it last was.
    resume: the command that resumes it; empty where nothing is left to do.  settings: its config's
    values, by full key.
    """

    folder: Path
    kind: str
    state: str
    where: str
    what: str
    robust: str
    changed: float
    resume: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def find(paths: Sequence[Path]) -> list[Run]:
    """All runs below the paths, the newest last.

    Raises UserError for a missing path, and where there is none.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.exists():
            hint = ": make a run with 'advbench train'" if path == directory.OUTPUTS else ""
            raise UserError(f"there is no '{path}'{hint}")
        for folder in _folders(path):
            if folder.resolve() not in runs and (run := look(folder)) is not None:
                runs[folder.resolve()] = run
    if not runs:
        listed = ", ".join(map(str, paths))
        raise UserError(f"there are no runs in {listed}: make one with 'advbench train'")
    return sorted(_apart(runs.values()), key=lambda run: (run.changed, str(run.folder)))


def _apart(runs: Iterable[Run]) -> list[Run]:
    """The runs, each with the settings that set it apart from others that would look the same."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.kind, run.what), []).append(run)
    parts = []
    for group in alike.values():
        keys = dict.fromkeys(key for run in group for key in run.settings)
        differ = [k for k in keys if len({str(run.settings.get(k)) for run in group}) > 1]
        for run in group:
            different = [f"{k}={run.settings[k]}" for k in differ if k in run.settings][
                :MOST_SETTINGS
            ]
            parts.append(replace(run, what=" ".join([run.what, *different])))
    return parts


def _settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a run's config by full key."""
    values: dict[str, Any] = {"seed": cfg.get("seed")}
    for group, node in cfg.items():
        if isinstance(node, Mapping) and group != "choices":
            plain = {k: v for k, v in node.items() if not isinstance(v, dict | list)}
            values |= {f"{group}.{k}": v for k, v in plain.items() if k != "_target_"}
    return values


def look(folder: Path) -> Run | None:
    """The run in a directory; None if there is none."""
    try:
        cfg = yaml.load(text_of(folder / directory.CONFIG), Loader=LOADER)
    except (UserError, yaml.YAMLError) as problem:
        if not any((folder / name).exists() for name in (directory.SUMMARY, RESULTS, "plan.json")):
            return None
        kind = "train" if (folder / directory.SUMMARY).exists() else "eval"
        return _damaged(folder, kind, str(problem))
    if not isinstance(cfg, dict) or not isinstance(cfg.get("choices"), dict):
        return None
    kind = directory.kind_of(cfg)
    if kind is None:
        return None
    try:
        return _training(folder, cfg) if kind == "train" else _evaluation(folder, cfg)
    except Exception as problem:  # whatever its files are, the other runs are shown
        why = str(problem) if isinstance(problem, UserError) else "its files are not of one run"
        return _damaged(folder, kind, why)


def _damaged(folder: Path, kind: str, why: str) -> Run:
    return Run(folder, kind, "damaged", why, "", "-", folder.stat().st_mtime, "")


def show(paths: Sequence[Path]) -> None:
    """Print a table of the runs, and the commands that resume those that did not finish.

    A terminal that is too narrow for it gets three lines for each run, so that no name is folded.
    """
    console = table_console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("state", "kind", "when", "robust", "what", "run"):
        table.add_column(column, no_wrap=True)
    everything = find(paths)
    rows = [_row(run) for run in everything]
    for row in rows:
        table.add_row(*row)
    width = Measurement.get(console, console.options.update(max_width=WIDE), table).maximum
    if width <= console.width:
        console.print(table)
    else:
        for state, kind, when, robust, what, name in rows:
            more = (Text("  ") + what, Text("  ") + name)
            console.print(
                Text("  ").join((state, kind, when, robust)), *more, sep="\n", soft_wrap=True
            )
    open_runs = [run for run in everything if run.resume]
    if open_runs:
        console.print("\nto go on:", style="dim")
        for run in open_runs:
            console.print(f"  {printable(run.resume)}", markup=False, soft_wrap=True)


def _row(run: Run) -> tuple[Text, ...]:
    """State, kind, when, robust, what and name."""
    state = Text(run.state, STYLES.get(run.state, "yellow"))
    if run.where:
        state.append(f" {printable(run.where)}", "dim")
    when = datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")
    words = (run.kind, when, run.robust, run.what, str(run.folder))
    return state, *(Text(printable(word)) for word in words)


def _folders(path: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(path):
        folders[:] = [f for f in folders if f != "journal" and not f.startswith(".")]
        if directory.CONFIG in files:
            yield Path(name)


def _training(folder: Path, cfg: Mapping[str, Any]) -> Run:
    summary = _json(folder / directory.SUMMARY)
    rows = _rows(folder / "metrics.csv") if summary is None else []
    epochs = (cfg.get("trainer") or {}).get("epochs")
    robust = "-"
    if summary is not None:
        value = (summary.get("val") or {}).get("robust")
        robust = "-" if value is None else f"{100 * value:.1f} (val)"
    names = [_choice(cfg, group) for group in ("data", "backbone", "defense", "recipe")]
    return _run(
        folder,
        cfg,
        kind="train",
        finished=summary is not None,
        where=f"after epoch {len(rows)} of {epochs}",
        what=" ".join(name for name in names if name != "none"),
        robust=robust,
        files=(directory.SUMMARY, "metrics.csv", "resume.pt", directory.CONFIG),
    )


def _evaluation(folder: Path, cfg: Mapping[str, Any]) -> Run:
    results, robust, n = None, "-", ""
    if (folder / RESULTS).is_file():
        results = Results.load(folder / RESULTS)
        robust = str(results.robust).replace(" %", "")
        n = f", n = {results.data['n']}"
    finished = results is not None and results.complete
    of = Path(cfg.get("run") or cfg.get("model") or "?").name
    return _run(
        folder,
        cfg,
        kind="eval",
        finished=finished,
        where="" if finished else _stage(folder),
        what=f"{_choice(cfg, 'protocol')} of {of}{n}",
        robust=robust if finished or robust == "-" else f"<= {robust}",
        files=(RESULTS, "journal", "plan.json", directory.CONFIG),
    )


def _run(
    folder: Path,
    cfg: Mapping[str, Any],
    *,
    kind: str,
    finished: bool,
    where: str,
    what: str,
    robust: str,
    files: Sequence[str],
) -> Run:
    state, resume = "finished", ""
    if finished:
        if lack := manifest.lacking(folder):
            return _damaged(folder, kind, lack)
        where = f"({directory.CONFIG} was edited)" if manifest.edited(folder) else ""
    elif _locked(folder):
        state = "at work"
    else:
        state, resume = "interrupted", directory.going_on(folder, cfg)
        last = _last_lines(folder / "log.txt")[-1:]
        if last and last[0].startswith(FAILED):
            state, where = "failed", last[0].removeprefix(FAILED)
    stamps = [(folder / name).stat().st_mtime for name in files if (folder / name).exists()]
    changed = stamps[0] if finished else max(stamps, default=0.0)
    return Run(folder, kind, state, where, what, robust, changed, resume, _settings(cfg))


def _stage(folder: Path) -> str:
    """Which stage an evaluation is in: as its log says, or the last part of its journal."""
    for line in reversed(_last_lines(folder / "log.txt")):
        if begun := re.fullmatch(r"\[(\d+)/(\d+)\] (.+): \d+ samples", line):
            return f"in stage {begun[3]}, {begun[1]} of {begun[2]}"
    plan = _json(folder / "plan.json") or {}
    names = [stage["name"] for stage in plan.get("stages", ())]
    parts = sorted((folder / "journal").glob("[0-9]*-[0-9]*.npz"), key=lambda p: p.stat().st_mtime)
    if not parts:
        return "at the start"
    import numpy as np

    try:
        with np.load(manifest.read_sealed(parts[-1], manifest.plan_key(folder))[0]) as part:
            name = str(part["stage"])
    except (UserError, OSError, EOFError, ValueError, KeyError, BadZipFile):
        return ""
    at = f", {names.index(name) + 1} of {len(names)}" if name in names else ""
    return f"in stage {name}{at}"


def _locked(folder: Path) -> bool:
    """Whether a process works in the run now; a directory that can't be written is nobody's."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _choice(cfg: Mapping[str, Any], group: str) -> str:
    return str(cfg["choices"].get(group, "own"))


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = manifest.read_json(path)
    except FileNotFoundError:
        return None
    return content if isinstance(content, dict) else None


def _rows(path: Path) -> list[dict[str, str]]:
    return read_rows(path) if path.exists() else []


def _last_lines(path: Path) -> list[str]:
    """The last lines of a log, without their time."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4096, 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line[STAMP:] for line in lines]
