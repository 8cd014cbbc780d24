"""``--help`` names what the subcommand takes, and nothing that it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from advbench import config
from advbench.cli import keys_help, main


def offered(text: str) -> dict[str, list[str]]:
    """The options of each group in a text."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, rest = line[: keys_help.COLUMN].strip(), line[keys_help.COLUMN :]
        if name:
            found[name.removesuffix("=NAME")] = []
        else:
            found[list(found)[-1]] += [word.strip(",") for word in rest.split()]
    return found


@pytest.mark.parametrize("subcommand", config.SCHEMAS)
def test_every_key_has_one_line(subcommand: str) -> None:
    keys = [field.name for field in dataclasses.fields(config.SCHEMAS[subcommand])]
    lines = keys_help.documented(config.SCHEMAS[subcommand])
    assert list(lines) == keys
    assert all(line.endswith(".") and len(line) < 82 for line in lines.values())
    extra = {"experiment"} if subcommand == "train" else set()
    assert offered(keys_help.text(subcommand)).keys() == {*keys, *extra}


def test_options_of_the_other_subcommand_are_not_offered() -> None:
    train, evaluation = offered(keys_help.text("train")), offered(keys_help.text("eval"))
    assert (train["trainer"], evaluation["trainer"]) == (["default"], ["evaluation"])
    for group in ("data", "defense", "threat"):
        assert {*evaluation[group]} == {*train[group], "run"} == {*config.options(group), "run"}
    assert "paper/hpm" in evaluation["protocol"] and "csv" in train["logger"]


def test_options_of_your_own_are_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("trainer/mine.yaml", "experiment/theirs.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("# @package _global_\nseed: 7\n")
    with pytest.raises(SystemExit) as done:  # Hydra's way
        main(["eval", "--config-dir", str(tmp_path), "--help", "seed=3"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "evaluation, mine\n" in shown and "\nexperiment=NAME" in shown
    assert "theirs" in shown and "hpm_quick" not in shown and "\nseed: 3\n" in shown
    assert not [word for word in ("recipe=", "backbone=", "optimizer=") if word in shown]
