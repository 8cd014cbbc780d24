#!/usr/bin/env python
"""Rewrite a wheel without some of its folders: pyautoattack's weighs 42 MB with its examples.

python scripts/gpu/slim.py FILE.whl examples
"""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path


def slim(wheel: Path, folders: set[str]) -> None:
    """Drop every file below a folder of one of these names, and its line of RECORD."""
    smaller = wheel.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            if folders & set(entry.filename.split("/")[:-1]):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                kept = [line for line in lines if not folders & set(line.split("/")[:-1])]
                content = "".join(kept).encode()
            target.writestr(entry, content)
    os.replace(smaller, wheel)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folders", nargs="+")
    given = parser.parse_args()
    before = given.wheel.stat().st_size
    slim(given.wheel, set(given.folders))
    print(
        f"{given.wheel.name}: {before / 2**20:.1f} -> {given.wheel.stat().st_size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
