"""The documentation: every command is run, every quoted error is provoked, every link leads on.

A page is run from top to bottom in a directory of its own. The words after a fence's language:

    {file=NAME}   the block is a file that the page tells to write
    {fails}       the command is a mistake: exit code 2, and the ``text`` block below is its words
    {short}       run with two epochs, a tenth of 60 images, and two seconds instead of a minute
    {needs=WHAT}  needs hardware or a network: its commands are composed and not run
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from processes import Process, script

from advbench.cli.main import main
from advbench.runs.results import MEASURES
from advbench.training import trainer

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "index": 3,
    "tutorial": 12,
    "your-own-model": 7,
    "liars": 2,
    "verdict": 5,
    "python": 2,
    "structure": 1,
    "adding": 9,
    "reading-a-result": 6,
    "reproducing-a-paper": 13,
    "troubleshooting": 12,
    "how-it-attacks": 5,
    "../README": 34,
}
"""How many commands each page has; those of its ``text`` blocks are no commands."""

BENCHMARK = re.compile(r"benchmarks/\w+\.md")
FENCE = re.compile(r"^```(\w+)(?: \{([^}]*)\})?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    mark: str
    text: str

    def commands(self) -> list[list[str]]:
        """The words of each command, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [Block(*(part or "" for part in found)) for found in FENCE.findall(text)]


@pytest.fixture
def page_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for a page; the modules that it made are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run(words: list[str]) -> int:
    if words[0] == "advbench":
        try:
            return main(words[1:])
        except SystemExit as end:  # of --help
            return int(end.code or 0)
    assert words[0] == "python", f"no test knows how to run '{words[0]}'"
    if words[1] == "-m":
        return subprocess.run([sys.executable, *words[1:]], check=False).returncode
    process = Process(script, words[1], words[2:], folder=Path.cwd())
    return process.wait()


def composes(words: list[str]) -> bool:
    """Whether the settings of a command that can't be run here are ones that there are."""
    if words[0] != "advbench":
        return words[0] in ("pip", "bash")
    if words[1] not in ("train", "eval"):
        return run([*words, "--help"]) == 0
    if "-m" in words:  # of a sweep its first job, here
        words = [
            word if "[" in word else word.split(",")[0]
            for word in words
            if word != "-m" and not word.startswith("hydra/launcher=")
        ]
    return run([*words, "--cfg", "job"]) == 0


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_true(page: str, page_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = blocks(page)
    for block in everything:
        if block.mark.startswith("file="):
            file = Path(block.mark.removeprefix("file="))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
    seen = 0
    for block, below in zip(everything, [*everything[1:], None], strict=True):
        if block.language != "bash":
            continue
        for words in block.commands():
            seen += 1
            capsys.readouterr()
            said = " ".join(words)
            if block.mark.startswith("needs="):
                assert composes(words), said
            elif block.mark == "fails":
                assert run(words) == 2, said
                assert below is not None and below.language == "text"
                assert capsys.readouterr().err == below.text, said
            else:
                assert block.mark in ("", "short"), f"{page}: unknown mark {block.mark}"
                if block.mark == "short":
                    words = [word.replace("1min", "2s").replace("n=60", "n=6") for word in words]
                    words += ["trainer.epochs=2", "recipe.steps=1"] * (words[1] == "train")
                assert run(words) == 0, f"{said}\n{capsys.readouterr().err}"
    assert seen == PAGES[page]
    if page == "tutorial":
        results = json.loads(Path("outputs/eval/first-aa/results.json").read_text())
        assert results["missing"] == []


def test_errors_that_no_command_of_the_page_provokes(
    page_place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: None,
) -> None:
    everything = blocks("troubleshooting")
    before = [None, *everything]
    quoted = [
        block.text
        for block, above in zip(everything, before, strict=False)
        if block.language == "text" and (above is None or above.mark != "fails")
    ]
    command = ["train", "recipe=standard", "trainer.epochs=1", "hydra.run.dir=good"]
    Path("good").mkdir()
    with FileLock("good/.lock"):
        assert main(command) == 2
    said = [capsys.readouterr().err]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Fit, "run", Mock(side_effect=torch.OutOfMemoryError))
        assert main(command) == 2
    said.append(capsys.readouterr().err)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = ["model=robustbench:cifar10/Linf/Carmon2019Unlabeled", "data=digits"]
    assert main(["eval", *model]) == 2
    said.append(capsys.readouterr().err)
    assert said == quoted


def test_every_page_is_tried() -> None:
    """Of the pages about machines that are not here, the launchers' tests run the commands."""
    elsewhere = {"running-on-slurm-and-ray"}
    assert {path.stem for path in DOCS.glob("*.md")} == {*PAGES, *elsewhere} - {"../README"}
    assert sum(PAGES.values()) > 45
    fences = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in fences} == {"bash", "python", "text", "yaml"}
    for block in fences:  # what is code is a file that a command uses
        assert block.language in ("bash", "text") or block.mark.startswith("file=")


def test_the_command_of_every_config_composes(
    page_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = 0
    for file in sorted((DOCS.parent / "configs").rglob("*.yaml")):
        command = re.search(r"^# (advbench (?:train|eval).*)$", file.read_text("utf-8"), re.M)
        assert command is not None, f"{file} names no command"
        assert composes(shlex.split(command[1])), f"{file.name}: {command[1]}"
        seen += 1
    assert seen > 80


def test_every_config_names_its_cost_and_the_number_to_expect() -> None:
    """A percentage in a header is one of the benchmark that the header names."""
    seen = quoted = 0
    for file in sorted((DOCS.parent / "configs").rglob("*.yaml")):
        if file.parent.name == "hydra":
            continue
        head = re.match(r"(?:#.*\n)*", file.read_text("utf-8"))
        assert head is not None
        text = head[0].replace("\n#", "")
        assert " Cost: " in text, file.name
        _, found, expected = text.partition(" Expect: ")
        assert found, file.name
        recorded = [Path(DOCS.parent, name).read_text("utf-8") for name in BENCHMARK.findall(text)]
        for number in re.findall(r"(\d+\.\d) %", expected):
            assert any(re.search(rf"(?<![\d.]){number}\b", page) for page in recorded), file.name
            quoted += 1
        seen += 1
    assert seen > 80 and quoted > 50


def test_links_lead_somewhere() -> None:
    links = 0
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                links += 1
    assert links >= 20


def test_every_key_of_a_result_is_explained(
    page_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "reading-a-result.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([\w./]+)` \|", text, re.M)
    command = ["train", "recipe=standard", "trainer.epochs=1", "hydra.run.dir=t"]
    assert main(command) == 0
    assert main(["eval", "run=t", "protocol=fgsm", "n=10", "hydra.run.dir=e"]) == 0
    keys = set(json.loads(Path("e/results.json").read_text()))
    assert len(keys) >= 13 and keys <= set(explained), keys - set(explained)
    assert set(MEASURES) <= set(explained)
    files = {path.name for path in Path("e").iterdir()} - {".lock"}
    assert files <= set(explained), files - set(explained)


def test_what_is_said_about_intervals() -> None:
    """'About 20 points wide with n = 100, about 2 with n = 10000.'"""
    from advbench.runs.accuracy import wilson

    for n, width in ((100, 0.2), (10_000, 0.02)):
        low, high = wilson(n // 2, n)
        assert high - low == pytest.approx(width, rel=0.1)
