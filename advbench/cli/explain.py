"""Other libraries' exceptions for a user's mistake, as one line that says what to type."""

from __future__ import annotations

import difflib
import io
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from advbench.config import GROUPS, INSIDE, options
from advbench.config.words import setting
from advbench.errors import UserError, causes, did_you_mean, reason_of
from advbench.files import no_room
from advbench.runs.directory import CONFIG

PLUGINS = {
    "hydra/launcher/joblib": "sweep",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "sweep",
}
"""Options that other packages bring, and the extra that installs them."""
WORDS = {
    "--quiet": ("quiet", "silent", "verbose"),
    "--version": ("version",),
    "hydra.run.dir": ("out", "output", "outdir", "out_dir", "output_dir", "save_dir", "log_path"),
    "trainer.accelerator": ("device", "cuda", "gpu", "cpu"),
    "trainer.batch_size": ("bs", "batch"),
    "protocol": ("attack", "attacks"),
    "recipe": ("attack", "attacks"),
    "backbone": ("arch", "architecture", "net"),
    "model": ("arch", "architecture", "net"),
    "weights": ("checkpoint", "ckpt", "resume_from", "state_dict"),
    "n": ("n_ex", "n_examples", "num_samples", "samples"),
}
"""Words of other tools for a key or an option, which spelling does not lead to."""


def of(problem: BaseException) -> str | None:
    """The line for a user's mistake; None for anything else, which is a bug of ours."""
    chain = causes(problem)
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, MissingConfigException):
            return _missing(link)
        if isinstance(link, OverrideParseException):
            return _no_setting(str(link.override))
        if isinstance(link, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(link)
        if isinstance(link, ValueError) and (message := _of_values(link)) is not None:
            return message
        if isinstance(link, ConfigCompositionException) and (group := _no_such_group(link)):
            return _of_the_other_verb(group)
    if (message := _of_the_machine(problem)) is not None:
        return message
    links = [link for link in chain if isinstance(link, HydraException | OmegaConfBaseException)]
    # The one that names the key, or else the innermost.
    specific = [link for link in links if "full_key:" in str(link)] or links[-1:]
    return _first_line(specific[0]) if specific else None


def _of_the_machine(problem: BaseException) -> str | None:
    """What the system refuses: room, memory, a file."""
    if (full := no_room(problem)) is not None:
        return str(full)
    for link in causes(problem):
        if isinstance(link, RecursionError):
            return "a value or a file is nested too deeply to be read"
        if isinstance(link, MemoryError) or "can't allocate memory" in str(link):
            reason = f" ({reason_of(link):.120})" if str(link) else ""
            return f"the memory is full{reason}: take a smaller batch size, n or model"
        if isinstance(link, UnicodeDecodeError):
            return f"{_being_read(link)} is not a text in UTF-8: {link.reason}"
        if isinstance(link, yaml.YAMLError):
            return f"not valid YAML: {reason_of(link)}"
        if isinstance(link, OSError) and link.filename is not None:
            return f"can't use '{link.filename}': {link.strerror}"
    return None


def _being_read(problem: BaseException) -> str:
    """The text file that was being read as it was raised: the error itself does not name it."""
    name, trace = "a file", problem.__traceback__
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, io.TextIOWrapper) and isinstance(value.name, str):
                name = f"'{value.name}'"
        trace = trace.tb_next
    return name


def _no_such_group(problem: ConfigCompositionException) -> str | None:
    """The group of ours that this subcommand does not have."""
    match = re.match(r"Could not override '(\w+)'\. No match in the defaults list", str(problem))
    return match[1] if match and match[1] in GROUPS else None


def _of_the_other_verb(group: str) -> str:
    if group == "protocol":
        return "a training has no protocol: give it to advbench eval"
    return f"eval takes its {group} from the run: leave {group}= out (experiments are for train)"


def _of_values(problem: ValueError) -> str | None:
    """What OmegaConf and Hydra leave to Python's own error."""
    if str(problem).startswith("Config group override"):
        return "that is not an option: give GROUP=NAME, or leave it out (see: advbench list)"
    trace = problem.__traceback__
    while trace is not None and str(problem).startswith("invalid literal for int()"):
        code = trace.tb_frame.f_code
        if code.co_name == "update" and "omegaconf" in code.co_filename:
            # The error itself names but the last part.
            parent, _, key = str(trace.tb_frame.f_locals["key"]).rpartition(".")
            return f"'{parent}' is a list, without a key '{key}': set it whole, {parent}=[...]"
        trace = trace.tb_next
    return None


def _no_setting(word: str) -> str:
    """Something on the command line that is not KEY=VALUE."""
    if word in (*GROUPS, "experiment"):
        return f"'{word}' is not KEY=VALUE: give {word}=NAME (see: advbench list {word})"
    if (instead := _of_a_file(word)) is not None:
        return f"'{word}' is not KEY=VALUE: {instead}"
    if "=" not in word.strip("="):
        return f"'{word}' is not KEY=VALUE, without spaces around the '='"
    if word.endswith(","):
        return f"'{word}' ends with a comma: write lists without spaces"
    return f"'{word}' is not KEY=VALUE; quote special characters: KEY='\"a=b\"'"


