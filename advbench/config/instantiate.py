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
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from advbench.config.nodes import plain
from advbench.config.schema import GROUPS
from advbench.errors import UserError, describe, did_you_mean

MOVED = {"advbench.evaluation.protocol": "advbench.evaluation.protocols"}
"""Modules whose components live elsewhere by now, for the configs of older runs."""


BUILT = ("backbone", "data")
"""Groups whose shipped components are parameters, with a ``build`` that makes the object."""


def load_plugins(paths: Iterable[str]) -> tuple[str, ...]:
    """Import the user's own files.

    Args:
        paths: of Python files.

    Returns:
        The module prefixes that ``build`` may use for them.

    Raises:
        UserError: as ``import_file``.
    """
    prefixes = []
    for path in paths:
        import_file(path)
        prefixes.append(f"{Path(path).stem}.")
    return tuple(prefixes)


def import_file(path: str) -> types.ModuleType:
    """Import the Python file at ``path``; what lies beside it can be imported too.

    Raises:
        UserError: if it is missing, does not import, or has the name of a module that is in use.
    """
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


def target_of(node: Any, group: str, plugins: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The component that a group node names.

    Args:
        node: with ``_target_``; None is refused.
        group: such as ``defense``, which decides where components may live.
        plugins: prefixes from ``load_plugins``.

    Raises:
        UserError: if it may not be used, or does not exist.
    """
    if node is not None and not isinstance(node, Mapping | DictConfig):
        raise UserError(f"{group} is {node!r}, not a component: choose one with {group}=NAME")
    name = None if node is None else node.get("_target_")
    if not name:
        raise UserError(f"no {group} is chosen: give {group}=NAME (see: advbench list {group})")
    module = GROUPS[group]
    allowed = (module if isinstance(module, tuple) else (module,)) + plugins
    module_name, _, attribute = str(name).rpartition(".")
    module_name = MOVED.get(module_name, module_name)
    name = f"{module_name}.{attribute}"
    if not name.startswith(allowed):
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

    Args:
        node: ``_target_`` and parameters.
        group: such as ``defense``.
        plugins: prefixes from ``load_plugins``.
        **given: parameters that the caller supplies.

    Raises:
        UserError: for a target that may not be used, a misspelt key, a wrong type, a missing value,
            and values that the component can't take.
    """
    target = target_of(node, group, plugins)
    values = {key: value for key, value in plain(node).items() if key != "_target_"}
    arguments = checked(target, values, group, given)
    try:
        component = target(**arguments, **given)
        return component.build() if group in BUILT and hasattr(component, "build") else component
    except (UserError, OSError, MemoryError):
        raise
    except Exception as problem:
        raise UserError(f"{group} can't be made of these values: {describe(problem)}") from problem


def checked(
    target: Callable[..., Any], values: Mapping[str, Any], where: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Values for all parameters of ``target`` but those that are ``given`` elsewhere.

    Args:
        target: a component: a class or a function.
        values: of a config node, without ``_target_``.
        where: the group, for messages.
        given: names of parameters that the caller supplies.

    Raises:
        UserError: for a misspelt key, a wrong type and a missing value.
    """
    parameters = _schema(target, given)
    schema = OmegaConf.structured(parameters)
    names = [f.name for f in dataclasses.fields(parameters)]
    for key, value in values.items():
        if key in given:
            continue
        if key not in names:
            raise UserError(f"no key '{where}.{key}'{did_you_mean(key, names)}")
        try:
            OmegaConf.update(schema, key, value)
        except OmegaConfBaseException as problem:
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
            named = [line.split(": ")[1] for line in lines if line.startswith("full_key: ")]
            key_name = ".".join([where, *(named or [key])[:1]])
            raise UserError(f"{key_name}: {lines[0].rstrip('.')}") from problem
    for key in names:
        if OmegaConf.is_missing(schema, key):
            raise UserError(f"{where}.{key} has no value: give {where}.{key}=...")
    arguments = OmegaConf.to_container(schema)
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items()}


def build_defense(node: Any, plugins: tuple[str, ...] = ()) -> Any:
    """The defense of a node.

    Args:
        node: of a defense; a chain's members are nodes themselves (``spelled_out``).
        plugins: prefixes from ``load_plugins``.

    Raises:
        UserError: as ``build``.
    """
    members = None if node is None else node.get("members")
    if members is None:
        return build(node, "defense", plugins=plugins)
    built = tuple(build_defense(member, plugins) for member in members)
    return build(node, "defense", plugins=plugins, members=built)


def build_recipe(
    node: Any, plugins: tuple[str, ...] = (), *, threat: Any, teachers: Mapping[str, Any]
) -> Any:
    """The recipe of a node.

    Args:
        node: of a recipe; what it is ``of`` is a node itself (``spelled_out``).
        plugins: prefixes from ``load_plugins``.
        threat: of the recipe and of what it is ``of``; None without an adversarial part.
        teachers: models by the name of the parameter that takes each.

    Raises:
        UserError: as ``build``.
    """
    given = {} if node is None else {key: teachers[key] for key in teachers if key in node}
    if node is not None and node.get("of") is not None:
        given["of"] = build_recipe(node.of, plugins, threat=threat, teachers=teachers)
    return build(node, "recipe", plugins=plugins, threat=threat, **given)
