"""Which updates of a round are merged: those that pass every check. What is refused is named, with the reason.

By default one update that is refused ends the merge; with --on-refused skip the others are merged without it. A check
of claims needs the manifests alone; values and norms are only known once everything was read (`survey`).
"""

from __future__ import annotations

import statistics
from pathlib import Path

from fedqsn_cli import validate
from fedqsn_cli.artifacts.partial_folder import SummedClient
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.merging.sums.exact_sum import MOST_TERMS
from fedqsn_cli.merging.updates.measures import ModelSizes, Movement, UpdateMeasures
from fedqsn_cli.merging.updates.partial_sum import PartialSum
from fedqsn_cli.merging.updates.read_update import ClientUpdate
from fedqsn_cli.merging.updates.refusals import Refusals
from fedqsn_cli.merging.updates.verify import Round
from fedqsn_cli.options import MergeOptions

MOST_TIMES_MEDIAN = 10
"""Without --max-examples: the largest number of examples, in medians of the round's updates."""
MOST_EXAMPLES = 2**53
"""Up to here sums of numbers of examples are exact in double precision."""
FEW = 3
"""With fewer updates there is no majority that a median could stand for."""


def check_claims(found: Round, max_examples: int | None, refusals: Refusals) -> Round:
    """What does not claim too many examples: no client may outvote all others.

    Raises:
        RefusedUpdate: a client claims more than `max_examples`; or without that limit, of three or more updates, more
            than ten times their median. A partial sum is refused as a whole.
    """
    counts = [count for each in found for _, count in each.claims]
    median = statistics.median(counts) if len(counts) >= FEW else None
    for each in found:
        client = each.client if isinstance(each, ClientUpdate) else None
        with refusals.noting(each.folder, client):
            for name, count in each.claims:
                claim = "it claims" if client is not None else f"client {name!r} in it claims"
                _check_claim(f"{claim} {count} examples, more than", count, max_examples, median, each.folder)
    return Round.of(refusals.without(list(found)))


def _check_claim(claim: str, count: int, most: int | None, median: float | None, folder: Path) -> None:
    if most is not None and count > most:
        raise RefusedUpdate(f"{claim} --max-examples {most}", where=folder)
    if most is None and median is not None and count > MOST_TIMES_MEDIAN * median:
        raise RefusedUpdate(
            f"{claim} {MOST_TIMES_MEDIAN} times the median of this round's updates, {median:g}",
            where=folder,
            hint="if its client really has so many, allow them with --max-examples",
        )


def require_summable(found: Round) -> None:
    """Refuse more updates than an exact sum can hold. Raises InputError."""
    if found.clients > MOST_TERMS or found.examples > MOST_EXAMPLES:
        what = f"{found.clients} updates with {found.examples} examples are more than a sum can hold"
        raise InputError(what, hint=f"merge {MOST_TERMS} updates with {MOST_EXAMPLES} examples at most")


def check_partials(found: Round, options: MergeOptions, refusals: Refusals) -> Round:
    """The updates, and the partial sums of updates that this merge would have admitted.

    Raises:
        InputError: this merge needs the updates themselves.
        RefusedUpdate: the updates in one were clipped otherwise, or one of them is larger than the limits.
    """
    if found.partials:
        _require_sums(found.partials[0], options)
    for each in found.partials:
        with refusals.noting(each.folder):
            if each.manifest.clip_norm != options.clip_norm:
                what = f"its updates were merged with --clip-norm {each.manifest.clip_norm}, not {options.clip_norm}"
                raise RefusedUpdate(what.replace("--clip-norm None", "no --clip-norm"), where=each.folder)
            for client in each.manifest.clients:
                _check_recorded(client, each.folder, options)
    return Round.of(refusals.without(list(found)))


def _require_sums(first: PartialSum, options: MergeOptions) -> None:
    """Refuse partial sums where a merge is not a sum of updates."""
    there, hint = f", and {first.folder} is a partial sum", "merge the updates"
    median = "the median of the norms needs all updates at once"
    validate.none_given(
        ("--rule", options.rule != "fedavg", f"{options.rule} needs all updates at once{there}", hint),
        ("--clip-norm", options.clip_norm == "auto", f"{median}{there}", hint),
        ("--noise-multiplier", options.noise_multiplier is not None, f"noise needs all updates at once{there}", hint),
        ("--keep-adapter", options.keep_adapter is not None, f"an adapter is made of all updates{there}", hint),
    )


def _check_recorded(client: SummedClient, folder: Path, options: MergeOptions) -> None:
    """Hold what was measured of an update in a partial sum against the limits. Raises RefusedUpdate."""
    _check_norm(f"the norm of client {client.client!r} is", client.relative_norm, folder, options)
    for record in (client.largest_tensor, client.largest_unit):
        _check_movement(client.client, Movement.of(record), folder, options)


def check_norms(update: ClientUpdate, measures: UpdateMeasures, sizes: ModelSizes, options: MergeOptions) -> None:
    """Refuse a step that is too large in proportion to the weights: as a whole, on one tensor, or on one unit.

    Raises:
        RefusedUpdate: the client, the tensor and the unit are named.
    """
    _check_norm("its norm is", relative_norm(measures, sizes), update.folder, options)
    for movement in measures.largest(sizes):
        _check_movement(update.client, movement, update.folder, options)


def _check_norm(what: str, norm: float, folder: Path, options: MergeOptions) -> None:
    if norm > options.max_update_norm:
        told = f"{what} {norm:.3g} times the model's, over --max-update-norm {options.max_update_norm:g}"
        raise RefusedUpdate(told, where=folder)


def _check_movement(client: str, movement: Movement, folder: Path, options: MergeOptions) -> None:
    if movement.ratio > options.unit_limit:
        place = movement.tensor if movement.unit is None else f"unit {movement.unit} of {movement.tensor}"
        raise RefusedUpdate(
            f"client {client!r} moves {place} by {movement.ratio:.3g} times the size of the weights there, "
            f"over --max-unit-norm {options.unit_limit:g}",
            where=folder,
        )


def relative_norm(measures: UpdateMeasures, sizes: ModelSizes) -> float:
    """Norm of a client's Δ over the norm of the visible model; 0 for a model of zeros."""
    squares = sizes.squares
    return float((measures.squares / squares) ** 0.5) if squares else 0.0


def require_enough(count: int, least: int, refusals: Refusals) -> None:
    """Refuse a round that too few updates are left of. Raises RefusedUpdate."""
    if count >= least:
        return
    given = count + len(refusals.refused)
    first = f"; the first one refused: {refusals.refused[0].reason}" if refusals.refused else ""
    raise RefusedUpdate(f"{count} of {given} updates can be merged, fewer than --min-clients {least}{first}")
