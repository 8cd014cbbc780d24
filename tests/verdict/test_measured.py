"""What an indicator measured is kept: no phase, and no resumed evaluation, computes it again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from made_up_looks import look, net

from advbench.attacks.pgd import PGD
from advbench.attacks.square import Square
from advbench.errors import UserError
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.measured import Measured
from advbench.evaluation.phases import Findings, FollowUp, keyed_sample
from advbench.evaluation.protocol import Plan, Protocol, Stage, Subject
from advbench.runs.results import Results
from advbench.verdict.indicator import Indicator
from advbench.verdict.judge import Judgement
from advbench.verdict.look import Finding, Look
from advbench.verdict.registry import INDICATORS

CHOSEN = ["probabilities", "gradient_mismatch", "unbounded", "one_step", "noise", "black_box"]
COSTLY = [name for name in CHOSEN if name != "black_box"]


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Phased(Protocol):
    """One search, then another on some of the survivors."""

    name: ClassVar[str] = "phased"
    more: bool = True

    def stages(self, subject: Subject) -> list[Stage]:
        return [Stage("weak", PGD(steps=1, step_size=0.01, random_start=False), "one step")]

    def may_follow(self, subject: Subject) -> list[Stage]:
        return [Stage("strong", PGD(steps=10), "ten"), Stage("square", Square(steps=5), "blind")]

    def follow_up(self, plan: Plan, findings: Findings) -> FollowUp | None:
        if not self.more or len(findings.stages) > 1:
            return None
        some = keyed_sample(findings.survivors(plan.stages), 5, findings.seed)
        return FollowUp(tuple(dataclasses.replace(s, only=some) for s in plan.follow_ups), "some")


def evaluation(more: bool = True, chosen: list[str] = CHOSEN, only: bool = False) -> Evaluation:
    protocol = Phased(more=more)
    job = dataclasses.replace(look(net(), n=12, eps=0.1).job, batch_size=12, keep_images=True)
    judge = Judgement(indicators=chosen, only=only).of(protocol)
    return Evaluation("net", "digits", protocol, job, judge=judge)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the indicators, each time one is computed."""
    names: list[str] = []
    entry = Indicator.entry

    def counted(self: Indicator, look: Any) -> Any:
        names.append(self.id)
        return entry(self, look)

    monkeypatch.setattr(Indicator, "entry", counted)
    return names


def but_for_time(folder: Path) -> Any:
    values = json.loads((folder / "results.json").read_text())
    del values["provenance"], values["checksum"], values["files"]
    for stage in values["stages"]:
        del stage["seconds"]
    return values


def test_a_phase_computes_what_has_changed_and_no_more(tmp_path: Path, computed: list[str]) -> None:
    case = evaluation()
    verdict = case.execute(tmp_path, case.plan()).verdict
    counts = Counter(name for name in computed if name != "black_box")
    assert counts == {
        **dict.fromkeys(["probabilities", "gradient_mismatch", "unbounded"], 1),
        **dict.fromkeys(["one_step", "noise"], 2),  # which look at survivors
    }
    shown = sum(sign.get("forwards", 0) for sign in verdict.get("indicators", ()))
    assert verdict.get("forwards", 0) > shown > 0, "those of the first phase count too"
    assert not (tmp_path / "journal").exists()


