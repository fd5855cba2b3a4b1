"""The result of a merge."""

from __future__ import annotations

from dataclasses import dataclass

from fedqsn_cli.merging.line_search import Search


@dataclass(frozen=True, slots=True)
class MergedClient:
    """The contribution of one client.

    Args:
        share: its share of all examples. relative_norm: norm of its Δ over the norm of the visible model.
        first_loss, last_loss: as the client reported them.
    """

    client: str
    round: int
    num_examples: int
    share: float
    relative_norm: float
    first_loss: float | None
    last_loss: float | None


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of `merge`.

    Args:
        covered: share of all parameters that at least one client trained.
        model_digest: that of the new model, for a server model.
        control: the update that was taken off those of the clients; its share is 0.
        server_lr: η of a merge. blend: λ of a restore.
        search: how that number was found, where it was auto.
    """

    path: str
    kind: str
    clients: tuple[MergedClient, ...]
    num_examples: int
    covered: float
    model_digest: str | None
    control: MergedClient | None = None
    server_lr: float | None = None
    blend: float | None = None
    search: Search | None = None
