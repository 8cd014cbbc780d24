"""Configs: the schema of each command, and ``build``, which makes objects out of group nodes.

A group node names its component with ``_target_``; the other keys are the component's parameters,
checked against its signature. A target must be defined in the group's own package (or in a file
that the user named on the command line), so a config that comes with a run cannot run other code.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from advbench.errors import UserError, did_you_mean

GROUPS = {
    "data": "advbench.data.",
    "backbone": "advbench.backbones.",
    "defense": "advbench.defenses.",
    "recipe": "advbench.recipes.",
    "optimizer": "advbench.training.optimizers.",
    "threat": "advbench.attacks.threat.",
    "protocol": (
        "advbench.evaluation.protocol.",
        "advbench.evaluation.adaptive.",
        "advbench.evaluation.paper.",
    ),
    "trainer": ("advbench.training.trainer.", "advbench.evaluation.resources."),
    "logger": "advbench.training.loggers.",
}
"""Where each group's components are defined."""

INSIDE = {"defense": "members", "recipe": "of"}
"""The parameter by which a component holds others of its group: the chain's, and awp's."""

FROM_THE_RUN = {
    "data": "data=npz data.path=FILE.npz",
    "threat": "threat=linf_8, or threat.norm=l2 threat.eps=0.5",
}
"""Groups that ``eval`` takes from the run that it evaluates, and what to say without one."""


@dataclass
class TrainConfig:
    """Top level of ``advbench train``.

    seed: of everything random in the training.  init_from: a run whose weights to start from.
    resume: an interrupted run to go on with.  plugins: files of the user's own components.
    """

    seed: int = 0
    init_from: str | None = None
    resume: str | None = None
    plugins: list[str] = field(default_factory=list)
    data: Any = None
    backbone: Any = None
    defense: Any = None
    recipe: Any = None
    optimizer: Any = None
    threat: Any = None
    trainer: Any = None
    logger: Any = None


@dataclass
class EvalConfig:
    """Top level of ``advbench eval``.

    run: a training run; the newest finished one if neither ``run`` nor ``model`` is given.
    model: FILE.py:FACTORY of the user's own, with its ``weights``.  n: size of the subset of the
    test split.  adversarial: keep the adversarial images.  strict: exit with code 3 if the verdict
    is unreliable, or none was computed.  transfer: runs whose images may break the model too.
    traits: what an attacker must know of a ``model`` of the user's own.  resume: an interrupted
    evaluation to go on with.  budget: stop after that time, such as 10min, and go on when the
    command is repeated.
    """

    seed: int = 0
    run: str | None = None
    model: str | None = None
    weights: str | None = None
    n: int | None = None
    adversarial: bool = False
    strict: bool = False
    budget: str | None = None
    resume: str | None = None
    transfer: list[str] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    traits: Any = None
    data: Any = None
    defense: Any = None
    threat: Any = None
    protocol: Any = None
    trainer: Any = None


SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}
"""The top level of each verb."""


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    for verb, schema in SCHEMAS.items():
        store.store(name=f"{verb}_schema", node=schema)


def load_plugins(paths: Iterable[str]) -> tuple[str, ...]:
    """Import the user's own files; returns the module prefixes that ``build`` may use for them."""
    prefixes = []
    for path in paths:
        import_file(path)
        prefixes.append(f"{Path(path).stem}.")
    return tuple(prefixes)


def import_file(path: str) -> types.ModuleType:
    """Import a Python file by its path. Raises UserError if it is missing or does not import."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no file '{path}'")
    if file.stem in sys.modules and getattr(sys.modules[file.stem], "__file__", None) != str(
        file.resolve()
    ):
        raise UserError(f"'{path}' has the name of a module that is in use: rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    if str(file.resolve().parent) not in sys.path:  # it may import its neighbours
        sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        del sys.modules[file.stem]
        raise UserError(f"'{path}' does not import: {describe(problem)}") from problem
    return module


def describe(problem: BaseException) -> str:
    """An exception of somebody else's code in one line."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def target_of(node: Any, group: str, plugins: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The component that a group node names. Raises UserError if it may not be used."""
    if node is not None and not isinstance(node, Mapping | DictConfig):
        raise UserError(f"{group} is {node!r}, not a component: choose one with {group}=NAME")
    name = None if node is None else node.get("_target_")
    if not name:
        raise UserError(f"no {group} is chosen: give {group}=NAME (see: advbench list {group})")
    home = GROUPS[group]
    allowed = (home if isinstance(home, tuple) else (home,)) + plugins
    module_name, _, attribute = name.rpartition(".")
    if not f"{name}".startswith(allowed):
        raise UserError(
            f"{group} may not be '{name}': components of this group live in "
            f"{', '.join(p.rstrip('.') for p in allowed)}; "
            "a file of your own is named with plugins=[FILE.py]"
        )
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        raise UserError(f"{group}: there is no '{name}'") from None
    # What a module has merely imported is not its component.
    if not callable(target) or getattr(target, "__module__", None) != module_name:
        raise UserError(f"{group}: '{name}' is not a component")
    return target


