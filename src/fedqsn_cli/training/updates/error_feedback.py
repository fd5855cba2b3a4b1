"""Error feedback: what encoding takes from an update is kept by the client, and added to the update of its next round.

    V = U + s e                                     on the units that are visible in this round
    e ← (V − decode(encode(V))) / s                 on these units; the others keep theirs

e is in the model's own coordinates, so that rounds with other masks, and with another scale s, add up. It is made of
private data: its file can be read by its owner only, and is never sent.

The new e is on disk, as FILE.next, before the update is published, and takes its name afterwards. FILE.next says which
update it goes with; so the next round that finds one, after a kill, knows whether that update is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedqsn_cli.artifacts.manifests import UPDATE_MANIFEST, file_digest
from fedqsn_cli.checkpoint import Checkpoint, TensorSpec, plan_file, write_file_atomically
from fedqsn_cli.checkpoint.files import beside, require_file_target, sync_directory
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.training.steps.visible import put_visible, visible_part

FORMAT = "fedqsn-update-residual/1"


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """The residual of one job, as it is before and during a round.

    Args:
        path: its file, which need not be there. job, proxy_id: of the proxy that is trained.
        errors: e of each float tensor, in its own shape.
        visible: visible units of masked tensors. scales: s by tensor name, where it is not 1.
    """

    path: Path
    job: str
    proxy_id: str
    errors: dict[str, Tensor]
    visible: Mapping[str, UnitMask]
    scales: Mapping[str, float]

    def added(self, name: str, update: Tensor) -> Tensor:
        """V of one tensor."""
        kept = visible_part(self.errors[name], self.visible.get(name)).reshape(update.shape)
        return update + kept * self.scales.get(name, 1.0)

    def keep(self, name: str, error: Tensor) -> None:
        """Keep V − decode(encode(V)) of one tensor."""
        put_visible(self.errors[name], self.visible.get(name), error / self.scales.get(name, 1.0))

    def prepare(self, out: Path, digest: str) -> None:
        """Write the new file beside the old one, for its owner's eyes only; call it before the update is published.

        Args:
            out: where the update will be. digest: SHA-256 of its update.json.
        """
        metadata = {"format": FORMAT, "job": self.job, "proxy_id": self.proxy_id}
        pending = {"update": str(out.absolute()), "update_sha256": digest}
        specs = [TensorSpec(name, "F32", tuple(error.shape)) for name, error in self.errors.items()]
        head, _ = plan_file(specs, metadata | pending)  # safetensors' own writer shuffles the metadata
        values = (error.contiguous().numpy().tobytes() for error in self.errors.values())
        write_file_atomically(_next(self.path), head + b"".join(values), mode=0o600)

    def replace(self) -> None:
        """Let the new file take the place of the old one; call it once the update is published."""
        os.replace(_next(self.path), self.path)
        sync_directory(self.path.parent)


def settle(path: Path, proxy_id: str) -> None:
    """Finish what a killed round left: its new file counts if its update was published, and only then.

    Args:
        proxy_id: of the proxy that is about to be trained; if it is the same one, there is no update of it yet.

    Raises:
        InputError: the update that the new file goes with was moved or never published, and nobody knows which.
        FormatError: the new file is malformed.
    """
    pending = _next(path)
    if not os.path.lexists(pending):
        return
    with Checkpoint.open(pending) as stored:
        found = stored.metadata
    if _is_published(found):
        os.replace(pending, path)
    elif found.get("proxy_id") == proxy_id:
        os.unlink(pending)
    else:
        hint = f"if that update was sent, run: mv {pending} {path}; if not, delete {pending}"
        raise InputError("a killed round left it, and its update is not where it was made", where=pending, hint=hint)


def settle_published(path: Path) -> None:
    """Let the new file take the place of the old one if a round was killed between publishing its update and that."""
    pending = _next(path)
    if os.path.lexists(pending):
        with Checkpoint.open(pending) as stored:
            found = stored.metadata
        if _is_published(found):
            os.replace(pending, path)


def _is_published(found: Mapping[str, str]) -> bool:
    """Whether the update that a new file goes with is where it was made."""
    manifest = Path(found.get("update", "")) / UPDATE_MANIFEST
    return manifest.is_file() and file_digest(manifest) == found.get("update_sha256")


def require_place(path: Path) -> None:
    """Refuse, before any training, a path at which no residual can be written. Raises InputError."""
    for place in (path, _next(path)):
        require_file_target(place)


def _next(path: Path) -> Path:
    return beside(path, f"{path.name}.next")


def read_errors(path: Path, job: str, proxy_id: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """e of every tensor; zeros where there is no file yet.

    Args:
        job, proxy_id: of the proxy that is about to be trained. shapes: of its float tensors.

    Raises:
        InputError: the file is of another job, or has what an update of this proxy left over.
        FormatError: it is malformed.
    """
    settle(path, proxy_id)
    if not path.exists():
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
    with Checkpoint.open(path) as stored:
        _check_origin(path, stored.metadata, job, proxy_id)
        found = {name: (entry.dtype, entry.shape) for name, entry in stored.entries.items()}
        if found != {name: ("F32", shape) for name, shape in shapes.items()}:
            raise FormatError("does not have the tensors of the proxy", where=path)
        errors = {name: torch.from_numpy(stored.read(name)) for name in shapes}
    for name, error in errors.items():
        if not bool(error.isfinite().all()):
            raise FormatError("holds NaN or infinity", where=f"{path}: {name}")
    return errors


def _check_origin(path: Path, metadata: Mapping[str, str], job: str, proxy_id: str) -> None:
    """Refuse what is not a residual, is of another job, or was written by a round with the same proxy."""
    if metadata.get("format") != FORMAT:
        raise FormatError("is not the residual of a client's updates", where=path)
    if metadata.get("job") != job:
        raise InputError("is the residual of another job", where=path, hint="give each job a --residual of its own")
    if metadata.get("proxy_id") == proxy_id:
        hint = "to train this proxy again, use the file as it was before"
        raise InputError("already holds what an update of this proxy left over", where=path, hint=hint)
