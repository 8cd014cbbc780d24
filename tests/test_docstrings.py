"""Docstrings of what people call or derive from: complete, in Google's style, true examples."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import advbench
from advbench import Attack, Defense, Recipe

HOME = Path(advbench.__file__).parent
PACKAGES = (
    "attacks", "backbones", "config", "data", "defenses", "evaluation", "experiments", "recipes",
    "runs", "training", "verdict",
)  # fmt: skip
FILES = [
    *(file for package in PACKAGES for file in sorted((HOME / package).glob("*.py"))),
    *(HOME / f"{name}.py" for name in ("api", "devices", "files", "progress", "surgery", "text")),
]
COMPRESSED = re.compile(r"^ *(\w+(, \w+)*: \S.*  \w+(, \w+)*: |Raises \w+Error )", re.M)
"""``x: (N,).  y: (N,).`` in one line, or "Raises UserError for" outside of a section."""


@pytest.mark.parametrize("component", [Attack, Defense, Recipe])
def test_examples_are_true(component: type) -> None:
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    (example,) = finder.find(component, component.__name__, globs={})
    assert len(example.examples) >= 5
    assert runner.run(example).failed == 0


def public(body: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef]:
    """Classes, functions and methods without an underscore; hooks that only override have none."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append(node)
            found += public(node.body) if isinstance(node, ast.ClassDef) else []
    return found


def has_fields(node: ast.ClassDef) -> bool:
    names = {ast.unparse(one).partition("(")[0] for one in (*node.decorator_list, *node.bases)}
    return bool(names & {"dataclass", "NamedTuple"})


def undocumented(node: ast.ClassDef) -> list[str]:
    """Fields without a string beneath them."""
    missing = []
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if not told:
            missing.append(f"{node.name}.{ast.unparse(field.target)}")
    return missing


def test_public_names_and_fields_say_what_they_are() -> None:
    fields, missing, compressed = 0, [], []
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = {id(node) for node in tree.body}
        for node in public(tree.body):
            text = ast.get_docstring(node)
            if text is None and (isinstance(node, ast.ClassDef) or id(node) in top):
                missing.append(f"{file.name}: {node.name}")
            if text is not None and COMPRESSED.search(text):
                compressed.append(f"{file.name}: {node.name}")
            if isinstance(node, ast.ClassDef) and has_fields(node):
                fields += sum(isinstance(one, ast.AnnAssign) for one in node.body)
                missing += [f"{file.name}: {name}" for name in undocumented(node)]
    assert missing == [] and compressed == []
    assert fields > 250


IN_DOCS = re.compile(r"^from (advbench[\w.]*) import ([^(\n]+)$", re.M)
FURTHER = {
    "advbench.attacks.random": "KeyedRandom",
    "advbench.backbones.layers": "PooledBackbone",
    "advbench.training.trainer": "Trainer",
    "advbench.verdict.indicator": "Indicator",
    "advbench.verdict.judge": "Judgement",
}
"""Classes that configs and the tables of extensions name, and no package exports."""


def exported() -> dict[str, Any]:
    """What the packages export, and what docs/ teach people to import, by dotted name."""
    names = {(module, name) for module, name in FURTHER.items()}
    for file in [HOME / "__init__.py", *HOME.glob("*/__init__.py")]:
        module = ".".join(("advbench", *file.parent.relative_to(HOME).parts))
        every = getattr(importlib.import_module(module), "__all__", ())
        names |= {(module, name) for name in every}
    for page in (HOME.parent / "docs").glob("*.md"):
        for module, imported in IN_DOCS.findall(page.read_text(encoding="utf-8")):
            names |= {(module, name.strip()) for name in imported.split(",")}
    return {f"{m}.{n}": getattr(importlib.import_module(m), n) for m, n in sorted(names)}


def signatures(component: Any) -> Iterator[tuple[str, Any, str]]:
    """Functions that a user calls or overrides: name, function, and what documents it.

    An override is documented by the method that it overrides, too; a constructor by its class.
    """
    if inspect.isfunction(component):
        yield component.__qualname__, component, inspect.getdoc(component) or ""
    if not inspect.isclass(component):
        return
    family = [cls for cls in component.__mro__ if cls.__module__.startswith("advbench")]
    for cls in family:
        generated = dataclasses.is_dataclass(cls) or getattr(cls, "_is_protocol", False)
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)
            public_name = not name.startswith("_") or (name == "__init__" and not generated)
            if public_name and inspect.isfunction(function):
                sources = [vars(base)[name] for base in family if name in vars(base)]
                sources = family if name == "__init__" else sources
                text = "\n".join(inspect.cleandoc(one.__doc__ or "") for one in sources)
                yield f"{cls.__qualname__}.{name}", function, text


def unnamed(function: Any, text: str) -> list[str]:
    """Parameters that are neither an entry of Args nor mentioned as ``name``."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    entry = r"^ *(?:\**\w+, )*\**{0}(?:, \**\w+)*: |``{0}``"
    return [name for name in names if not re.search(entry.format(name), text, re.M)]


def test_exported_functions_document_every_parameter() -> None:
    seen, missing = set(), []
    for component in exported().values():
        for name, function, text in signatures(component):
            seen.add(function)
            missing += [f"{function.__module__}.{name}: {one}" for one in unnamed(function, text)]
    assert sorted(set(missing)) == []
    assert len(seen) > 200