def _schema(target: Callable[..., Any], given: Iterable[str]) -> type:
    """A dataclass with the target's parameters, less those that are given."""
    factories = {}
    if inspect.isclass(target) and dataclasses.is_dataclass(target):
        hints = typing.get_type_hints(target)
        for f in dataclasses.fields(target):
            if f.default_factory is not dataclasses.MISSING:
                factories[f.name] = f.default_factory
    else:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    required, optional = [], []
    for name, parameter in inspect.signature(target).parameters.items():
        if name in given:
            continue
        hint = _checkable(hints.get(name, Any))
        if name in factories:
            optional.append((name, hint, field(default_factory=factories[name])))
        elif parameter.default is inspect.Parameter.empty:
            required.append((name, hint))
        elif dataclasses.is_dataclass(parameter.default) or isinstance(
            parameter.default, list | dict
        ):
            default = parameter.default
            optional.append((name, hint, field(default_factory=lambda default=default: default)))
        else:
            optional.append((name, hint, parameter.default))
    return make_dataclass("Schema", required + optional)


def _checkable(hint: Any) -> Any:
    """The hint as OmegaConf can check it; a whole number will do where a float is one choice."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if any(typing.get_origin(a) is not None for a in arguments) and len(arguments) > 2:
            return Any
        if any(dataclasses.is_dataclass(a) for a in arguments):
            return Any
        choices = [argument for argument in arguments if argument is not type(None)]
        if float in choices and int not in choices and len(choices) > 1:
            return typing.Union[(int, *arguments)]
        return hint
    if origin in (list, dict) or hint in (int, float, str, bool) or dataclasses.is_dataclass(hint):
        return hint
    return Any


def build(node: Any, group: str, *, plugins: tuple[str, ...] = (), **given: Any) -> Any:
    """The component that a group node describes.

    node: ``_target_`` and parameters.  plugins: prefixes from ``load_plugins``.  given: parameters
    that the caller supplies. Raises UserError for a target that may not be used, a misspelt key, a
    wrong type and a missing value; the component may raise it for a value out of range.
    """
    target = target_of(node, group, plugins)
    values = {key: value for key, value in plain(node).items() if key != "_target_"}
    return target(**checked(target, values, group, given), **given)


def checked(
    target: Callable[..., Any], values: Mapping[str, Any], where: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Values for all parameters of ``target`` but those that are ``given`` elsewhere.

    where: the group, for messages. Raises UserError for a misspelt key, a wrong type and a missing
    value.
    """
    parameters = _schema(target, given)
    schema = OmegaConf.structured(parameters)
    known = [f.name for f in dataclasses.fields(parameters)]
    for key, value in values.items():
        if key in given:
            continue
        if key not in known:
            raise UserError(f"no key '{where}.{key}'{did_you_mean(key, known)}")
        try:
            OmegaConf.update(schema, key, value)
        except OmegaConfBaseException as problem:
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
            named = [line.split(": ")[1] for line in lines if line.startswith("full_key: ")]
            place = ".".join([where, *(named or [key])[:1]])
            raise UserError(f"{place}: {lines[0].rstrip('.')}") from problem
    for key in known:
        if OmegaConf.is_missing(schema, key):
            raise UserError(f"{where}.{key} has no value: give {where}.{key}=...")
    arguments = OmegaConf.to_container(schema)
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items()}


def build_defense(node: Any, plugins: tuple[str, ...] = ()) -> Any:
    """The defense of a node; a chain's members are nodes themselves."""
    members = None if node is None else node.get("members")
    if members is None:
        return build(node, "defense", plugins=plugins)
    built = tuple(build_defense(member, plugins) for member in members)
    return build(node, "defense", plugins=plugins, members=built)


