"""The result of a merge."""

from __future__ import annotations

from dataclasses import dataclass

from fedqsn_cli.merging.ending.line_search import Search
from fedqsn_cli.merging.updates.measures import Movement


@dataclass(frozen=True, slots=True)
class MergedClient:
    """The contribution of one client.

    Args:
        share: its weight in the average, as a share of all; 0 if the rule left it out.
        norm: ‖Δ_k‖₂. relative_norm: the same over the norm of the visible model.
        cosine: of Δ_k and the merged step, over what the client saw; None where one of them is zero.
        coverage: share of all parameters that it trained.
        largest_tensor, largest_unit: what moved furthest in proportion to the weights.
        first_loss, last_loss: as the client reported them.
    """

    client: str
    round: int
    num_examples: int
    share: float
    norm: float
    relative_norm: float
    cosine: float | None
    coverage: float
    largest_tensor: Movement
    largest_unit: Movement
    verdict: str
    first_loss: float | None
    last_loss: float | None


@dataclass(frozen=True, slots=True)
class RefusedClient:
    """An update that was left out (--on-refused skip).

    Args:
        client: whose it is, as far as that is known.
    """

    folder: str
    client: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class KeptAdapter:
    """The merged step as one adapter.

    Args:
        rank: of its factors. summed_rank: the sum of the clients' ranks, with which it is exact.
        error: norm of what the rank cut off, over that of the step of the adapted tensors.
    """

    path: str
    rank: int
    summed_rank: int
    error: float


@dataclass(frozen=True, slots=True)
class MergePrivacy:
    """What all merges of a job with noise tell about any one client, at most.

    Args:
        clip_norm, noise_multiplier: of this merge. merges: how many the ledger has, this one included.
        epsilon, delta: of all of them together.
    """

    clip_norm: float
    noise_multiplier: float
    merges: int
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of `merge`.

    Args:
        covered: share of all parameters that at least one client trained.
        model_digest: that of the new model, for a server model.
        control: the update that was taken off those of the clients; its share is 0.
        server_lr: η of a merge. blend: λ of a restore.
        search: how that number was found, where it was auto.
        refused: updates that were left out.
        privacy: what noise was added, and what it is worth.
        adapter: the step as one adapter, if asked for.
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
    refused: tuple[RefusedClient, ...] = ()
    privacy: MergePrivacy | None = None
    adapter: KeptAdapter | None = None
