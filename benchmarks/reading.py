"""Read all tensors once, as every pass of the product does: `python -m benchmarks.reading CHECKPOINT...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedqsn_cli.checkpoint import Checkpoint

PIECE = 4 << 20  # bytes


def read(checkpoints: Sequence[str]) -> int:
    """Bytes of all tensors, which are read one after the other and dropped."""
    total = 0
    for path in checkpoints:
        with Checkpoint.open(path) as checkpoint:
            for name, entry in checkpoint.entries.items():
                for start in range(0, entry.nbytes, PIECE):
                    total += checkpoint.read_fresh(name, start, min(PIECE, entry.nbytes - start)).size
    return total


if __name__ == "__main__":
    print(read(sys.argv[1:]))
