#!/usr/bin/env python
"""The tables of all records below a folder, for benchmarks/gpu.md.

python scripts/gpu/table.py outputs/gpu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sitting import tables, where


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    for path in sorted(given.folder.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        places = {", ".join(f"{key} {record[key]}" for key in where()) for record in records}
        print(f"\n## {path.stem}\n\n{'; '.join(sorted(places))}")
        print(tables(records))


if __name__ == "__main__":
    main()
