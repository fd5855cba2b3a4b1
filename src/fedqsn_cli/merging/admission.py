"""Which updates of a round are merged: those that pass every check. What is refused is named, with the reason.

By default one update that is refused ends the merge; with --on-refused skip the others are merged without it. A check
of claims needs the manifests alone; values and norms are only known once everything was read (`survey`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedqsn_cli.errors import RefusedUpdate
from fedqsn_cli.merging.measures import ModelSizes, UpdateMeasures
from fedqsn_cli.merging.read_update import ClientUpdate
from fedqsn_cli.merging.refusals import Refusals
from fedqsn_cli.options import MergeOptions

MOST_TIMES_MEDIAN = 10
"""Without --max-examples: the largest number of examples, in medians of the round's updates."""
FEW = 3
"""With fewer updates there is no majority that a median could stand for."""


def check_claims(updates: Sequence[ClientUpdate], max_examples: int | None, refusals: Refusals) -> list[ClientUpdate]:
    """The updates that do not claim too many examples: no client may outvote all others.

    Raises:
        RefusedUpdate: one claims more than `max_examples`; or without that limit, of three or more updates, more than
            ten times their median.
    """
    median = statistics.median([update.examples for update in updates]) if len(updates) >= FEW else None
    for update in updates:
        with refusals.noting(update.folder, update.client):
            _check_claim(update, max_examples, median)
    return refusals.without(updates)


def _check_claim(update: ClientUpdate, most: int | None, median: float | None) -> None:
    claim = f"it claims {update.examples} examples, more than"
    if most is not None and update.examples > most:
        raise RefusedUpdate(f"{claim} --max-examples {most}", where=update.folder)
    if most is None and median is not None and update.examples > MOST_TIMES_MEDIAN * median:
        raise RefusedUpdate(
            f"{claim} {MOST_TIMES_MEDIAN} times the median of this round's updates, {median:g}",
            where=update.folder,
            hint="if its client really has so many, allow them with --max-examples",
        )


def check_norms(update: ClientUpdate, measures: UpdateMeasures, sizes: ModelSizes, options: MergeOptions) -> None:
    """Refuse a step that is too large in proportion to the weights: as a whole, on one tensor, or on one unit.

    Raises:
        RefusedUpdate: the client, the tensor and the unit are named.
    """
    norm, limit = relative_norm(measures, sizes), options.max_update_norm
    if norm > limit:
        what = f"its norm is {norm:.3g} times the model's, over --max-update-norm {limit:g}"
        raise RefusedUpdate(what, where=update.folder)
    for excess in measures.largest(sizes):
        if excess.ratio > options.unit_limit:
            place = excess.tensor if excess.unit is None else f"unit {excess.unit} of {excess.tensor}"
            raise RefusedUpdate(
                f"client {update.client!r} moves {place} by {excess.ratio:.3g} times the size of the weights there, "
                f"over --max-unit-norm {options.unit_limit:g}",
                where=update.folder,
            )


def relative_norm(measures: UpdateMeasures, sizes: ModelSizes) -> float:
    """Norm of a client's Δ over the norm of the visible model; 0 for a model of zeros."""
    squares = sizes.squares
    return float((measures.squares / squares) ** 0.5) if squares else 0.0


def require_enough(updates: Sequence[ClientUpdate], least: int, refusals: Refusals) -> None:
    """Refuse a round that too few updates are left of. Raises RefusedUpdate."""
    if len(updates) >= least:
        return
    given = len(updates) + len(refusals.refused)
    first = f"; the first one refused: {refusals.refused[0].reason}" if refusals.refused else ""
    raise RefusedUpdate(f"{len(updates)} of {given} updates can be merged, fewer than --min-clients {least}{first}")
