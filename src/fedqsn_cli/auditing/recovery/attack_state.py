"""Results of attacks on the function, kept in a file: an audit that was killed goes on where it was.

    {"format": "fedqsn-attacks/1", "inputs": SHA-256, "results": {"LoRA, 64 examples": {"loss": ...}, ...}}

`inputs` is over everything that decides a result. Results of other inputs are of no use, and are replaced.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.manifests import Count, Sha256, Strict, file_digest
from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.checkpoint import write_file_atomically
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.version import VERSION

_LARGEST = 16 << 20  # bytes


class Result(Strict):
    """What one attack reached, and the optimizer steps that it took."""

    loss: float
    accuracy: float | None
    steps: Count


class _Document(Strict):
    format: Literal["fedqsn-attacks/1"] = "fedqsn-attacks/1"
    inputs: Sha256
    results: dict[str, Result]


@dataclass(frozen=True, slots=True)
class AttackState:
    """The results until now.

    Args:
        path: where they are kept; None: nowhere. inputs: SHA-256 of what decides them. results: by name.
    """

    path: Path | None
    inputs: str
    results: dict[str, Result]

    @classmethod
    def open(cls, path: str | Path | None, inputs: Inputs, *settings: object) -> Self:
        """Read what an earlier audit of the same inputs kept.

        Args:
            settings: what else decides a result: names of files of data, and plain values.

        Raises:
            FormatError: the file is something else.
        """
        if path is None:
            return cls(None, "", {})
        digest, file = _digest(inputs, settings), Path(path)
        if not os.path.lexists(file):
            return cls(file, digest, {})
        kept = _Document.from_document(strictjson.loads(read_file(file, _LARGEST), file), file)
        return cls(file, digest, dict(kept.results) if kept.inputs == digest else {})

    def result(self, name: str, measure: Callable[[], Result | None]) -> Result | None:
        """What is known of an attack; else it is measured now, and kept. None where there is nothing to measure."""
        if name in self.results:
            return self.results[name]
        found = measure()
        if found is not None and self.path is not None and math.isfinite(found.loss):
            self.results[name] = found
            document = _Document(inputs=self.inputs, results=self.results).model_dump(mode="json")
            write_file_atomically(self.path, strictjson.pretty(document).encode(), 0o600)
        return found


def _digest(inputs: Inputs, settings: tuple[object, ...]) -> str:
    """SHA-256 over the content of all models, proxies and data, and over the settings."""
    models = (inputs.truth, inputs.server, inputs.base)
    places = [model.source.path for model in models if model is not None]
    places += [proxy.folder for proxy in (*inputs.proxies, *inputs.earlier)]
    job = inputs.job.commitment if inputs.job is not None else None
    parts = [VERSION, job, *(list(_files(place)) for place in places)]
    for one in settings:
        parts.append(list(_files(Path(one))) if isinstance(one, (str, Path)) and Path(one).exists() else str(one))
    return hashlib.sha256(strictjson.dumps(parts).encode()).hexdigest()


def _files(place: Path) -> Iterator[tuple[str, str]]:
    """Names and digests of a file, or of those in a folder."""
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.is_file():
            yield path.name, file_digest(path)
