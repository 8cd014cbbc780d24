"""What the system refuses, in the middle of any command: one line, and nothing is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from advbench.cli import explain
from advbench.cli.main import main
from advbench.console import Screen
from advbench.errors import UserError
from advbench.files import write_atomic, write_text
from advbench.runs.results import Results

TRAIN = ["train", "trainer.epochs=1", "recipe.steps=1", "trainer.val_steps=1"]
EVAL = ["eval", "protocol=pgd", "protocol.steps=2", "n=40"]


@contextmanager
def files_up_to(most: int) -> Iterator[None]:
    """No file of this process may grow larger, as on a full disk. (Python ignores SIGXFSZ.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(text: str) -> str:
    """The line that a command said on the standard error."""
    assert text.startswith("advbench: ") and text.count("\n") == 1, text
    return text


@pytest.fixture
def whole(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """A directory with a training and its evaluation that nothing disturbed."""

    def make() -> None:
        assert main([*TRAIN, "hydra.run.dir=run"]) == 0
        assert main([*EVAL, "run=run", "hydra.run.dir=result"]) == 0

    return start_in("machine", make)


@pytest.mark.parametrize("most", [0, 3_000, 20_000, 60_000])
def test_a_training_survives_a_full_disk(
    most: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"hydra.run.dir={tmp_path / 'run'}"
    with files_up_to(most):
        assert main([*TRAIN, where]) == 2
    said = one_line(capsys.readouterr().err)
    assert "no room for '" in said and "free there" in said and os.strerror(errno.EFBIG) in said
    assert main([*TRAIN, where]) == 0
    weights = [(home / "run/model.safetensors").read_bytes() for home in (whole, tmp_path)]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "run").glob(".*tmp*"))


@pytest.mark.parametrize("most", [0, 500, 3_000])
def test_an_evaluation_survives_a_full_disk(
    most: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*EVAL, "run=run", f"hydra.run.dir={tmp_path / 'result'}"]
    with files_up_to(most):
        assert main(command) == 2
    assert "no room for '" in one_line(capsys.readouterr().err)
    assert main(command) == 0
    one, other = (Results.load(home / "result/results.json") for home in (whole, tmp_path))
    assert (one.robust, one.clean) == (other.robust, other.clean)
    samples = [(home / "result/samples.parquet").read_bytes() for home in (whole, tmp_path)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    "command",
    [
        ["report", ".", "--html", "page.html"],
        ["report", ".", "--out", "table.csv"],
        ["report", ".", "--plots", "figures"],
        ["copy", "backbone/resnet18", "own"],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:3]),
)
def test_other_commands_on_a_full_disk(
    command: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with files_up_to(10):
        assert main(command) == 2
    assert "no room for '" in one_line(capsys.readouterr().err)


def test_a_small_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing, where mounting is allowed: a disk of 100 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        assert main([*TRAIN, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    said = one_line(capsys.readouterr().err)
    assert f"no room for '{tmp_path}/run/" in said and os.strerror(errno.ENOSPC) in said


def test_the_log_never_raises(tmp_path: Path) -> None:
    screen = Screen(quiet=True)
    screen.log = tmp_path / "log.txt"
    with files_up_to(0):
        screen.line("one")
        screen.failed("two")
    screen.log = tmp_path / "none" / "log.txt"
    screen.note("three")
    assert (tmp_path / "log.txt").read_text() == ""


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = tmp_path / "weights.safetensors"
        write_atomic(path, lambda temporary: save_file({"a": torch.ones(1)}, temporary))
        write_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_nothing_is_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run/log.txt").symlink_to(tmp_path / "mine")
    assert main([*TRAIN, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "log.txt' is a symbolic link" in one_line(capsys.readouterr().err)
    assert (tmp_path / "mine").read_text() == "precious"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]


@contextmanager
def stdout_is(place: str) -> Iterator[None]:
    """The standard output is closed, on a full disk, or a pipe whose reader has gone."""
    before = sys.stdout
    if place == "a pipe":
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
    else:
        sys.stdout = None if place == "closed" else open(place, "w")  # noqa: SIM115
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.close()
        sys.stdout = before


@pytest.mark.parametrize("place", ["a pipe", "closed", "/dev/full"])
def test_an_evaluation_outlasts_its_reader(
    place: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with stdout_is(place):
        assert main([*EVAL, "run=run", f"hydra.run.dir={tmp_path}"]) == 0
    said = capsys.readouterr().err
    if place == "/dev/full":
        assert "can't print any more" in one_line(said)
    else:
        assert not said
    assert "results: " in (tmp_path / "log.txt").read_text()
    assert Results.load(tmp_path / "results.json").stages


def test_a_list_without_a_reader(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for place, status in (("a pipe", 141), ("closed", 0), ("/dev/full", 2)):
        with stdout_is(place):
            assert main(["list", "runs", "."]) == status
        said = capsys.readouterr().err
        assert ("no room for what is printed" in said) == (place == "/dev/full")
    with stdout_is("a pipe"):
        assert main(["--version"]) == 141


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (OSError(errno.EDQUOT, "x", "a/b"), "no room for 'a/b'"),
        (RuntimeError("I/O error: x (os error 28)"), "no room for"),
        (MemoryError(), "the memory is full: take a smaller"),
        (RecursionError(), "nested too deeply"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "can't use 'x': Permission d"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "can't use 'x': Is a directory"),
    ],
)
def test_what_the_system_says(problem: Exception, expected: str) -> None:
    try:
        try:
            raise problem
        except Exception as inner:
            raise RuntimeError("a library's own words") from inner
    except RuntimeError as outer:
        assert expected in (explain.of(outer) or "")
    assert explain.of(RuntimeError("a bug of ours")) is None
    assert explain.of(OSError("no number")) is None


def test_a_text_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "backbone").mkdir()
    own = tmp_path / "backbone/own.yaml"
    for content, expected in (
        (b"# \xe9t\xe9", f"'{own}' is not a text in UTF-8"),
        (b"a: [1,\nb: }", "not valid YAML"),
        (b"- 1\n", "not a component"),
        (b"", "no backbone is chosen"),
    ):
        own.write_bytes(content)
        assert main(["train", "--config-dir", str(tmp_path), "backbone=own"]) == 2
        assert expected in one_line(capsys.readouterr().err)


def test_no_room_is_a_mistake_that_the_user_mends(tmp_path: Path) -> None:
    with files_up_to(3), pytest.raises(UserError, match=r"no room for '.*text' .* free there"):
        write_text(tmp_path / "text", "longer")
    assert not list(tmp_path.iterdir())
