"""FQ002, FQ003, FQ007 from the proxy alone: holes are empty, and every scale is attained by a code that is shipped.

Only for proxies that could not be built again byte for byte, which would have shown all of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.checks import check, each_proxy
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import BASE, OWNER, PROXY, Inputs
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import EXPORT_AGAIN, Rule, needed
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.quantization.bnb_format import Packing
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.layout import TensorLayout, row_chunks

Array = NDArray[Any]

_TINY = np.float32(1e-30)  # scales below lose bits before they are rounded


HIDDEN_UNIT_PRESENT = Rule(
    "FQ002",
    "hidden-unit-present",
    "hard",
    what="A hidden unit of the truth is in the proxy: in its own place, or under any other name, transposed, in a tied "
    "tensor, negated, scaled, or in another precision.",
    why="A unit that is sent is not hidden, whatever it is called.",
    fix="Remove the copy from the model, or give it the mask of the tensor that it copies (tie_word_embeddings, or a "
    "plan file); then export again in a new job.",
    scope="invariants",
    needs=(PROXY, OWNER),
)
SCALE_FROM_HIDDEN = Rule(
    "FQ003",
    "scale-from-hidden",
    "hard",
    what="A block scale that none of the codes it belongs to attains, or that equals the magnitude of a hidden weight.",
    why="A scale taken before the server mask tells the magnitude of one weight in every block, also of hidden ones.",
    fix="Take absmax after the server mask: quantize the server model, not the global model. " + EXPORT_AGAIN,
    scope="invariants",
    needs=(PROXY,),
)
CLEAR_COPY = Rule(
    "FQ007",
    "clear-copy",
    "hard",
    what="A hidden bias is not zero, or visible weights appear a second time, or more precisely than proxy.json says.",
    why="A bias leaks its neuron; a second, finer copy makes the quantization of the first one pointless.",
    fix=EXPORT_AGAIN,
    scope="invariants",
    needs=(PROXY,),
)


@check(HIDDEN_UNIT_PRESENT, each_proxy, problem="a tensor cannot be read")
def holes(inputs: Inputs, proxy: OpenedProxy) -> Iterator[Entry]:
    """Look into the holes of a proxy; tensors that were built again and found equal are left out."""
    if proxy.mismatched == set():
        for rule, what in ((SCALE_FROM_HIDDEN, "every scale"), (CLEAR_COPY, "every bias and every value")):
            yield from rule.checked(proxy.scope, f"{what} is the one that server-visible weights give")
        return
    found = [finding for name in proxy.suspects for finding in _holes(proxy, name)]
    scales = [finding for name in proxy.suspects for finding in _scales(inputs, proxy, name)]
    units, biases = (
        [finding for finding in found if finding.rule == rule.id] for rule in (HIDDEN_UNIT_PRESENT, CLEAR_COPY)
    )
    if proxy.manifest.fill == "zero":
        yield from HIDDEN_UNIT_PRESENT.checked(f"{proxy.scope} holes", "holes were checked", units)
        yield from CLEAR_COPY.checked(proxy.scope, "hidden biases were checked", biases)
    else:
        why = "holes hold the public base; whether it is that " + needed(OWNER, BASE)
        yield HIDDEN_UNIT_PRESENT.not_run(f"{proxy.scope} holes", why)
        yield CLEAR_COPY.not_run(proxy.scope, why)
    why = "scales were compared with the codes that are shipped with them"
    yield from SCALE_FROM_HIDDEN.checked(proxy.scope, why, scales)


def _holes(proxy: OpenedProxy, name: str) -> Iterator[Finding]:
    """Is everything zero, bit for bit, where nothing is shown?"""
    visible = proxy.visible(name)
    if visible is None or proxy.manifest.fill != "zero" or visible.flags.all():
        return
    layout = proxy.layout(name)
    mask = layout.working(visible)
    count = 0
    for first, rows in row_chunks(replace(layout, transposed=False), 4096, CHUNK_ELEMENTS):
        count += _nonzero(proxy, name, layout, mask, first, rows)
    if not count:
        return
    if layout.view[2] == 1 or len(proxy.tensors[name].shape) == 1:
        message = "hidden elements of a bias are not zero (how many)"
        yield CLEAR_COPY.finding(proxy.scope, message, tensor=name, value=float(count), limit=0.0)
    else:
        message = "elements of units that the proxy does not show are not zero (how many)"
        yield HIDDEN_UNIT_PRESENT.finding(proxy.scope, message, tensor=name, value=float(count), limit=0.0)


def _nonzero(proxy: OpenedProxy, name: str, layout: TensorLayout, mask: UnitMask, first: int, rows: int) -> int:
    """Hidden elements of rows that do not hold zero."""
    cols, tensor = layout.view[2], proxy.tensors[name]
    hidden = ~np.broadcast_to(mask.element_flags(first, rows), (rows, cols))
    if tensor.packing is not None and tensor.packing.kind == "pack4":
        start = first * cols
        codes = _unpacked(proxy, name, start, rows * cols).reshape(rows, cols)
        return int(np.count_nonzero(codes[hidden] != FORMATS[tensor.packing.format].zero_code))
    itemsize = proxy.checkpoint.entries[name].nbytes // max(1, math.prod(layout.view))
    out = np.empty((rows, cols), f"u{max(1, itemsize)}")
    proxy.checkpoint.read_into(name, first * cols * out.itemsize, out)
    return int(np.count_nonzero(out[hidden]))


def _unpacked(proxy: OpenedProxy, name: str, first: int, count: int) -> Array:
    """4-bit codes of elements, one a byte: [count]."""
    packed = proxy.codes(name, first // 2 * 2, count + first % 2)
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[first % 2 :][:count]


def _scales(inputs: Inputs, proxy: OpenedProxy, name: str) -> Iterator[Finding]:
    """Has every block whose elements are known a code of the largest magnitude?"""
    packing = proxy.tensors[name].packing
    if packing is None:
        return
    layout = proxy.layout(name)
    lead, rows, cols = layout.view
    block = cols if packing.kind == "pack8" else packing.block
    blocks = -(-lead * rows * cols // block)
    known, empty = _known_and_empty(inputs, proxy, name, layout, block)
    step = max(1, CHUNK_ELEMENTS // block)
    unexplained = of_nothing = 0
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        part = slice(first, first + count)
        scales = proxy.scales(name, packing, first, count)
        peaks = _attained(proxy, name, packing, layout, first, count)
        unexplained += int(np.count_nonzero(~peaks & known[part] & (scales > _TINY)))
        of_nothing += int(np.count_nonzero(empty[part] & (scales != 0))) if not packing.double else 0
    if unexplained:
        message = "block scales that no code attains, so they come from elsewhere (how many)"
        yield SCALE_FROM_HIDDEN.finding(proxy.scope, message, tensor=name, value=float(unexplained), limit=0.0)
    if of_nothing and proxy.manifest.fill == "zero":
        message = "scales of blocks that show nothing are not zero (how many)"
        yield SCALE_FROM_HIDDEN.finding(proxy.scope, message, tensor=name, value=float(of_nothing), limit=0.0)


def _known_and_empty(
    inputs: Inputs, proxy: OpenedProxy, name: str, layout: TensorLayout, block: int
) -> tuple[Array, Array]:
    """Blocks in which no element is hidden from this client only, and blocks whose scale must be zero."""
    visible = proxy.visible(name)
    lead, rows, cols = layout.view
    blocks = -(-lead * rows * cols // block)
    if visible is None:
        return np.ones(blocks, np.bool_), np.zeros(blocks, np.bool_)
    empty = layout.working(visible.inverted()).full_blocks(block)
    by_server, owner = None, inputs.owner
    if owner is not None:
        tensor = next(tensor for tensor in owner.truth.plan.tensors if tensor.name == name)
        by_server = ServerMasks(owner.job).hidden(tensor)
    if by_server is None:
        return layout.working(visible).full_blocks(block) & ~empty, empty
    known = UnitMask(visible.axis, visible.view, visible.flags | by_server.flags)
    return layout.working(known).full_blocks(block) & ~empty, empty


def _attained(proxy: OpenedProxy, name: str, packing: Packing, layout: TensorLayout, first: int, count: int) -> Array:
    """For each block: does one of its codes stand for the largest magnitude?"""
    cols = layout.view[2]
    if packing.kind == "pack8":
        codes = np.empty((count, cols), np.int8)
        proxy.checkpoint.read_into(name, first * cols, codes)
        return np.asarray(np.abs(codes.astype(np.int16)).max(axis=1) == 127)
    block = packing.block
    size = min(count * block, math.prod(layout.view) - first * block)
    top = np.abs(np.array(FORMATS[packing.format].values, np.float32)) == 1
    at_top = np.pad(top[_unpacked(proxy, name, first * block, size)], (0, count * block - size))
    return np.asarray(at_top.reshape(count, block).any(axis=1))
