"""Files that are either whole or not there, and hashes of content."""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advbench.errors import UserError, causes
from advbench.text import size

if TYPE_CHECKING:  # importing torch takes seconds, and most commands on files need none
    from torch import Tensor


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file has no room: the disk, a quota or a limit on files is full."""


def no_room(problem: BaseException, path: Path | None = None) -> UserError | None:
    """What to tell the user where a disk is full; None for a problem of another kind.

    path: the file that was being written, where it is known.
    """
    for link in causes(problem):
        number = link.errno if isinstance(link, OSError) else None
        if number is None and (told := re.search(r"\(os error (\d+)\)", str(link))):
            number = int(told[1])  # of a library in Rust, such as safetensors
        if number in FULL:
            named = getattr(link, "filename2", None) or getattr(link, "filename", None)
            path = path or (Path(named) if isinstance(named, str) else None)
            what = "what is printed" if path is None else f"'{path}'{_free(path)}"
            return UserError(
                f"no room for {what}: {os.strerror(number)}; make room and type the same command "
                "again"
            )
    return None


def _free(path: Path) -> str:
    """How much room there is on the disk of a file."""
    with contextlib.suppress(OSError):
        return f" ({size(shutil.disk_usage(path.absolute().parent).free)} free there)"
    return ""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary name beside ``path`` and put the file in its place.

    A process that is killed at any moment leaves the old file or the new one. The file has the
    permissions of any new file, whatever those are that ``write`` gives it.

    Args:
        path: the file.
        write: writes the content to the path that it is called with.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as problem:
        if (full := no_room(problem, path)) is not None:
            raise full from problem
        if isinstance(problem, OSError) and problem.filename == str(temporary):
            problem.filename = str(path)  # not the temporary one
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


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError for what is none, OSError as reading does."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header. Raises ValueError for what is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except csv.Error as problem:
        raise ValueError(f"{path} is not a table: {problem}") from problem


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def json_sha256(value: Any) -> str:
    """Hash of a JSON-like value, the same for equal values."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def short_hash(value: Any) -> str:
    """Eight hex digits of the hash of a JSON-like value."""
    return json_sha256(value)[:8]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The content of a tensor, independent of device and layout."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content, of which a part at a time is in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def code_sha256(path: str | Path) -> str:
    """Hash of a Python file and of the files beside it that it imports, directly or not."""
    files = _with_neighbours(Path(path).resolve())
    if len(files) == 1:
        return file_sha256(path)
    content = sorted((file.name, file_sha256(file)) for file in files)
    return json_sha256(content)


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
