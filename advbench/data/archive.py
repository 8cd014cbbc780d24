"""Reading ``.npz`` files of the user's: what is wrong with them is said in one line."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from advbench.errors import UserError
from advbench.text import size

# What zipfile, zlib and NumPy raise for a file that is not what it should be.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """An array of an archive, which is read block by block: the whole may be half the memory."""

    archive: Archive
    """The file."""
    key: str
    """The array's name."""
    shape: tuple[int, ...]
    """Of the array."""
    dtype: np.dtype
    """Of the array."""

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """So many ``rows`` at a time, in order.

        Raises:
            UserError: for a damaged array.
        """
        return self.archive.blocks(self.key, rows)


class Archive:
    """The arrays of an ``.npz`` file, each read when it is asked for; pickled objects never are.

    Args:
        path: of the file.
        option: the key that names the file on the command line, for messages.
        keys: the arrays that it should hold, for messages.

    Raises:
        UserError: here and in each method, for a file or an array that cannot be read.
    """

    def __init__(self, path: str, option: str, keys: Sequence[str]) -> None:
        self.path = Path(path).expanduser()
        self._option = option
        try:
            with zipfile.ZipFile(self.path) as file:
                members = file.namelist()
        except FileNotFoundError:
            raise UserError(f"there is no file '{path}': name it with {option}=FILE.npz") from None
        except DAMAGE as error:
            raise UserError(
                f"'{path}' cannot be read as .npz ({error}): write it with "
                f"np.savez(FILE, {', '.join(f'{key}=...' for key in keys)})"
            ) from None
        self.names = [name[: -len(".npy")] for name in members if name.endswith(".npy")]

    def what(self, key: str) -> str:
        """How a message names an array."""
        return f"{key} in '{self.path}'"

    def require(self, *keys: str) -> None:
        """Check that all of these arrays exist.

        Raises:
            UserError: for one that does not.
        """
        missing = [key for key in keys if key not in self.names]
        if missing:
            present = ", ".join(sorted(self.names)) or "nothing"
            raise UserError(
                f"'{self.path}' has no {' and no '.join(missing)} (it holds: {present}): add what "
                f"is missing with np.savez, or name another file with {self._option}=FILE.npz"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        """Of an array, from its header alone."""
        with self._opened(key) as (_, shape, _, _):
            return shape

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
        """An array behind its header: shape, Fortran's order or not, and type.

        Raises UserError for a header that claims more than the file holds.
        """
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{key}.npy") as array:
                shape, fortran, dtype = _header(array)
                claimed = math.prod(shape) * dtype.itemsize
                available = file.getinfo(f"{key}.npy").file_size - array.tell()
                if dtype.hasobject:
                    raise ValueError("allow_pickle")
                if claimed > available:
                    raise ValueError(f"it is not the {size(claimed)} that it claims")
                yield array, shape, fortran, dtype
        except DAMAGE as error:
            raise self._damaged(key, error) from None

    def member(self, key: str) -> Member:
        """An array that stays in the file."""
        with self._opened(key) as (_, shape, _, dtype):
            return Member(self, key, shape, dtype)

    def blocks(self, key: str, rows: int) -> Iterator[np.ndarray]:
        """An array, so many rows at a time, checked against its checksum at the end."""
        with self._opened(key) as (array, shape, fortran, dtype):
            if not fortran:
                for start in range(0, shape[0], rows):
                    block = min(rows, shape[0] - start), *shape[1:]
                    content = array.read(math.prod(block) * dtype.itemsize)
                    yield np.frombuffer(bytearray(content), dtype).reshape(block)
                array.read(1)  # its end, where the checksum is compared
                return
        yield self.read(key)

    def read(self, key: str) -> np.ndarray:
        """An array, whole and checked against its checksum."""
        self.shape(key)
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[key]
        except DAMAGE as error:
            raise self._damaged(key, error) from None

    def mapped(self, key: str) -> np.ndarray:
        """An array that stays in the file until its parts are touched, where it is stored plainly.

        One that is compressed, or in Fortran's order, is read as by ``read``. What is mapped is not
        checked against its checksum, which would take reading it all.
        """
        try:
            with zipfile.ZipFile(self.path) as file:
                member = file.getinfo(f"{key}.npy")
                with file.open(member) as array:
                    shape, fortran, dtype = _header(array)
                    header = array.tell()
            if member.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
                return self.read(key)
            with self.path.open("rb") as file:
                # The local header has name and extra field of its own lengths, at its end.
                file.seek(member.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
            start = member.header_offset + 30 + name + extra + header
            # Copy on write: PyTorch wants memory that may be written to, and nothing writes.
            return np.memmap(self.path, dtype, mode="c", offset=start, shape=shape)
        except DAMAGE as error:
            raise self._damaged(key, error) from None

    def _damaged(self, key: str, error: Exception) -> UserError:
        if "allow_pickle" in str(error):
            return UserError(
                f"{self.what(key)} holds pickled Python objects, which can run code when they "
                f"are read: store a plain array of numbers"
            )
        reason = " ".join(str(error).split())
        return UserError(f"{self.what(key)} is damaged ({reason}): write or copy the file again")


def _header(array) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran's order or not, and type, from an open .npy file."""
    if np.lib.format.read_magic(array) == (1, 0):
        return np.lib.format.read_array_header_1_0(array)
    return np.lib.format.read_array_header_2_0(array)
