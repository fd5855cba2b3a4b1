"""FQ002, FQ003, FQ007 from the proxy alone: holes are empty, and every scale is attained by a code that is shipped.

Only for proxies that could not be built again byte for byte, which would have shown all of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.kernels import attained, nonzero_codes
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.layout import TensorLayout, row_chunks

Array = NDArray[Any]

_TINY = np.float32(1e-30)  # scales below lose bits before they are rounded


def check_holes(inputs: Inputs, report: Report, odd: dict[str, set[str]]) -> None:
    """Look into the holes of every proxy; tensors that were built again and found equal are left out.

    Args:
        odd: for proxies that were built again, the tensors that differ.
    """
    for proxy in inputs.proxies:
        if proxy.scope in odd and not odd[proxy.scope]:
            for rule, why in (("FQ003", "every scale"), ("FQ007", "every bias and every value")):
                report.add(rule, proxy.scope, f"{why} is the one that server-visible weights give", [])
            continue
        names = odd.get(proxy.scope, set(proxy.tensors)) & set(proxy.tensors)
        try:
            holes = [one for name in sorted(names) for one in _holes(proxy, name)]
            scales = [one for name in sorted(names) for one in _scales(inputs, proxy, name)]
        except FedqsnError as error:
            report.findings.append(finding("FQ903", proxy.scope, f"a tensor cannot be read: {error.what}"))
            continue
        _sort_in(proxy, report, holes, scales)


def _sort_in(proxy: OpenedProxy, report: Report, holes: list[Finding], scales: list[Finding]) -> None:
    if proxy.manifest.fill == "zero":
        report.add("FQ002", f"{proxy.scope} holes", "holes were looked into", [f for f in holes if f.rule == "FQ002"])
        report.add("FQ007", proxy.scope, "hidden biases were looked at", [f for f in holes if f.rule == "FQ007"])
    else:
        why = "holes hold the public base; whether it is that needs --truth, --key and --public-base"
        report.skip("FQ002", f"{proxy.scope} holes", why)
        report.skip("FQ007", proxy.scope, why)
    report.add("FQ003", proxy.scope, "scales were held against the codes that are shipped with them", scales)


def _holes(proxy: OpenedProxy, name: str) -> Iterator[Finding]:
    """Is everything zero, bit for bit, where nothing is shown?"""
    visible = proxy.visible(name)
    if visible is None or proxy.manifest.fill != "zero" or visible.flags.all():
        return
    storage = proxy.layout(name)
    mask = storage.working(visible)
    count = 0
    for first, rows in _runs(storage):
        count += _nonzero(proxy, name, storage, mask, first, rows)
    if not count:
        return
    if storage.view[2] == 1 or len(proxy.tensors[name].shape) == 1:
        message = "hidden elements of a bias are not zero (how many)"
        yield finding("FQ007", proxy.scope, message, tensor=name, value=float(count), limit=0.0)
    else:
        message = "elements of units that the proxy does not show are not zero (how many)"
        yield finding("FQ002", proxy.scope, message, tensor=name, value=float(count), limit=0.0)


def _runs(storage: TensorLayout) -> Iterator[tuple[int, int]]:
    yield from row_chunks(
        TensorLayout(storage.kind, storage.geometry, False, storage.view, storage.axis), 4096, CHUNK_ELEMENTS
    )


def _nonzero(proxy: OpenedProxy, name: str, storage: TensorLayout, mask: UnitMask, first: int, rows: int) -> int:
    """Hidden elements of rows that do not hold zero."""
    cols = storage.view[2]
    if storage.kind == "pack4":
        packing = proxy.tensors[name].packing
        assert packing is not None
        zero = FORMATS[packing.format].zero_code
        start = first * cols
        packed = proxy.codes(name, start // 2 * 2, rows * cols + start % 2)
        if mask.axis == "element":
            flags = ~mask.flags_of_rows(first, rows).reshape(-1)
            return int(np.count_nonzero(unpacked(packed)[start % 2 :][: flags.size][flags] != zero))
        row_flags, col_flags = mask.split_flags(first, rows)
        return int(nonzero_codes(packed, start % 2, cols, row_flags, col_flags[0], zero))
    entry = proxy.checkpoint.entries[name]
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[
        max(1, entry.nbytes // max(1, storage_size(storage)))
    ]
    out = np.empty((rows, cols), kind)
    proxy.checkpoint.read_into(name, first * cols * out.itemsize, out)
    return int(np.count_nonzero(mask.inverted().select(out, first)))


def storage_size(storage: TensorLayout) -> int:
    """Elements of a tensor."""
    lead, rows, cols = storage.view
    return lead * rows * cols


def unpacked(packed: Array) -> Array:
    """4-bit codes, one a byte."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)


