"""The state of a training on disk, from which it goes on after it was ended: `--save-every`.

    .OUT.fedqsn-states/           mode 0700, beside the output; deleted when the output is there
        step-00000200/
            state.safetensors     leaves, optimizer state, losses, state of the random generators
            state.json            step, seconds, scalars of the optimizer, facts, digest of state.safetensors
        finished.json             once the output is about to appear: its manifest, and the digest of that

A state appears whole or not at all. Its facts (digests of proxy and data, and options that decide what is trained) must
be those of the run that goes on from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedqsn_cli import strictjson, validate
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.checkpoint import ArtifactWriter, TensorSpec, files, read_header
from fedqsn_cli.checkpoint.companions import MANIFESTS
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.models.dense import TORCH_DTYPES
from fedqsn_cli.options import Options
from fedqsn_cli.progress import Progress
from fedqsn_cli.text import listed

FORMAT = "fedqsn-training-state/1"
KEPT = 2
"""States that are kept: the last one, and the one before, should the last one be damaged."""

_LARGEST = 4 << 20  # bytes of a document
_TENSORS, _DOCUMENT, _FINISHED = "state.safetensors", "state.json", "finished.json"
_STORED = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class State:
    """A state that was found.

    Args:
        step: steps that are done. seconds: what they took.
        scalars: numbers beside the tensors, by name.
        path: its folder.
    """

    step: int
    seconds: float
    scalars: Mapping[str, float]
    path: Path

    def specs(self) -> dict[str, TensorSpec]:
        """What its tensors are, by name. Raises FormatError."""
        entries = read_header(self.path / _TENSORS).entries
        return {name: TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items()}

    def read(self, name: str) -> Tensor:
        """One of its tensors."""
        with safe_open(self.path / _TENSORS, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
            return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, read one after the other."""
        with safe_open(self.path / _TENSORS, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is not a mapping
                yield name, stored.get_tensor(name)


def stored_as(name: str, like: Tensor) -> TensorSpec:
    """How a tensor of this dtype and shape is stored in a state."""
    return TensorSpec(name, _STORED[like.dtype], tuple(like.shape))


class StateFolder:
    """The states of one training."""

    def __init__(self, out: Path, facts: Mapping[str, Any], every: str) -> None:
        """Nothing is read or written yet.

        Args:
            out: the output that the training makes.
            facts: what a state must agree with, by the name that messages use.
            every: see `validate.interval`.
        """
        self.path = _states_of(out)
        self._facts = dict(facts)
        self._steps, self._seconds = validate.interval(every, "--save-every")
        self._last = time.monotonic()

    @contextmanager
    def opened(self) -> Iterator[StateFolder]:
        """Within this block the folder is there, and no other process uses it.

        Raises:
            InputError: another process does, or it cannot be made.
        """
        descriptor = self._locked()
        try:
            self._sweep()
            self._last = time.monotonic()
            yield self
        finally:
            os.close(descriptor)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def _locked(self) -> int:
        """Make the folder if it is missing; returns the descriptor that holds its lock."""
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise InputError(f"cannot be created ({error.strerror})", where=self.path) from None
        if not files.try_lock(descriptor):
            os.close(descriptor)
            raise InputError("is in use by another client-train", where=self.path, hint="choose another --out")
        return descriptor

    def _sweep(self) -> None:
        """Delete what a killed run left of a state that it was writing."""
        for path in self.path.glob(".step-*.fedqsn-*"):
            files.sweep(self.path / path.name[1:].split(".fedqsn-")[0])

    def due(self, step: int) -> bool:
        """Is it time to save, after this many steps?"""
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def save(
        self,
        step: int,
        seconds: float,
        tensors: Iterable[tuple[str, Tensor]],
        values: Iterable[Tensor],
        scalars: Mapping[str, float],
    ) -> None:
        """Write a state, and delete all but the last ones.

        Args:
            tensors: names and tensors; only the shape and dtype of these is looked at.
            values: the same tensors in the same order; each is written before the next one is asked for.
            scalars: finite numbers to keep with them.

        Raises:
            OSError: the disk is full or failed.
        """
        path = self.path / f"step-{step:08d}"
        files.remove_tree(path)  # a damaged one, for otherwise the training would have gone on from it
        specs = [stored_as(name, like) for name, like in tensors]
        with ArtifactWriter(path, force=False) as writer:
            sink = writer.tensors("state", specs, max_shard_bytes=None, metadata={"format": "pt"})
            for spec, value in zip(specs, values, strict=True):
                flat = value.detach().cpu().clone().reshape(-1)  # memory that numpy has seen cannot be released
                sink.write(spec.name, 0, flat.view(torch.uint8).numpy())
            sink.close()
            document = {
                "format": FORMAT,
                "step": step,
                "seconds": seconds,
                "scalars": dict(scalars),
                "facts": self._facts,
                "files": {_TENSORS: writer.digests[_TENSORS]},
            }
            writer.add_bytes(_DOCUMENT, strictjson.pretty(document).encode())
            for name in (_TENSORS, _DOCUMENT):
                writer.place(name).chmod(0o600)
            writer.publish()
        for old in self._steps_on_disk()[KEPT:]:
            files.remove_tree(old)
        self._last = time.monotonic()

    def latest(self, progress: Progress, check: Callable[[State], None]) -> State | None:
        """The last whole state; damaged ones are told of and passed over.

        Args:
            check: raises FormatError for a state that this training cannot go on from.

        Raises:
            InputError: the states are those of another training.
        """
        for path in self._steps_on_disk()[: KEPT + 1]:  # one more, if a kill came before the oldest was deleted
            try:
                state = self._read(path)
                check(state)
                return state
            except (FormatError, OSError) as error:
                progress.note(f"ignoring the damaged state {path.name} ({error})")
        return None

    def _read(self, path: Path) -> State:
        try:
            document = strictjson.loads(files.read_file(path / _DOCUMENT, _LARGEST), path / _DOCUMENT)
        except InputError as error:
            raise FormatError(error.what, where=path / _DOCUMENT) from None
        try:
            if document["format"] != FORMAT:
                raise FormatError(f"has the format {document['format']!r}, not {FORMAT}", where=path)
            self._compare(document["facts"])
            if _digest(path / _TENSORS) != document["files"][_TENSORS]:
                raise FormatError("does not have the digest that was written down", where=path / _TENSORS)
            return State(int(document["step"]), float(document["seconds"]), dict(document["scalars"]), path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"is malformed ({type(error).__name__})", where=path / _DOCUMENT) from None

    def _compare(self, facts: Mapping[str, Any]) -> None:
        """Refuse the states of another training. Raises InputError."""
        names = sorted(set(facts) | set(self._facts))
        other = [name for name in names if facts.get(name) != self._facts.get(name)]
        if other:
            hint = "repeat the command as it was, or delete that folder to begin anew"
            raise InputError(f"holds a training with other {listed(other)}", where=self.path, hint=hint)

    def _steps_on_disk(self) -> list[Path]:
        """Folders of states, the last one first."""
        return sorted(self.path.glob("step-*"), reverse=True)

    def finish(self, manifest: str, digest: str) -> None:
        """Note the output that the training ends with; call it before that is published.

        Args:
            manifest: name of a file in the output. digest: its SHA-256.
        """
        if not self.path.is_dir():  # nothing was saved
            return
        document = strictjson.dumps({"manifest": manifest, "sha256": digest})
        files.write_file_atomically(self.path / _FINISHED, document.encode(), 0o600)

    def remove(self) -> None:
        """Delete all states: the output is there."""
        _remove(self.path)


def facts_of(options: Options, left_out: Collection[str]) -> dict[str, Any]:
    """Values of options that a training can only be continued with, by flag, as JSON gives them back.

    Args:
        left_out: names of options that may change.
    """
    given = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in left_out}
    return {
        "--" + name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
    }


