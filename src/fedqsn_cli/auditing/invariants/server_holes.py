"""FQ002 over a server model whose holes clients trained: what stands there must come from the public base.

A proxy that was built again from such a server model shows its holes as they are, so the holes are what must be looked
at. Clients may learn something like what the owner knows; a unit that stands there number for number, or that went
straight to the hidden one, was put there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, Report
from fedqsn_cli.auditing.rows import plain
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.quantization.layout import row_chunks

RULE, SCOPE = "FQ002", "server"
_STRAIGHT = 0.99  # cosine between the way from the base to the hole and the way to the hidden unit

_CHANCE = 16  # equal numbers that mean nothing

Array = NDArray[Any]


def check_served(inputs: Inputs, report: Report) -> None:
    """Compare the holes of the server model with the hidden units of the truth, from where the public base stands."""
    if inputs.server is None:
        return
    if inputs.truth is None or inputs.job is None or inputs.base is None:
        report.skip(RULE, SCOPE, "needs --truth, --key and --public-base, to look into the holes of the server model")
        return
    found: list[Finding] = []
    for task in tensor_tasks(inputs.truth, None, ServerMasks(inputs.job).hidden):
        other = inputs.server.tensors.get(task.name)
        if other is None or (other.dtype, other.shape) != (task.tensor.dtype, task.tensor.shape):
            found.append(finding("FQ904", SCOPE, "the server model lacks this tensor", tensor=task.name))
        elif task.hidden is not None:
            found += _in_holes(inputs, task)
    report.add(RULE, SCOPE, "its holes were compared with hidden units, from the public base on", found)


def _in_holes(inputs: Inputs, task: TensorTask) -> Iterator[Finding]:
    """How many hidden units stand in the holes of a tensor."""
    copies = differing = straight = 0
    ways = np.zeros((3, task.layout.view[2]))  # of columns, which go through all rows
    for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
        hidden, hole, base = _parts(inputs, task, first, rows)
        secret, learnt = hidden - base, hole - base
        copies += int(np.count_nonzero((hole == hidden) & (secret != 0)))
        differing += int(np.count_nonzero(secret))
        products = np.stack([secret * learnt, secret * secret, learnt * learnt])
        if task.plan.axis == "row" and task.layout.view[2] > 1:
            straight += _count(products.sum(axis=2))
        elif task.plan.axis == "column" and task.layout.view[0] == 1:
            ways[:, : products.shape[2]] += products.sum(axis=1)
    straight += _count(ways)
    # Of fp32 numbers, a few of millions meet by chance. Numbers of 16 bits have few neighbours: what owner and clients
    # each moved a little from the same base often ends on the same one.
    rng = _CHANCE if task.tensor.dtype == "F32" else max(_CHANCE, differing // 2)
    if copies > rng or straight:
        message = "holes hold what hidden units hold, though nobody was given it (elements that are equal)"
        yield finding(RULE, SCOPE, message, tensor=task.name, value=float(copies), limit=0.0)


def _parts(inputs: Inputs, task: TensorTask, first: int, rows: int) -> tuple[Array, Array, Array]:
    """Hidden elements of rows: of the truth, of the server model, of the public base; zeros where units are visible."""
    assert task.hidden is not None and inputs.truth is not None and inputs.server is not None
    assert inputs.base is not None
    keep = task.hidden.element_flags(first, rows)
    made = []
    for model in (inputs.truth, inputs.server, inputs.base):
        x = plain(task, model.read_rows(task.name, task.layout, first, rows)).astype(np.float64)
        made.append(np.where(keep, x, 0.0))
    return made[0], made[1], made[2]


def _count(products: Array) -> int:
    """Units that went straight to the hidden one: [3, units] of <secret, learnt>, |secret|², |learnt|²."""
    both, secret, learnt = products
    return int(np.count_nonzero(both > _STRAIGHT * np.sqrt(secret * learnt) + 1e-300))
