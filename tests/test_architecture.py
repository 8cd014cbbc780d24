"""Imports go one way: from the command line down, in this order, without circles."""

from __future__ import annotations

import ast
from pathlib import Path

import advbench

ROOT = Path(advbench.__file__).parent
LAYERS = [
    ["__main__"],
    ["cli"],
    ["api"],
    ["experiments"],
    ["report"],
    ["verdict"],
    ["evaluation", "training"],
    ["recipes"],
    ["defenses"],
    ["runs"],
    ["attacks", "backbones", "data"],
    ["config", "console"],
    ["surgery", "files", "devices", "progress"],
    ["errors", "text"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Modules of advbench that a file imports anywhere, for typing too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("advbench.")}


def files() -> dict[str, Path]:
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[0] for name in files()} == set(LEVEL)
    assert len(files()) > 40


def test_imports_go_down() -> None:
    edges = 0
    for name, path in files().items():
        own = name.split(".")[0]
        for imported in imports(path):
            other = imported.split(".")[1]
            if other == own or other not in LEVEL:
                continue
            edges += 1
            assert LEVEL[other] > LEVEL[own], f"{name} imports {imported}"
    assert edges > 80


def test_no_circles_inside_a_package() -> None:
    graph = {
        name: {i.removeprefix("advbench.") for i in imports(path)} & set(files())
        for name, path in files().items()
    }

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        for other in graph[name]:
            visit(other, (*trail, name))

    for name in graph:
        visit(name, ())


def test_the_house_keeps_its_size() -> None:
    """At most eight modules and thirteen packages at the top, and no file that nobody reads."""
    names = {name for name in files() if not name.endswith(("__init__", "__main__"))}
    modules = {name for name in names if "." not in name}
    packages = {name.split(".")[0] for name in names if "." in name}
    assert len(modules) <= 8 and len(packages) <= 13
    long = {name for name, path in files().items() if len(path.read_text().splitlines()) > 400}
    assert not long


def test_every_folder_is_packaged() -> None:
    """What pyproject.toml forgets is missing from the wheel, and from no test here."""
    top = ROOT.parent
    text = (top / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.parent for kind in ("*.py", "*.yaml") for path in ROOT.rglob(kind)}
    folders |= {path.parent for path in (top / "configs").rglob("*.yaml")}
    names = {".".join(folder.relative_to(top).parts) for folder in folders}
    named = {f"advbench.{name}" if name.startswith("configs") else name for name in names}
    assert len(named) > 25
    assert {name for name in named if f'"{name}",' not in text} == set()


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them by their name alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) > 80
    assert {name for name in names if names.count(name) > 1} == set()
