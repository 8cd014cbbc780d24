"""Checksums of the files of a run: written with them, checked when they are read.

A finished run: its summary.json or results.json, which is written last, names the files that its
numbers rest on, with their checksums, and has one of its own. Files of a run at work have theirs at
their own end. So no kill between two writes can leave a file and its checksum apart.

Runs of earlier versions have no checksums. They are read as they are, with a note.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from advbench import files
from advbench.errors import UserError, describe
from advbench.files import write_atomic

SUMMARY = "summary.json"
"""Exists exactly if a training run is finished; it is written last."""
RESULTS = "results.json"
"""Of an evaluation; it names no missing stage exactly if the evaluation is finished."""
PLAN = "plan.json"
"""Of an evaluation."""
CONFIG = "config.yaml"
"""The config of a run."""

OWN, FILES = "checksum", "files"
"""Keys of a sealed JSON file: the hash of all that it says, and the files that belong to it."""
END = b"\nadvbench sha256 "
"""Before the checksum at the end of a sealed file."""
UNCHECKED = "made before checksums were kept: that its files are as they were was not checked"


class Damaged(UserError):
    """A file of a run is not what the run wrote. The message names it, and a way to get it back."""


def write_json(path: Path, value: Mapping[str, Any], belonging: Iterable[str] = ()) -> None:
    """Write JSON atomically, with its checksum and those of files beside it.

    Args:
        path: of the file; of a finished run it is the last one that is written.
        value: has no key ``checksum`` and none ``files``.
        belonging: names of files beside it; those that do not exist are left out.
    """
    stamps = {name: _stamp(path.parent / name) for name in belonging if _is_there(path, name)}
    content = {**value, **({FILES: stamps} if stamps else {})}
    as_read = json.loads(json.dumps(content, allow_nan=False))
    files.write_json(path, {**content, OWN: files.json_sha256(as_read)})


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote, checked; or any other JSON, as it is.

    Raises Damaged for another content, ValueError for no JSON, and OSError as reading does.
    """
    return opened(files.read_json(path), path)


def opened(content: Any, path: Path) -> Any:
    """The value of a sealed JSON file, checked, from its content; other content as it is.

    Raises Damaged where the checksum is of another content.
    """
    if not isinstance(content, dict) or OWN not in content:
        return content
    value = {key: part for key, part in content.items() if key != OWN}
    if content[OWN] != files.json_sha256(value):
        raise Damaged(f"'{path}' is damaged or was changed by hand: {_cure(path)}")
    belonging = value.pop(FILES, {})
    stamp = belonging.get(PLAN) if isinstance(belonging, dict) else None
    beside = path.parent / PLAN
    if stamp is not None and beside.is_file() and _changed(beside, stamp):
        raise Damaged(f"'{path}' is not of the evaluation that {PLAN} describes: {_cure(path)}")
    return value


def checked(path: Path) -> Path:
    """The file of a run, if it is what the run wrote: all that reads one goes through here.

    A file that no checksum is known of, such as the user's own, is not checked.
    Raises Damaged, in one line, for a file that is missing, empty, cut or has another content.
    """
    stamp = _belonging(path.parent).get(path.name)
    if stamp is not None:
        _check(path, stamp)
    return path


def check(folder: Path) -> None:
    """Raise Damaged for the first file of a finished run that is not what the run wrote.

    Its config is left to ``edited``: people may change it.
    """
    for name, stamp in _belonging(folder).items():
        if name != CONFIG:
            _check(folder / name, stamp)


def lacking(folder: Path) -> str | None:
    """A file of a finished run that is missing or has another size, with what it is; None if none.

    Reads no content.
    """
    for name, stamp in _belonging(folder).items():
        path, size = folder / name, stamp.get("bytes")
        if name != CONFIG and not path.is_file():
            return f"{name} is missing"
        if name != CONFIG and size is not None and path.stat().st_size != size:
            return f"{name} {_other_size(path.stat().st_size, size)}"
    return None


def belongs(path: Path) -> bool:
    """Whether a finished run names the file as its own; it may be missing."""
    return path.name in _belonging(path.parent)


def edited(folder: Path) -> bool:
    """Whether the config of a finished run is another than when it finished."""
    stamp = _belonging(folder).get(CONFIG)
    return stamp is not None and bool(_changed(folder / CONFIG, stamp))


def without_checksums(folder: Path) -> bool:
    """Whether a run is finished and of a time when no checksums were kept."""
    return any((folder / name).is_file() for name in (SUMMARY, RESULTS)) and not _belonging(folder)


