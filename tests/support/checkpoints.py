"""A small artifact for the tests to write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec

SPECS = [TensorSpec("a", "F32", (4, 2)), TensorSpec("odd", "U8", (3,)), TensorSpec("b", "F16", (8,))]
BYTES = {spec.name: bytes(range(i, i + spec.nbytes)) for i, spec in enumerate(SPECS)}
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def fill(writer: ArtifactWriter, **options: Any) -> None:
    """A small complete artifact."""
    sink = writer.tensors("model", SPECS, **{"max_shard_bytes": None, "metadata": {"format": "pt"}} | options)
    for name, data in BYTES.items():
        sink.write(name, 0, data)
    sink.close()
    writer.add_bytes("proxy.json", b"{}")


def make(out: Path, *, force: bool = False, **options: Any) -> Path:
    with ArtifactWriter(out, force=force) as writer:
        fill(writer, **options)
        return writer.publish()
