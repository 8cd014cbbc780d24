"""Prints the outcome of a run: its numbers, their intervals, and the verdict."""

from __future__ import annotations

from pathlib import Path

from rich.box import ROUNDED
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from advbench.attacks.threat import Threat
from advbench.console import Screen
from advbench.evaluation.deadline import Budget
from advbench.runs.accuracy import Accuracy, wilson
from advbench.runs.results import MEASURES, Results, StageResult
from advbench.text import duration, percent
from advbench.training.summary import Summary
from advbench.verdict import words

COLOURS = {"reliable": "green", "inconclusive": "yellow", "unreliable": "bold red"}


def show_training(summary: Summary, folder: Path, screen: Screen, command: str) -> None:
    """The end of a training.  command: what evaluates it."""
    val, n = summary.val, summary.val["n"]
    robust = "" if val.get("robust") is None else f", robust {100 * val['robust']:.1f} %"
    best = f"best epoch {summary.best_epoch} of {summary.epochs}: validation accuracy"
    summary_line = f"{best} clean {100 * val['clean']:.1f} %{robust} (n = {n})"
    rows = _facts()
    rows.add_row("best epoch", f"{summary.best_epoch} of {summary.epochs}")
    rows.add_row("clean", _share(val["clean"], n))
    if robust:
        rows.add_row("robust", f"{_share(val['robust'], n)}  {val['attack']}")
    note = f"on {n} validation images, by which the epoch was chosen: a little high"
    screen.outcome(
        f"{summary_line}: {folder}",
        [f"{summary_line}, {summary.seconds:.0f} s", f"next: {command}"],
        _panel(str(folder), [rows, Text(note, "dim")], duration(summary.seconds)),
        [f"next: {command}"],
    )


def show_evaluation(
    results: Results, folder: Path, screen: Screen, budget: Budget | None = None
) -> None:
    """The end of an evaluation, which stopped at ``budget`` if it is unfinished.

    Without a verdict nothing is said of one.
    """
    unfinished = _unfinished(results, budget or Budget())
    label = results.verdict.get("label")
    signs, asked = words.triggered(results.verdict), words.answers(results)
    steps = words.next_steps(results)
    lines = [
        f"  after {stage.name}: {_left(results, stage)} "
        f"({stage.broken} of {stage.attacked} broken, {stage.seconds:.1f} s)"
        for stage in results.begun
    ]
    lines += [f"clean accuracy  {results.clean}", f"robust accuracy {results.bound()}"]
    if (estimated := results.estimated()) is not None:
        lines.append(estimated)
    lines += [f"  {MEASURES[k]}: {100 * value:.1f} %" for k, value in results.measures.items()]
    if label is not None:
        lines.append(f"verdict: {label} ({words.LABELS[label]})")
        lines += [f"  {question} {answer}" for question, answer in asked.items()]
        lines += [f"  {sign['id']} ({sign['class']}): {sign['why']}" for sign in signs]
        lines += [f"  to settle it: {'; '.join(steps)}"] if steps else []
    if unfinished:
        lines.append(unfinished)
    lines.append(f"results: {folder}")

    facts = _facts()
    facts.add_row("robust accuracy", results.bound())
    if estimated is not None:
        facts.add_row("estimate", estimated)
    facts.add_row("clean accuracy", str(results.clean))
    for name, value in results.measures.items():
        facts.add_row(MEASURES[name], f"{100 * value:.1f} %")
    if label is not None:
        facts.add_row("verdict", Text(label, COLOURS.get(label, "")))
        facts.add_row("", Text(words.LABELS[label], "not bold"))
        for question, answer in asked.items():
            facts.add_row("", Text(f"{question} {answer}"))
        for sign in signs:
            facts.add_row("", Text(f"{sign['id']} ({sign['class']}): {sign['why']}", "not bold"))
        if steps:
            facts.add_row("to settle it", Text("; ".join(steps), "not bold"))
    parts = [facts]
    if results.stages:
        parts += [Text(), _stages(results)]
    if unfinished:
        parts += [Text(), Text(unfinished, "yellow")]
    parts += [Text(), Text(f"{folder}/results.json", "dim")]
    threat = Threat(results.threat["norm"], results.threat["eps"])
    title = f"{results.run}, {threat}, {results.protocol['name']} {results.protocol['version']}"
    panel = _panel(title, parts, duration(results.provenance["seconds"]))
    label_text = "" if label is None else f", {label}"
    screen.outcome(
        f"robust {results.bound()}{label_text}; clean {results.clean}: {folder}",
        lines,
        panel,
    )


def strongest(results: Results) -> StageResult | None:
    """The stage that broke most; None if nothing was broken."""
    return max((s for s in results.stages if s.broken), key=lambda s: s.broken, default=None)


def _left(results: Results, stage: StageResult) -> str:
    """What is left after a stage, and whether that is a bound so far."""
    share = percent(stage.robust_acc)
    return f"at most {share}" if stage.name in results.missing else share


def _unfinished(results: Results, budget: Budget) -> str:
    """What the budget did not allow for, and what to do; nothing of a finished evaluation."""
    if results.complete:
        return ""
    if not results.missing:
        return f"time was up before the verdict was computed: {Budget().resume()}"
    first, *others = results.missing
    more = f" and {len(others)} more stage{'s' * (len(others) > 1)}" if others else ""
    return f"{budget.spent()} before the end of {first}{more}: {budget.resume()}"


def _stages(results: Results) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    for name in ("attacked", "broken", "left", "time"):
        table.add_column(name, justify="right")
    table.add_column("")
    most = strongest(results)
    for stage in results.begun:
        table.add_row(
            Text(stage.name),
            str(stage.attacked),
            str(stage.broken),
            _left(results, stage),
            duration(stage.seconds),
            _remark(stage, most, stage.name in results.missing),
        )
    return table


def _remark(stage: StageResult, most: StageResult | None, missing: bool) -> Text:
    return Text("unfinished", "yellow") if missing else Text("broke most" * (stage is most), "bold")


def _share(value: float, n: int) -> str:
    return str(Accuracy(value, wilson(round(value * n), n)))


def _facts() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(style="bold", overflow="fold")
    return table


def _panel(title: str, parts: list[Table | Text], time: str) -> Panel:
    return Panel(
        Group(*parts),
        title=Text(title),
        title_align="left",
        subtitle=Text(time, "dim"),
        subtitle_align="right",
        box=ROUNDED,
        padding=(1, 2),
        expand=False,
    )
