"""FQ008 and FQ002 over models of the owner's: hidden units of the truth, held against those of another model.

    --after    a merge must leave hidden units as they are, bit for bit
    --server   where clients trained the holes, what is in them must come from the public base

A proxy that was built again from such a server model shows its holes as they are, so the holes are what must be looked
at. Clients may learn something like what the owner knows; a unit that is there number for number, or that went straight
to the hidden one, was put there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.checks import Together, check, once
from fedqsn_cli.auditing.completeness import DOES_NOT_BELONG
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import Inputs, OwnerInputs, pair
from fedqsn_cli.auditing.invariants.holes import HIDDEN_UNIT_PRESENT
from fedqsn_cli.auditing.registry import Need, Rule
from fedqsn_cli.auditing.rows import as_float32
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.quantization.layout import row_chunks

Array = NDArray[Any]

_STRAIGHT = 0.99  # cosine between the way from the base to the hole and the way to the hidden unit
_LONG_ENOUGH = 16  # numbers of a unit; shorter ones, such as those of two token types, are parallel by chance
_BY_CHANCE = 16  # equal numbers that mean nothing

OWNER_AND_AFTER: Need[tuple[OwnerInputs, OpenModel]] = Need(
    ("--truth", "--after", "--key"), lambda inputs: pair(inputs.owner, inputs.after)
)
SERVER_AND_BASE: Need[tuple[OwnerInputs, tuple[OpenModel, PublicBase]]] = Need(
    ("--truth", "--key", "--public-base"), lambda inputs: pair(inputs.owner, pair(inputs.server, inputs.base))
)
MERGE_CHANGED_HIDDEN = Rule(
    "FQ008",
    "merge-changed-hidden",
    "hard",
    what="Hidden units of the global model before and after a merge must be equal, bit for bit.",
    why="No client saw them, so a change is an error, or deliberate.",
    fix="Merge again with `fedqsn merge` from the model before.",
    scope="merge",
    needs=(OWNER_AND_AFTER,),
)


def _hidden_tensors(owner: OwnerInputs, other: OpenModel) -> Iterator[tuple[TensorTask, UnitMask | None, bool]]:
    """The tensors of the truth, what is hidden of each, and whether the other model has it in dtype and shape."""
    for task in tensor_tasks(owner.truth, None, ServerMasks(owner.job).hidden):
        found = other.tensors.get(task.name)
        same = found is not None and (found.dtype, found.shape) == (task.tensor.dtype, task.tensor.shape)
        yield task, task.hidden, same


@check(MERGE_CHANGED_HIDDEN, once("after"), OWNER_AND_AFTER)
def merged_model(inputs: Inputs, group: Together, given: tuple[OwnerInputs, OpenModel]) -> Iterator[Entry]:
    """Compare the hidden units of the truth with those of the model after the merge."""
    owner, after = given
    (scope,), found = group.scopes, list[Finding]()
    if after.manifest is not None and after.kind == "server-model" and after.manifest.fill == "base":
        why = "its holes are filled with the public base; give the global model"
        yield MERGE_CHANGED_HIDDEN.not_run(scope, why)
        return
    for task, hidden, same in _hidden_tensors(owner, after):
        if not same:
            message = "the model after the merge lacks this tensor"
            found.append(MERGE_CHANGED_HIDDEN.finding(scope, message, tensor=task.name))
        elif hidden is not None and (changed := _changed(owner.truth, after, task, hidden)):
            message = "hidden units are not what they were (elements that differ)"
            found.append(
                MERGE_CHANGED_HIDDEN.finding(scope, message, tensor=task.name, value=float(changed), limit=0.0)
            )
    why = "hidden units were compared bit for bit with those before the merge"
    yield from MERGE_CHANGED_HIDDEN.checked(scope, why, found)


def _changed(truth: OpenModel, after: OpenModel, task: TensorTask, hidden: UnitMask) -> int:
    """Hidden elements that differ; a server model must hold zeros there."""
    changed = 0
    for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
        new = _bits(hidden.select(after.read_rows(task.name, task.layout, first, rows), first))
        if after.kind == "server-model":
            changed += int(np.count_nonzero(new))
        else:
            old = _bits(hidden.select(truth.read_rows(task.name, task.layout, first, rows), first))
            changed += int(np.count_nonzero(new != old))
    return changed


def _bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)


def _server(inputs: Inputs) -> list[Together]:
    return [] if inputs.server is None else [Together(("server",))]


@check(HIDDEN_UNIT_PRESENT, _server, SERVER_AND_BASE, more=", to look into the holes of the server model")
def server_holes(
    inputs: Inputs, group: Together, given: tuple[OwnerInputs, tuple[OpenModel, PublicBase]]
) -> Iterator[Entry]:
    """Compare the holes of the server model with the hidden units of the truth, seen from the public base."""
    owner, (server, base) = given
    (scope,), found = group.scopes, list[Finding]()
    for task, hidden, same in _hidden_tensors(owner, server):
        if not same:
            found.append(DOES_NOT_BELONG.finding(scope, "the server model lacks this tensor", tensor=task.name))
        elif hidden is not None:
            found += _in_holes((owner.truth, server, base), task, hidden, scope)
    why = "its holes were compared with hidden units, from the public base on"
    yield from HIDDEN_UNIT_PRESENT.checked(scope, why, found)


Models = tuple[OpenModel, OpenModel, PublicBase]
"""The truth, the server model, the public base."""


def _in_holes(models: Models, task: TensorTask, hidden: UnitMask, scope: str) -> Iterator[Finding]:
    """How many hidden units are in the holes of a tensor."""
    copies = differing = straight = 0
    sums = np.zeros((3, task.layout.view[2]))  # of columns, which go through all rows
    for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
        unit, hole, base = (_hidden_rows(model, task, hidden, first, rows) for model in models)
        secret, learnt = unit - base, hole - base
        copies += int(np.count_nonzero((hole == unit) & (secret != 0)))
        differing += int(np.count_nonzero(secret))
        products = np.stack([secret * learnt, secret * secret, learnt * learnt])
        if task.plan.axis == "row" and task.layout.view[2] >= _LONG_ENOUGH:
            straight += _straight(products.sum(axis=2))
        elif task.plan.axis == "column" and task.layout.view[0] == 1 and task.layout.view[1] >= _LONG_ENOUGH:
            sums[:, : products.shape[2]] += products.sum(axis=1)
    straight += _straight(sums)
    # Of fp32 numbers, a few of millions meet by chance. Numbers of 16 bits have few neighbours: what owner and clients
    # each moved a little from the same base often ends on the same one.
    allowed = _BY_CHANCE if task.tensor.dtype == "F32" else max(_BY_CHANCE, differing // 2)
    if copies > allowed or straight:
        message = "holes hold the values of hidden units, which no client was given (elements that are equal)"
        yield HIDDEN_UNIT_PRESENT.finding(scope, message, tensor=task.name, value=float(copies), limit=0.0)


def _hidden_rows(model: OpenModel | PublicBase, task: TensorTask, hidden: UnitMask, first: int, rows: int) -> Array:
    """Rows of a model in fp64, zeros where units are visible."""
    x = as_float32(task, model.read_rows(task.name, task.layout, first, rows)).astype(np.float64)
    return np.where(hidden.element_flags(first, rows), x, 0.0)


def _straight(products: Array) -> int:
    """Units that went straight to the hidden one: [3, units] of <secret, learnt>, |secret|², |learnt|²."""
    both, secret, learnt = products
    return int(np.count_nonzero(both > _STRAIGHT * np.sqrt(secret * learnt) + 1e-300))