def _digest(path: Path) -> str:
    """SHA-256 of a file of a state. Raises FormatError: it is not a plain file."""
    try:
        return file_digest(path)
    except InputError as error:
        raise FormatError(error.what, where=path) from None


def remove_finished(states_of: Path, out: Path) -> None:
    """Delete states whose training was killed after it had published its output, and before it had deleted them.

    Args:
        states_of: the path that the states are named after. out: the output.

    Raises:
        InputError, FormatError: what is there in place of `finished.json` cannot be read.
    """
    path = _states_of(states_of)
    if not (os.path.lexists(path / _FINISHED) and os.path.lexists(out)):
        return
    finished = strictjson.loads(files.read_file(path / _FINISHED, _LARGEST), path / _FINISHED)
    if not isinstance(finished, dict) or finished.get("manifest") not in MANIFESTS:
        raise FormatError("is malformed", where=path / _FINISHED, hint="delete the folder that it is in")
    manifest = out / finished["manifest"]
    if manifest.is_file() and file_digest(manifest) == finished.get("sha256"):
        _remove(path)


def _states_of(out: Path) -> Path:
    whole = Path(os.path.abspath(out))
    return files.beside(whole, f".{whole.name}.fedqsn-states")


def _remove(path: Path) -> None:
    """Delete a folder of states; the note that they are finished goes last, lest a kill leaves states without it."""
    for state in path.glob("*step-*"):
        files.remove_tree(state)
    files.remove_tree(path)
