"""What advbench tells people to type means what it is to mean, for Hydra and for the shell."""

from __future__ import annotations

import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser

from advbench.config.words import command, word

HARD = [
    "outputs/train/r-s0-0a1b2c3d", "seed=1,recipe=standard", "a b", "it's", 'say "a"', "end\\",
    'back\\"slash', "[x]", "{a: 1}", "a,b", "range(3)", "é/ü", "~/x", "-x", "1", "1e3", ".5", ".",
    "..", "null", "true", "inf", "", "a#b", "a\tb", "$HOME", "*", "a:b", "m.py:build",
]  # fmt: skip


def test_hydra_reads_what_was_meant() -> None:
    parser = OverridesParser.create()
    values = [*HARD, HARD, {"a": {"b": HARD}}, 3, 0.5, 1e-9, -2, True, False, None, []]
    assert len(values) >= 35
    for value in values:
        (typed,) = shlex.split(word("group.key", value))
        read = parser.parse_override(typed)
        assert read.key_or_group == "group.key" and not read.is_sweep_override()
        assert plain(read.value()) == value, word


def plain(value: object) -> object:
    """A value without the quotes that Hydra remembers."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return getattr(value, "text", value)


def test_a_command_says_what_there_is_to_say() -> None:
    said = {"run": "a b", "weights": None, "plugins": [], "n": 0}
    assert command("eval", said) == "advbench eval 'run=\"a b\"' n=0"
