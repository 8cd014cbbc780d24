"""`advbench report`: its tables, its mistakes, damaged files, and real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_results import AUTOATTACK, jumps, put, results

from advbench.cli.main import main
from advbench.report.collection import find, groups

MODEL = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


# --- the command --------------------------------------------------------------------------------


def test_two_threats_are_two_tables_and_mix_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jumps(tmp_path, (0, 1, 2))
    jumps(tmp_path, (0, 1, 2), threat={"eps": 0.5})
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("robust   ") == 2
    assert "linf 8/255, linf 0.5" in shown.err and "--mix" in shown.err
    wanted = ["report", str(tmp_path), "--sweep", "defense.jump"]
    assert main(wanted) == 2
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err.count("\n") == 1
    assert "threat (linf 8/255, linf 0.5)" in refused.err and "add --mix" in refused.err
    assert main([*wanted, "--mix"]) == 0
    assert capsys.readouterr().out.count("linf") == 6
    assert main(["report", str(tmp_path), "--sweep", "threat.eps,defense.jump"]) == 0
    swept = capsys.readouterr().out
    assert swept.count("linf 8/255") == swept.count("linf 0.5") == 3
    assert main(["report", str(tmp_path), "--mix", "--format", "md"]) == 0
    mixed = capsys.readouterr()
    assert mixed.out.count("###") == 1 and mixed.err == ""


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no folder": (["nowhere"], "there is no 'nowhere'"),
    "no results": (["empty"], "there are no results in empty: make some with 'advbench eval'"),
    "no key": (["good", "--sweep", "defence"], "did you mean 'defense'?"),
    "its last word": (
        ["jump", "--sweep", "jump"],
        "no result has 'jump'; did you mean 'defense.jump'?",
    ),
    "the page": (["good", "--format", "html"], "--html FILE"),
    "no format": (["good", "--format", "markdown"], "there is: csv, json, latex, md"),
    "no suffix": (["good", "--out", "table.txt"], "add --format md|csv|json|latex"),
    "no option": (["good", "--frmat", "md"], "--frmat"),
    "one": (["--compare", "good"], "--compare takes two evaluations"),
    "none": (["--compare"], "--compare takes two evaluations"),
    "many": (["--compare", "good", "."], "'.' holds 3 evaluations: name the directory of one"),
    "both": (["--compare", "good", "good", "--sweep", "x"], "not allowed with"),
    "as a table": (["--compare", "good", "other", "--format", "csv"], "--format json"),
    "no records": (["--compare", "good", "other"], "has no samples.parquet"),
    "by its name": (["--compare", "good", "other", "--out", "table.csv"], "--format json"),
    "no place": (["good", "--out", "no/where.md"], "can't use 'no/where.md'"),
    "a folder": (["good", "--out", "empty", "--format", "md"], "can't use 'empty'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(MISTAKES) == 17
    monkeypatch.chdir(tmp_path)
    put(Path("good"))
    put(Path("other"))
    put(Path("jump"), settings={"defense.jump": 0.5})
    Path("empty").mkdir()
    command, message = MISTAKES[case]
    assert main(["report", *command]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("advbench: ") and message in shown.err


DAMAGED: list[tuple[str, Any]] = [
    ("schema", "advbench.results/9"),
    ("schema", "\x1b[31m\n"),
    ("robust", {"acc": 1.5, "ci95": [0.1, 0.2]}),
    ("clean", {"acc": float("nan"), "ci95": [0.1, 0.2]}),
    ("settings", {"defense": ["a", "list"]}),
    ("settings", {"defense.jump": 1e999}),
    ("data", {"name": "digits", "n": "many"}),
    ("data", {"name": "digits", "n": True}),
    ("data", {"name": "digits", "n": 10**30}),
    ("threat", {"norm": "linf"}),
    ("threat", {"norm": "linf", "eps": 10**400}),
    ("protocol", {"name": ["autoattack"], "version": "1"}),
    ("protocol", {"name": "pgd", "version": "1", "seed": []}),
    ("stages", [{"name": "apgd"}]),
    ("stages", [{**vars(results().stages[0]), "robust_acc": 1.5}]),
    ("stages", [{**vars(results().stages[0]), "broken": -1}]),
    ("verdict", []),
    ("measures", {"wra": float("nan")}),
    ("missing", 3),
    ("provenance", {}),
    ("provenance", {"seconds": 1, "model_sha256": 5}),
]


@pytest.mark.parametrize("case", range(len(DAMAGED)))
def test_a_damaged_file_hides_no_other(
    case: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(DAMAGED) == 21
    key, value = DAMAGED[case]
    put(tmp_path / "good")
    bad = put(tmp_path / "bad") / "results.json"
    content = {**json.loads(bad.read_text()), key: value}
    del content["checksum"]  # which would tell first
    text = json.dumps(content)
    bad.write_text(text.replace("Infinity", "1e999"))
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "convnet" in shown.out
    assert shown.err.startswith("left out: ") and shown.err.count("\n") == 1
    assert "\x1b" not in shown.err
    assert main(["report", str(bad.parent)]) == 2


def test_hundreds_are_read_quickly_and_without_torch(tmp_path: Path) -> None:
    for i in range(500):
        changes = {"settings": {"seed": i % 5, "defense.jump": i // 5}, "protocol": AUTOATTACK}
        put(tmp_path / str(i), i % 200, **changes)
    code = (
        "import sys, time;"
        f"from advbench.cli import main; main(['report', {str(tmp_path)!r}]);"
        "assert not {'torch', 'pyarrow', 'matplotlib'} & set(sys.modules);"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("convnet") == 100
    assert float(done.stdout.split()[-1]) < 3.0


def test_real_runs_are_averaged_over_their_seeds_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    quick = ["recipe=standard", "trainer.epochs=1", "threat.eps=0.1"]
    assert main(["train", "-m", "seed=1,2", *quick]) == 0
    trained = sorted(str(path) for path in Path("outputs/train").glob("digits-*"))
    attack = ["protocol=pgd", "protocol.steps=2", "n=40"]
    assert main(["eval", "-m", f"run={','.join(trained)}", *attack]) == 0
    own = ["eval", "model=m.py:build", "data=digits", "threat=linf_8", "threat.eps=0.1"]
    assert main([*own, *attack]) == 0
    found = groups(find([Path("outputs")]))
    (ours,) = (group for group in found if len(group.entries) == 2)
    (foreign,) = (group.first for group in found if group is not ours)
    assert (ours.seeds, ours.first.data, ours.first.threat_name) == ([1, 2], "digits", "linf 0.1")
    settings = ours.first.results.settings
    known = ("training.data", "training.threat", "optimizer.lr", "init_from", "data.augment.flip")
    assert [settings[key] for key in known] == ["digits", "linf 0.1", 0.1, None, False]
    assert [entry.training for entry in ours.entries] == list(map(Path, trained))
    assert (foreign.name("model"), foreign.seed, foreign.training) == ("m.py:build", None, None)
    capsys.readouterr()
    assert main(["report"]) == 0
    table = capsys.readouterr().out
    assert " ± " in table and "m.py:build" in table and table.count("digits test") == 1
    two = [str(entry.folder) for entry in ours.entries]
    assert main(["report", "--compare", *two]) == 0
    assert "on the same 40 images: digits test, linf 0.1, pgd 1" in capsys.readouterr().out
