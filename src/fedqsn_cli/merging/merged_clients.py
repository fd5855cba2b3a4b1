"""What a merge reports about each client."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fedqsn_cli.merging.results import MergedClient
from fedqsn_cli.merging.rules.aggregation import Aggregation, clipped
from fedqsn_cli.merging.updates.admission import relative_norm
from fedqsn_cli.merging.updates.measures import ModelSizes, Movement
from fedqsn_cli.merging.updates.partial_sum import PartialReader
from fedqsn_cli.merging.updates.read_update import UpdateReader


def clients_of(
    readers: Sequence[UpdateReader],
    partials: Sequence[PartialReader],
    sizes: ModelSizes,
    parameters: int,
    how: Aggregation,
) -> tuple[MergedClient, ...]:
    """All clients, after everything was read: those whose updates were merged, then those in partial sums.

    Args:
        sizes, parameters: of the model.
    """
    own = [
        merged_client(reader, sizes, parameters, how.share(number), how.verdict(number))
        for number, reader in enumerate(readers)
    ]
    return *own, *(client for partial in partials for client in _summed(partial, how.whole))


def merged_client(reader: UpdateReader, sizes: ModelSizes, parameters: int, share: float, verdict: str) -> MergedClient:
    """One client whose update was read."""
    update, measures = reader.update, reader.measures
    tensor, unit = measures.largest(sizes)
    return MergedClient(
        client=update.client,
        round=update.release.round,
        num_examples=update.examples,
        share=share,
        norm=math.sqrt(measures.squares),
        relative_norm=relative_norm(measures, sizes),
        cosine=measures.cosine,
        coverage=measures.seen / parameters,
        largest_tensor=tensor,
        largest_unit=unit,
        verdict=verdict,
        first_loss=update.manifest.losses.first,
        last_loss=update.manifest.losses.last,
    )


def _summed(partial: PartialReader, whole: float) -> Iterator[MergedClient]:
    """The clients in a partial sum, as they were when it was made; how they point in the end is not known."""
    for client, release in zip(partial.sum.manifest.clients, partial.sum.releases, strict=True):
        yield MergedClient(
            client=client.client,
            round=release.round,
            num_examples=client.num_examples,
            share=client.num_examples / whole,
            norm=client.norm,
            relative_norm=client.relative_norm,
            cosine=None,
            coverage=client.coverage,
            largest_tensor=Movement.of(client.largest_tensor),
            largest_unit=Movement.of(client.largest_unit),
            verdict=clipped(client.factor),
            first_loss=client.first_loss,
            last_loss=client.last_loss,
        )
