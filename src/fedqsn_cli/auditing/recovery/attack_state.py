"""Results of attacks on the function, kept in a file: an audit that was killed goes on where it was.

    {"format": "fedqsn-attacks/1", "inputs": SHA-256, "seal": HMAC,
     "results": {"LoRA, 64 examples": {"loss": ..., "accuracy": ..., "steps": ...}, ...}}

`inputs` is over everything that decides a result. Results of other inputs are of no use, and are replaced. The seal is
made with the job's key over all the rest: whoever can write the file, in a cache of a CI system for instance, cannot
make an audit believe that attacks failed.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from fedqsn_cli import strictjson
from fedqsn_cli.artifacts.document import Count, Sha256, Strict
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing.inputs import Inputs
from fedqsn_cli.checkpoint import write_file_atomically
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks.job_key import JobKey
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
    seal: Sha256 = "0" * 64

    def sealed(self, job: JobKey) -> Self:
        """The same with its seal."""
        rest = strictjson.dumps(self.model_dump(mode="json", exclude={"seal"}))
        return self.model_copy(update={"seal": job.seal("attack results", rest)})


@dataclass(frozen=True, slots=True)
class AttackState:
    """The results until now.

    Args:
        path: where they are kept; None: nowhere. job: who seals them. inputs: SHA-256 of what decides them.
        results: by name.
    """

    path: Path | None
    job: JobKey | None
    inputs: str
    results: dict[str, Result]

    @classmethod
    def open(
        cls, path: str | Path | None, inputs: Inputs, data: Sequence[str | Path | None], settings: Sequence[object]
    ) -> Self:
        """Read what an earlier audit of the same inputs kept.

        Args:
            data: files that decide results, too. settings: values that do.

        Raises:
            InputError: there is no key to seal them with. FormatError: the file is something else, or was changed.
        """
        if path is None:
            return cls(None, None, "", {})
        if inputs.job is None:
            raise InputError("results are sealed with the job's key", where="--attack-state", hint="give --key")
        digest, file = _digest(inputs, data, settings), Path(path)
        if not os.path.lexists(file):
            return cls(file, inputs.job, digest, {})
        kept = _Document.from_document(strictjson.loads(read_file(file, _LARGEST), file), file)
        if kept != kept.sealed(inputs.job):
            hint = "it was changed, or is of another job: delete it, or choose another file"
            raise FormatError("its seal is wrong", where=file, hint=hint)
        return cls(file, inputs.job, digest, dict(kept.results) if kept.inputs == digest else {})

    def result(self, name: str, measure: Callable[[], Result | None]) -> Result | None:
        """What is known of an attack; else it is measured now, and kept. None where there is nothing to measure."""
        if name in self.results:
            return self.results[name]
        found = measure()
        if found is not None and self.path is not None and self.job is not None and math.isfinite(found.loss):
            self.results[name] = found
            document = _Document(inputs=self.inputs, results=self.results).sealed(self.job)
            write_file_atomically(self.path, strictjson.pretty(document.model_dump(mode="json")).encode(), 0o600)
        return found


def _digest(inputs: Inputs, data: Sequence[str | Path | None], settings: Sequence[object]) -> str:
    """SHA-256 over the content of all models, proxies and data, and over the settings."""
    models = (inputs.truth, inputs.server, inputs.base)
    places = [model.source.path for model in models if model is not None]
    places += [proxy.folder for proxy in (*inputs.proxies, *inputs.earlier)]
    job = inputs.job.commitment if inputs.job is not None else None
    files = [list(_files(Path(one))) if one is not None else None for one in (*places, *data)]
    parts = [VERSION, job, files, [str(one) for one in settings]]
    return hashlib.sha256(strictjson.dumps(parts).encode()).hexdigest()


def _files(place: Path) -> Iterator[tuple[str, str]]:
    """Names and digests of a file, or of those in a folder."""
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.is_file():
            yield path.name, file_digest(path)
