"""Docstrings of what people call or derive from: complete, in Google's style, true examples."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path

import pytest

import advbench
from advbench import Attack, Defense, Recipe

HOME = Path(advbench.__file__).parent
FILES = [
    *(
        file
        for package in ("attacks", "defenses", "experiments", "recipes", "runs", "training")
        for file in sorted((HOME / package).glob("*.py"))
    ),
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
