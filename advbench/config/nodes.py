"""Group nodes: reading them, inheriting them from a run, and spelling out what is inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from advbench.config.library import shipped
from advbench.config.schema import FROM_THE_RUN, GROUPS, INSIDE
from advbench.errors import UserError, describe, did_you_mean

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C is ten times as fast."""

LARGEST, DEEPEST = 2**20, 50
"""Bytes, and levels, that no config has."""


def spelled_out(node: Any, group: str = "defense") -> Any:
    """The node of a defense or a recipe, with what is inside it as nodes in place of names.

    Args:
        node: a member of a chain, or what a recipe is ``of``, is NAME, {NAME: {KEY: VALUE}} or a
            node.
        group: ``defense`` or ``recipe``.

    Raises:
        UserError: for a member that is none of these.
    """
    key = INSIDE[group]
    if node is None or node.get(key) is None:
        return node
    value = plain(node)[key]
    if group == "recipe":
        return OmegaConf.create({**plain(node), key: _named(value, group)})
    if not isinstance(value, list):
        raise UserError(f"defense.members={value} is not a list: give defense.members=[sparta,hpm]")
    return OmegaConf.create({**plain(node), key: [_named(member, group) for member in value]})


def _named(choice: Any, group: str) -> Any:
    """The node of a component inside another of its group."""
    if isinstance(choice, dict) and "_target_" in choice:
        return spelled_out(OmegaConf.create(choice), group)
    if isinstance(choice, str):
        choice = {choice: {}}
    if not (isinstance(choice, dict) and [type(v) for v in choice.values()] == [dict]):
        raise UserError(
            f"{group}.{INSIDE[group]}: {choice!r} is no {group}: give NAME or {{NAME: {{KEY: 1}}}}"
        )
    ((name, values),) = choice.items()
    node = _option(group, str(name))
    for key, value in values.items():
        if key not in node:
            raise UserError(f"no key '{group}.{key}'{did_you_mean(key, node)}")
        node[key] = value
    return spelled_out(node, group)


def _option(group: str, name: str) -> DictConfig:
    """The node of an option as Hydra finds it: the user's own before a shipped one.

    Raises UserError if there is none, and for one that is composed of others.
    """
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    for source in sources:
        file = Path(source.path, group, f"{name}.yaml")
        if source.schema == "file" and file.is_file():
            node = read(file)
            if "defaults" in node:
                raise UserError(
                    f"{file} has a defaults list, which is not followed inside {group}."
                    f"{INSIDE[group]}: write its values out"
                )
            return node
    return shipped(group, name)


def inherit(node: Any, trained: DictConfig | None, group: str) -> Any:
    """The node, or where it is left to the run, the run's with the values that were given.

    Args:
        node: of the evaluation; one without a ``_target_`` is left to the run.
        trained: the config of the training run; None for a model of the user's own.
        group: ``data``, ``defense`` or ``threat``.

    Raises:
        UserError: for a key that the run's component does not have, and where nothing is chosen.
    """
    if node is not None and node.get("_target_") is not None:
        return node
    overrides = {} if node is None else plain(node)
    if trained is None and not {"norm", "eps"} - {k for k, v in overrides.items() if v is not None}:
        trained = OmegaConf.create({group: shipped(group, "linf_8")})  # a threat in full
    if trained is None:
        raise UserError(f"a model of your own needs its {group}: give {FROM_THE_RUN[group]}")
    merged = OmegaConf.create(plain(trained[group]))
    if "download" in merged:  # a run that came from elsewhere does not decide this
        merged.download = False
    if overrides.get("norm") not in (None, merged.get("norm")) and overrides.get("eps") is None:
        raise UserError(
            f"threat.norm={overrides['norm']} needs a budget: give threat.eps=... as well"
        )
    for key, value in overrides.items():
        if value is None:
            continue
        takers = [member for member in merged.get("members") or () if key in member]
        if takers:  # a chain: whoever has such a value
            for member in takers:
                member[key] = value
            continue
        if key not in merged:
            keys = ", ".join(str(k) for k in merged if k != "_target_") or "it has none"
            raise UserError(f"{group}.{key} is not a key of the run's {group} ({keys})")
        merged[key] = value
    return merged


def plain(cfg: Any) -> dict[str, Any]:
    """``cfg`` as nested dicts and lists, interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def text_of(path: Path) -> str:
    """The text of a run's YAML file, which can be read without running out of time or memory.

    Raises:
        UserError: if it can't be read, is larger or nested deeper than any config, or repeats parts
            of itself by aliases, which can unfold without end.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path} is refused: no config is larger than {LARGEST} bytes")
        depth = 0
        for event in yaml.parse(content, Loader=LOADER):
            if getattr(event, "anchor", None) is not None:
                raise UserError(f"{path} is refused: a run's config has no aliases (&, *)")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UserError(f"{path} is refused: it is nested deeper than {DEEPEST} levels")
        return content.decode("utf-8")
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise UserError(f"{path} can't be read: {describe(problem)}") from problem


def read(path: Path) -> DictConfig:
    """Read the YAML file at ``path``, of a run, which is resolved.

    Raises:
        UserError: for what ``text_of`` refuses, for what is not a mapping with mappings for its
            groups, and for interpolations: a downloaded one could read the environment.
    """
    text = text_of(path)
    try:
        cfg = OmegaConf.create(text)
    except Exception as problem:
        raise UserError(f"{path} can't be read: {describe(problem)}") from problem
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is not a config")
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    if "${" in str(values):
        raise UserError(f"{path} is refused: a run's config has no interpolations (${{...}})")
    for group in (*GROUPS, "choices"):
        if not isinstance(node := values.get(group), dict | None):
            raise UserError(f"{path} is refused: its {group} is {node!r:.50}, not a component")
    return cfg
