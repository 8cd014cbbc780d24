"""Files that are either whole or not there, and hashes of content."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds, and most commands on files need none
    from torch import Tensor


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name beside ``path`` and put the file in its place.

    A process that is killed at any moment leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        if problem.filename == str(temporary):
            problem.filename = str(path)  # the temporary one is nobody's concern
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove what processes that were killed inside ``write_atomic`` have left."""
    for path in folder.glob(".*.tmp"):
        if path.suffixes[-2:-1] and path.suffixes[-2][1:].isdigit():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: indented, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def short_hash(value: Any) -> str:
    """Eight hex digits of the hash of a JSON-like value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:8]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The content of a tensor, independent of device and layout."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def code_sha256(path: str | Path) -> str:
    """Hash of a Python file and of the files beside it that it imports, directly or not."""
    files = _with_neighbours(Path(path).resolve())
    if len(files) == 1:
        return file_sha256(path)
    content = sorted((file.name, file_sha256(file)) for file in files)
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _with_neighbours(file: Path) -> set[Path]:
    root, found, waiting = file.parent, set(), [file]
    while waiting:
        if (file := waiting.pop()) in found:
            continue
        found.add(file)
        for beside in (root / name for name in _imported(file)):
            package = beside.rglob("*.py") if (beside / "__init__.py").is_file() else ()
            waiting += [o for o in (beside.with_suffix(".py"), *package) if o.is_file()]
    return found


def _imported(file: Path) -> set[str]:
    """First words of the modules that a Python file imports; of relative imports too."""
    names: list[str] = []
    with contextlib.suppress(SyntaxError, ValueError):  # importing it will say so
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                names += [node.module or alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def hashes(files: Iterable[str]) -> dict[str, str]:
    """The content of the user's own files, and of what they import from beside them, by name."""
    return {Path(file).name: code_sha256(file) for file in files}
