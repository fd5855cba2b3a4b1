"""Error feedback: what encoding takes from an update is kept by the client, and added to the update of its next round.

    V = U + s e                                     on the units that are visible in this round
    e ← (V − decode(encode(V))) / s                 on these units; the others keep theirs

e is in the model's own coordinates, so that rounds with other masks, and with another scale s, add up. It is made of
private data: its file can be read by its owner only, and is never sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedqsn_cli.checkpoint import Checkpoint, write_file_atomically
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.training.visible import put_visible, visible_part

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

    def save(self) -> None:
        """Replace the file, for its owner's eyes only; call it once the update is out."""
        from safetensors.torch import save

        metadata = {"format": FORMAT, "job": self.job, "proxy_id": self.proxy_id}
        write_file_atomically(self.path, save(self.errors, metadata), mode=0o600)


def read_errors(path: Path, job: str, proxy_id: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """e of every tensor; zeros where there is no file yet.

    Args:
        job, proxy_id: of the proxy that is about to be trained. shapes: of its float tensors.

    Raises:
        InputError: the file is of another job, or has what an update of this proxy left over.
        FormatError: it is malformed.
    """
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
    """Refuse what is no residual, is of another job, or was written by a round with the same proxy."""
    if metadata.get("format") != FORMAT:
        raise FormatError("is not the residual of a client's updates", where=path)
    if metadata.get("job") != job:
        raise InputError("is the residual of another job", where=path, hint="give each job a --residual of its own")
    if metadata.get("proxy_id") == proxy_id:
        hint = "to train this proxy again, use the file as it was before"
        raise InputError("already holds what an update of this proxy left over", where=path, hint=hint)
