"""Other libraries' exceptions for a user's mistake, as one line that says what to type."""

from __future__ import annotations

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from advbench.config import INSIDE
from advbench.errors import UserError, did_you_mean

PLUGINS = {
    "hydra/launcher/joblib": "sweep",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "sweep",
}
"""Options that other packages bring, and the extra that installs them."""


def of(problem: BaseException) -> str | None:
    """The line for a user's mistake; None for anything else, which is a bug of ours."""
    chain = list(_chain(problem))
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, MissingConfigException):
            return _missing(link)
        if isinstance(link, OverrideParseException):
            return f"'{link.override}' is not KEY=VALUE; quote special characters: KEY='\"a=b\"'"
        if isinstance(link, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(link)
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"can't use '{problem.filename}': {problem.strerror}"
    known = [link for link in chain if isinstance(link, HydraException | OmegaConfBaseException)]
    # The one that names the key, or else the innermost.
    told = [link for link in known if "full_key:" in str(link)] or known[-1:]
    return _first_line(told[0]) if told else None


def _chain(problem: BaseException | None) -> list[BaseException]:
    """The exception and what caused it, outermost first."""
    links: list[BaseException] = []
    while problem is not None and problem not in links:
        links.append(problem)
        problem = problem.__cause__ or problem.__context__
    return links


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    key = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), ""
    )
    return f"{key}: {lines[0]}" if key else lines[0]


def _missing(problem: MissingConfigException) -> str:
    """No such option of a group, or no such group."""
    missing = problem.missing_cfg_file or ""
    if missing.startswith("hydra/sweeper/sampler/"):
        missing = "hydra/sweeper/optuna"  # which brings them
    group, _, name = missing.rpartition("/")
    if missing in PLUGINS:
        return f"{group}={name} needs a plugin: pip install 'advbench[{PLUGINS[missing]}]'"
    if group and problem.options:
        return (
            f"no {group} '{name}'{did_you_mean(name, problem.options)} (see: advbench list {group})"
        )
    return _first_line(problem)


def _unknown_key(problem: OmegaConfBaseException) -> str:
    """A key that is not in the config."""
    # Hydra says the full key in its message; OmegaConf knows its parent.
    full = str(problem.full_key or problem.key)
    for group, inside in INSIDE.items():
        prefix, _, key = full.partition(f"{group}.{inside}.")
        if key and not prefix:
            return f"no key '{full}': give '{group}.{inside}={{NAME: {{{key}: VALUE}}}}'"
    parent = problem.parent_node
    keys = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
    prefix = full.rpartition(".")[0]
    known = [f"{prefix}.{key}".lstrip(".") for key in keys if key not in ("_target_", "hydra")]
    return f"no key '{full}'{did_you_mean(full, known)}"
