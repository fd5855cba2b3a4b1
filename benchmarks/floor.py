"""What the disk allows: `python -m benchmarks.floor {plain,direct} BYTES TARGET INPUT...`.

Reads all files below the inputs, one after the other, then writes BYTES bytes to TARGET and syncs it. Nothing is
computed. `plain` reads and writes as any program does, `direct` goes past the page cache (O_DIRECT).
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PIECE = 4 << 20


def floor(how: str, size: int, target: Path, inputs: Sequence[Path]) -> None:
    """Read everything, write that much."""
    flag = os.O_DIRECT if how == "direct" else 0
    buffer = mmap.mmap(-1, PIECE)
    for folder in inputs:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if file.is_file():
                _read(file, buffer, flag)
    buffer[:] = os.urandom(PIECE)
    _write(target, buffer, size, flag)


def _read(file: Path, buffer: mmap.mmap, flag: int) -> None:
    descriptor = os.open(file, os.O_RDONLY | flag)
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        position += count
        if position % mmap.PAGESIZE:
            break  # the end; O_DIRECT cannot read on from here
    os.close(descriptor)


def _write(target: Path, buffer: mmap.mmap, size: int, flag: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag)
    for position in range(0, size, PIECE):
        os.pwrite(descriptor, buffer, position)
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    floor(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), [Path(path) for path in sys.argv[4:]])