def test_killed_between_indicators_it_ends_with_the_same_bytes(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluation()
    whole.execute(tmp_path / "whole", whole.plan())
    once = Counter(computed)
    computed.clear()
    keep, kills = Measured.keep, 0

    def killed(self: Measured, *given: Any) -> None:
        keep(self, *given)
        raise Killed

    monkeypatch.setattr(Measured, "keep", killed)
    while not (tmp_path / "cut" / "results.json").exists():
        case = evaluation()
        try:
            case.execute(tmp_path / "cut", case.plan())
        except Killed:
            kills += 1
    assert kills == sum(once[name] for name in COSTLY) == 7
    assert all(computed.count(name) == once[name] for name in COSTLY)
    assert but_for_time(tmp_path / "cut") == but_for_time(tmp_path / "whole")


def test_a_budget_ends_between_indicators_and_a_later_sitting_goes_on(
    tmp_path: Path, computed: list[str]
) -> None:
    whole = evaluation()
    expected = whole.execute(tmp_path / "whole", whole.plan())
    once = Counter(computed)
    computed.clear()
    states = []
    for _ in range(40):
        case = evaluation()
        results = case.execute(tmp_path / "parts", case.plan(), budget=1e-9)
        states.append(dict(results.verdict))
        again = Results.load(tmp_path / "parts" / "results.json")
        assert again.complete is results.complete
        if results.complete:
            break
        assert results.verdict.get("label") is None
    nothing = {"label": None, "indicators": [], "unfinished": True}
    assert states.count(nothing) == sum(once[name] for name in COSTLY) - 2  # one for each phase
    assert states[-1] == expected.verdict
    assert all(computed.count(name) == once[name] for name in COSTLY)
    assert but_for_time(tmp_path / "parts") == but_for_time(tmp_path / "whole")


def test_a_finished_evaluation_computes_what_it_lacks(tmp_path: Path, computed: list[str]) -> None:
    few = evaluation(chosen=["unbounded", "black_box"])
    first = few.execute(tmp_path, few.plan())
    records = (tmp_path / "samples.parquet").read_bytes()
    computed.clear()
    all_of_them = evaluation()
    results = all_of_them.execute(tmp_path, all_of_them.plan())
    assert "unbounded" not in computed and sorted({*computed, "unbounded"}) == sorted(CHOSEN)
    signs = {sign["id"]: sign for sign in results.verdict.get("indicators", ())}
    assert signs["unbounded"] in first.verdict.get("indicators", ())
    spent = sum(sign.get("forwards", 0) for sign in signs.values())
    assert results.verdict.get("forwards") == spent
    assert dataclasses.replace(results, verdict=first.verdict) == first
    assert (tmp_path / "samples.parquet").read_bytes() == records
    computed.clear()
    assert all_of_them.execute(tmp_path, all_of_them.plan()) == results and not computed


def test_only_computes_all_of_it_anew(tmp_path: Path, computed: list[str]) -> None:
    case = evaluation(more=False)
    first = case.execute(tmp_path, case.plan())
    computed.clear()
    again = evaluation(more=False, only=True)
    assert again.execute(tmp_path, again.plan()) == first
    assert sorted(computed) == sorted(CHOSEN)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    Measured(tmp_path).keep("noise-0", None, 3, 1)
    again = Measured(tmp_path)
    assert "noise-0" in again and again.entry("noise-0") is None and again.passes == (3, 1)
    (path,) = (tmp_path / "journal").glob("verdict-*.json")
    path.write_bytes(path.read_bytes().replace(b"3", b"4", 1))
    with pytest.raises(UserError, match="remove it to compute it again"):
        Measured(tmp_path)


class Watched(Look):
    """Notes what is read of it."""

    def __getattribute__(self, name: str) -> Any:
        note = object.__getattribute__(self, "__dict__").get("note")
        if note is None or name not in ("white_box", *get_args(Finding)):
            return super().__getattribute__(name)
        note.add("searches" if name == "white_box" else name)
        self.note = None  # what it reads for this is no reading of the indicator's
        value = super().__getattribute__(name)
        if name == "survivors":
            ids = self.survivors()
            value = lambda: ids  # noqa: E731
        self.note = note
        return value


@pytest.mark.parametrize("indicator", INDICATORS, ids=lambda one: one.id)
def test_an_indicator_names_what_it_reads(indicator: Indicator) -> None:
    """Else it would not be computed again where that changed."""
    found, note = look(net(), n=4, eps=0.2), set()
    found.__class__ = Watched
    found.note = note  # pyright: ignore[reportAttributeAccessIssue]
    indicator.entry(found)
    assert indicator.cost == "free" or note <= set(indicator.rests_on)