def _of_a_file(word: str) -> str | None:
    """What to type for a file or a run that was given by its name alone; None for other words."""
    path = Path(word)
    if (path / CONFIG).is_file():
        return f"a run is given with {setting('run', word)}"
    if not path.is_file():
        return None
    kinds = {
        ".py": f"a model of your own is given with {setting('model', f'{word}:FACTORY')}",
        ".npz": f"data of your own are given with data=npz {setting('data.path', word)}",
        ".pt": f"weights are given with {setting('weights', word)}",
        ".pth": f"weights are given with {setting('weights', word)}",
        ".safetensors": f"weights are given with {setting('weights', word)}",
        ".yaml": "a config of your own is NAME in DIR/GROUP/NAME.yaml: --config-dir DIR GROUP=NAME",
    }
    return kinds.get(path.suffix)


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if lines[0].startswith("Ambiguous value for argument"):
        return f"{lines[0]}: add -m to run each, or write a list as KEY=[a,b]"
    key = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), ""
    )
    hint = "; leave n out for all samples" if key == "n" else ""
    return f"{key}: {lines[0]}{hint}" if key else lines[0]


def _missing(problem: MissingConfigException) -> str:
    """No such option of a group, or no such group."""
    missing = problem.missing_cfg_file or ""
    if missing.startswith("hydra/sweeper/sampler/"):
        missing = "hydra/sweeper/optuna"  # which brings them
    group, _, name = missing.rpartition("/")
    if missing in PLUGINS:
        return f"{group}={name} needs a plugin: pip install 'advbench[{PLUGINS[missing]}]'"
    if group and problem.options:
        top, _, inner = group.partition("/")
        if top not in GROUPS:
            see = "" if top == "hydra" else f" (see: advbench list {top})"
            return f"no {group} '{name}'{did_you_mean(name, problem.options)}{see}"
        names = {*options(top), *(problem.options if not inner else ())}
        option = f"{inner}/{name}".lstrip("/")  # in a folder of the group, such as paper/hpm
        return f"no {top} '{option}'{did_you_mean(option, names)} (see: advbench list {top})"
    return _first_line(problem)


def _unknown_key(problem: OmegaConfBaseException) -> str:
    """A key that is not in the config."""
    # Hydra says the full key in its message; OmegaConf knows its parent.
    full = str(problem.full_key or problem.key)
    for group, inside in INSIDE.items():
        prefix, _, key = full.partition(f"{group}.{inside}.")
        if key and not prefix:
            return f"no key '{full}': give '{group}.{inside}={{NAME: {{{key}: VALUE}}}}'"
    if full in GROUPS:
        return _of_the_other_verb(full)
    parent = problem.parent_node
    keys = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
    prefix = full.rpartition(".")[0]
    if isinstance(parent, DictConfig) and not keys:
        if prefix in GROUPS:
            return f"no key '{full}': choose {prefix}=NAME first (see: advbench list {prefix})"
        return f"no key '{full}': add it with +{full}=VALUE"
    more = ""
    if prefix in GROUPS and keys and parent.get("_target_", "") is None:  # left to the run
        more = f" (a key that only the run's own {prefix} has: +{full}=VALUE)"
    valid = [f"{prefix}.{key}".lstrip(".") for key in keys if key not in ("_target_", "hydra")]
    hint = more or _translated(full, parent) or _elsewhere(full, parent)
    hint = hint or _near(full, valid, parent)
    return f"no key '{full}'{hint}"


def _translated(word: str, node: Any) -> str:
    """Ours for a word that other tools have."""
    root = node._get_root() if isinstance(node, DictConfig) else {}
    ours = [
        key
        for key, theirs in WORDS.items()
        if word in theirs and (key.startswith(("--", "hydra.")) or key.partition(".")[0] in root)
    ]
    return f"; did you mean '{ours[0]}'?" if ours else ""


def _elsewhere(full: str, node: Any) -> str:
    """Where a key is that was given in a wrong group, without one, or beside another option."""
    prefix, _, word = full.rpartition(".")
    if isinstance(node, DictConfig):
        leaves = _leaves(OmegaConf.to_container(node._get_root(), resolve=False))
        matches = [key for key in leaves if key.rpartition(".")[2] == word]
        if matches:
            return f"; did you mean {_either(matches)}?"
    group = prefix or "data"  # whose files are named most often
    if group not in GROUPS:
        return ""
    having = [
        f"{group}={o}" for o, file in options(group).items() if o != "run" and _has(file, word)
    ]
    return f"; {group}.{word} is a key of {_either(having)}" if 0 < len(having) <= 4 else ""


def _near(full: str, keys: list[str], node: Any) -> str:
    """The nearest key beside one that is not there, or else the nearest of all groups."""
    prefix, _, word = full.rpartition(".")
    beside = did_you_mean(word, [key.rpartition(".")[2] for key in keys])
    if "did you mean" in beside:
        return beside.replace("'", f"'{prefix}.", 1) if prefix else beside
    if isinstance(node, DictConfig):
        leaves = _leaves(OmegaConf.to_container(node._get_root(), resolve=False))
        last = {leaf.rpartition(".")[2]: leaf for leaf in leaves}
        if near := difflib.get_close_matches(word, last, n=1, cutoff=0.8):
            return f"; did you mean '{last[near[0]]}'?"
    return beside


def _leaves(node: Any, prefix: str = "") -> list[str]:
    """The full keys of all values in a config, but for Hydra's own."""
    if not isinstance(node, dict):
        return [prefix]
    parts = [(f"{prefix}.{key}".lstrip("."), value) for key, value in node.items()]
    return [leaf for key, value in parts if key != "hydra" for leaf in _leaves(value, key)]


def _has(file: Any, key: str) -> bool:
    """Whether a shipped option has a key."""
    return re.search(rf"(?m)^{re.escape(key)}:", file.read_text(encoding="utf-8")) is not None


def _either(names: list[str]) -> str:
    """Such as 'a', or 'a' or 'b'."""
    return " or ".join(f"'{name}'" for name in names)