def build_recipe(
    node: Any, plugins: tuple[str, ...] = (), *, threat: Any, teachers: Mapping[str, Any]
) -> Any:
    """The recipe of a node; what it is ``of`` is a node itself.

    threat: of both.  teachers: given to the one that has parameters of these names.
    """
    given = {} if node is None else {key: teachers[key] for key in teachers if key in node}
    if node is not None and node.get("of") is not None:
        given["of"] = build_recipe(node.of, plugins, threat=threat, teachers=teachers)
    return build(node, "recipe", plugins=plugins, threat=threat, **given)


def spelled_out(node: Any, group: str = "defense") -> Any:
    """The node of a defense or a recipe, with what is inside it as nodes in place of names.

    A member of a chain, or what a recipe is ``of``, is NAME, {NAME: {KEY: VALUE}} or a node.
    Raises UserError for what is neither.
    """
    key = INSIDE[group]
    if node is None or node.get(key) is None:
        return node
    given = plain(node)[key]
    if group == "recipe":
        return OmegaConf.create({**plain(node), key: _named(given, group)})
    if not isinstance(given, list):
        raise UserError(f"defense.members={given} is not a list: give defense.members=[sparta,hpm]")
    return OmegaConf.create({**plain(node), key: [_named(member, group) for member in given]})


def _named(given: Any, group: str) -> Any:
    """The node of a component inside another of its group."""
    if isinstance(given, dict) and "_target_" in given:
        return spelled_out(OmegaConf.create(given), group)
    if isinstance(given, str):
        given = {given: {}}
    if not (isinstance(given, dict) and [type(v) for v in given.values()] == [dict]):
        raise UserError(
            f"{group}.{INSIDE[group]}: {given!r} is no {group}: give NAME or {{NAME: {{KEY: 1}}}}"
        )
    ((name, values),) = given.items()
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
    """The node, or where it is left to the run, the run's with the values that were given."""
    if node is not None and node.get("_target_") is not None:
        return node
    given = {} if node is None else plain(node)
    if trained is None and not {"norm", "eps"} - {k for k, v in given.items() if v is not None}:
        trained = OmegaConf.create({group: shipped(group, "linf_8")})  # a threat in full
    if trained is None:
        raise UserError(f"a model of your own needs its {group}: give {FROM_THE_RUN[group]}")
    merged = OmegaConf.create(plain(trained[group]))
    if "download" in merged:  # a run that came from elsewhere does not decide this
        merged.download = False
    if given.get("norm") not in (None, merged.get("norm")) and given.get("eps") is None:
        raise UserError(f"threat.norm={given['norm']} needs a budget: give threat.eps=... as well")
    for key, value in given.items():
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
    """A config as nested dicts and lists, interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def read(path: Path) -> DictConfig:
    """Read a YAML file of a run, which is resolved.

    Raises UserError if it is no mapping, and for interpolations: a downloaded one could read the
    environment.
    """
    try:
        cfg = OmegaConf.load(path)
    except Exception as problem:
        raise UserError(f"{path} can't be read: {describe(problem)}") from problem
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is not a config")
    if "${" in str(OmegaConf.to_container(cfg, resolve=False)):
        raise UserError(f"{path} is refused: a run's config has no interpolations (${{...}})")
    return cfg


def shipped(group: str, name: str) -> DictConfig:
    """The node of a shipped option, such as ``shipped("threat", "linf_8")``.

    Raises UserError, with the nearest name, if there is none.
    """
    names = options(group)
    if name not in names:
        raise UserError(f"no {group} '{name}'{did_you_mean(name, names)}")
    cfg = OmegaConf.create(names[name].read_text(encoding="utf-8"))
    assert isinstance(cfg, DictConfig)
    return cfg


def options(group: str) -> Mapping[str, Any]:
    """The shipped options of a group and their files; those of a subfolder as FOLDER/NAME."""
    found: dict[str, Any] = {}
    for file in (importlib.resources.files("advbench.configs") / group).iterdir():
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = file
        elif file.is_dir():
            found |= {f"{file.name}/{n}": f for n, f in options(f"{group}/{file.name}").items()}
    return dict(sorted(found.items()))