def _scales(inputs: Inputs, proxy: OpenedProxy, name: str) -> Iterator[Finding]:
    """Has every block whose elements are known a code of the largest magnitude?"""
    packing = proxy.tensors[name].packing
    if packing is None:
        return
    storage = proxy.layout(name)
    lead, rows, cols = storage.view
    block = cols if packing.kind == "pack8" else packing.block
    blocks = -(-lead * rows * cols // block)
    open_blocks, empty = _judged(inputs, proxy, name, storage, block)
    step = max(1, CHUNK_ELEMENTS // block)
    unexplained = of_nothing = 0
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        part = slice(first, first + count)
        scales = proxy.scales(name, first, count)
        peaks = _peaks(proxy, name, storage, first, count, block)
        unexplained += int(np.count_nonzero(~peaks & open_blocks[part] & (scales > _TINY)))
        of_nothing += int(np.count_nonzero(empty[part] & (scales != 0))) if not packing.double else 0
    if unexplained:
        message = "block scales that no code attains, so they come from elsewhere (how many)"
        yield finding("FQ003", proxy.scope, message, tensor=name, value=float(unexplained), limit=0.0)
    if of_nothing and proxy.manifest.fill == "zero":
        message = "scales of blocks that show nothing are not zero (how many)"
        yield finding("FQ003", proxy.scope, message, tensor=name, value=float(of_nothing), limit=0.0)


def _judged(inputs: Inputs, proxy: OpenedProxy, name: str, storage: TensorLayout, block: int) -> tuple[Array, Array]:
    """Blocks in which no element is hidden from this client only, and blocks whose scale must be zero."""
    visible = proxy.visible(name)
    lead, rows, cols = storage.view
    blocks = -(-lead * rows * cols // block)
    if visible is None:
        return np.ones(blocks, np.bool_), np.zeros(blocks, np.bool_)
    empty = storage.working(visible.inverted()).full_blocks(block)
    by_server = None
    if inputs.job is not None and inputs.truth is not None:
        tensor = next(one for one in inputs.truth.plan.tensors if one.name == name)
        by_server = ServerMasks(inputs.job).hidden(tensor)
    if by_server is None:
        return storage.working(visible).full_blocks(block) & ~empty, empty
    known = UnitMask(visible.axis, visible.view, visible.flags | by_server.flags)
    return storage.working(known).full_blocks(block) & ~empty, empty


def _peaks(proxy: OpenedProxy, name: str, storage: TensorLayout, first: int, count: int, block: int) -> Array:
    """For each block: does one of its codes stand for the largest magnitude?"""
    lead, rows, cols = storage.view
    total = lead * rows * cols
    out = np.empty(count, np.bool_)
    if storage.kind == "pack8":
        codes = np.empty((count, cols), np.int8)
        proxy.checkpoint.read_into(name, first * cols, codes)
        return np.asarray(np.abs(codes.astype(np.int16)).max(axis=1) == 127)
    packing = proxy.tensors[name].packing
    assert packing is not None
    top = np.abs(np.array(FORMATS[packing.format].values, np.float32)) == 1
    size = min(count * block, total - first * block)
    attained(proxy.codes(name, first * block, size), size, block, top, out)
    return out