def plan_key(folder: Path) -> str:
    """What the files of an evaluation at work are sealed with: a hash of what it attacks, and how.

    Empty in a directory without a plan. Raises Damaged for a damaged plan.
    """
    path = folder / PLAN
    try:
        return files.json_sha256(read_json(path)["identity"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise Damaged(f"'{path}' is damaged ({describe(problem)}): {_cure(path)}") from None


def write_sealed(path: Path, write: Callable[[Path], object], key: str = "") -> None:
    """Write a file of a run at work, atomically, with its checksum at its end.

    Args:
        path: of the file.
        write: gets the path to write to.
        key: of the run; a file of another one, or of another name, does not pass for this one.
    """

    def sealed(temporary: Path) -> None:
        write(temporary)
        digest = _seal(temporary.read_bytes(), path.name, key)
        with temporary.open("ab") as file:
            file.write(END + digest)

    write_atomic(path, sealed)


def read_sealed(path: Path, key: str = "") -> tuple[io.BytesIO, bool]:
    """What ``write_sealed`` wrote, and whether it was checked: older files have no checksum.

    Raises Damaged for another content or another run's, and for a link; OSError as reading does.
    """
    if path.is_symlink():
        raise Damaged(f"'{path}' is a symbolic link, which a run has none of")
    content = path.read_bytes()
    length = len(END) + hashlib.sha256().digest_size * 2
    payload, end = content[:-length], content[-length:]
    if not end.startswith(END):
        return io.BytesIO(content), False
    if end != END + _seal(payload, path.name, key):
        raise Damaged(f"'{path}' is damaged, or another run's")
    return io.BytesIO(payload), True


def _seal(payload: bytes, name: str, key: str) -> bytes:
    digest = hashlib.sha256(f"{key}/{name}\n".encode())
    digest.update(payload)
    return digest.hexdigest().encode()


def _is_there(path: Path, name: str) -> bool:
    return (path.parent / name).is_file()


def _belonging(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The files of a run by name, with their stamps; none where no checksums were kept."""
    for name in (SUMMARY, RESULTS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = files.read_json(path)
        except (OSError, ValueError) as problem:
            raise Damaged(f"'{path}' can't be read ({describe(problem)}): {_cure(path)}") from None
        opened(content, path)
        stamps = content.get(FILES, {}) if isinstance(content, dict) else {}
        plain = isinstance(stamps, dict) and all(
            isinstance(stamp, dict) and Path(key).name == key for key, stamp in stamps.items()
        )
        if not plain:
            raise Damaged(f"'{path}' names files in a way that advbench does not: {_cure(path)}")
        return stamps
    return {}


def _stamp(path: Path) -> dict[str, Any]:
    """What a file is known by. Of a plan what it attacks counts, and not who resumed it."""
    if path.name == PLAN:
        return {"identity": plan_key(path.parent)}
    state = path.stat()
    return {"sha256": _file_hash(str(path), state.st_mtime_ns, state.st_size, state.st_ino),
            "bytes": state.st_size}  # fmt: skip


def _check(path: Path, stamp: Mapping[str, Any]) -> None:
    """Raise Damaged for a file that is not what the stamp is of."""
    if problem := _changed(path, stamp):
        raise Damaged(f"'{path}' {problem}: {_cure(path)}")


def _changed(path: Path, stamp: Mapping[str, Any]) -> str:
    """What is wrong with a file, in words; nothing if it is what the stamp is of."""
    if path.is_symlink():
        return "is a symbolic link"
    if not path.is_file():
        return "is missing"
    if path.name == PLAN:
        return "" if plan_key(path.parent) == stamp.get("identity") else "is another evaluation's"
    size, expected = path.stat().st_size, stamp.get("bytes")
    if size != expected:
        return _other_size(size, expected)
    same = _stamp(path) == stamp
    return "" if same else "is damaged: its content is not what the run wrote"


def _other_size(size: int, expected: Any) -> str:
    return "is empty" if not size else f"is damaged: it has {size} bytes, and had {expected}"


@functools.lru_cache(maxsize=256)
def _file_hash(path: str, changed: int, size: int, inode: int) -> str:
    """Hash of a file's content, once as long as the file stays as it is."""
    return files.file_sha256(path)


def _cure(path: Path) -> str:
    """How to get a file of a run back."""
    folder = path.parent
    if (folder / SUMMARY).is_file() or path.name == SUMMARY:
        return f"copy the run anew, or remove '{folder}' and train again"
    return f"copy the run anew, or remove '{folder}' and evaluate again"
