#!/usr/bin/env python
"""Image arrays as JPEG bytes, a tenth of their size, and back: for machines that take little along.

    python scripts/gpu/images.py pack FILE.npz SMALL.npz --quality 75
    python scripts/gpu/images.py unpack SMALL.npz FILE.npz

FILE holds x_train, y_train, x_test, y_test, (N, H, W, 3) uint8. JPEG loses a little: numbers on
such images are not those of the originals.
"""

from __future__ import annotations

import argparse
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = ("train", "test")


def pack(source: Path, target: Path, quality: int) -> None:
    """Encode the images. jpeg_PART are all bytes in a row, offset_PART where each image begins."""
    arrays, packed = np.load(source), {}
    for part in PARTS:
        encoded = []
        for image in arrays[f"x_{part}"]:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=quality)
            encoded.append(buffer.getvalue())
        packed[f"jpeg_{part}"] = np.frombuffer(b"".join(encoded), np.uint8)
        packed[f"offset_{part}"] = np.cumsum([0, *map(len, encoded)])
        packed[f"y_{part}"] = arrays[f"y_{part}"]
    np.savez(target, **packed)


def unpack(source: Path, target: Path) -> None:
    """Decode the images."""
    packed, arrays = np.load(source), {}
    for part in PARTS:
        data, offset = packed[f"jpeg_{part}"].tobytes(), packed[f"offset_{part}"].tolist()
        images = [
            np.asarray(Image.open(io.BytesIO(data[begin:end])).convert("RGB"))
            for begin, end in itertools.pairwise(offset)
        ]
        arrays[f"x_{part}"] = np.stack(images)
        arrays[f"y_{part}"] = packed[f"y_{part}"].astype(np.int64)
    np.savez(target, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--quality", type=int, default=75)
    given = parser.parse_args()
    if given.what == "pack":
        pack(given.source, given.target, given.quality)
    else:
        unpack(given.source, given.target)
    print(f"{given.target}: {given.target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
