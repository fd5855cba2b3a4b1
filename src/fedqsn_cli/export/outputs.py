"""What a pass over the model writes: the server's own model, or the proxy of one client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.checkpoint import TensorSink, TensorSpec
from fedqsn_cli.errors import InputError
from fedqsn_cli.export.pipeline import Chunk, TensorScales
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.flow import Flow
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.bnb_format import companion_arrays, companion_specs
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.scales import Scales

Array = NDArray[Any]


def tensor_specs(flows: Sequence[Flow], how: Quantization | None) -> list[TensorSpec]:
    """All stored tensors of an output, in the order in which a pass writes them."""
    specs: list[TensorSpec] = []
    for flow in flows:
        specs += stored_specs(flow, how)
    return specs


def stored_specs(flow: Flow, how: Quantization | None) -> list[TensorSpec]:
    """The stored tensors that one tensor of the model becomes."""
    if how is None or not flow.storage.kind.startswith("pack"):
        return [TensorSpec(flow.name, flow.logical.dtype, flow.logical.shape)]
    _, rows, cols = flow.storage.view
    return companion_specs(flow.name, (rows, cols), flow.logical.dtype, how.format, how.block_size, how.double_quant)


class ServerOutput:
    """Writes what the pass makes, as it is: a server model or a quantized model."""

    def __init__(self, sink: TensorSink, how: Quantization | None) -> None:
        self._sink = sink
        self._how = how

    def take(self, flow: Flow, chunk: Chunk) -> None:
        """Write the rows of a chunk."""
        write_rows(self._sink, flow, chunk, chunk.values)

    def finish(self, flow: Flow, scales: TensorScales | None) -> None:
        """Write the block scales."""
        if scales is not None:
            write_scales(self._sink, flow, scales.model)


class ClientOutput:
    """Writes the proxy of one client: s · (M_C ⊙ Q(X) + (1 − M_C) ⊙ Q(R)).

    Args:
        sink: where to.
        how: quantization of the pass.
        hidden: what the client mask hides of a tensor (stored view); None for nothing.
        factor: the scale s of a tensor.
    """

    def __init__(
        self,
        sink: TensorSink,
        how: Quantization | None,
        hidden: Callable[[TensorPlan], UnitMask | None],
        factor: Callable[[TensorPlan], np.float32],
    ) -> None:
        self._sink = sink
        self._how = how
        self._hidden = hidden
        self._factor = factor
        self._current: tuple[str, UnitMask | None] = ("", None)

    def take(self, flow: Flow, chunk: Chunk) -> None:
        """Select what the client sees of a chunk, and write it."""
        values = chunk.values
        if flow.tensor.masked:
            mask = self._mask(flow)
            if not flow.storage.packed:
                values = self._select_values(flow, chunk, mask)
            elif mask is not None:
                values = self._select_codes(flow, chunk, mask)
        write_rows(self._sink, flow, chunk, values)

    def finish(self, flow: Flow, scales: TensorScales | None) -> None:
        """Scale and select the block scales, and write them."""
        if scales is None:
            return
        chosen = scales.model
        mask = self._mask(flow)
        if mask is not None and self._how is not None:
            unseen = _unseen(flow, mask).full_blocks(flow.storage.scale_block(self._how.block_size))
            chosen = chosen.without(unseen, scales.base)
        if flow.tensor.masked:
            with np.errstate(over="ignore"):
                chosen = chosen.times(self._factor(flow.tensor))
            if not np.isfinite(chosen.absmax).all():
                raise InputError("scaled it leaves the range of fp32", where=flow.name, hint="use --no-rescale")
        write_scales(self._sink, flow, chosen)

    def _mask(self, flow: Flow) -> UnitMask | None:
        """What is hidden of the tensor, in the view in which its values come; kept while the tensor goes by."""
        if self._current[0] != flow.name:
            mask = self._hidden(flow.tensor)
            if mask is not None and flow.storage.packed:
                mask = flow.storage.working(mask)
            self._current = (flow.name, mask)
        return self._current[1]

    def _select_values(self, flow: Flow, chunk: Chunk, mask: UnitMask | None) -> Array:
        factor = self._factor(flow.tensor)
        if factor == 1 and mask is None:
            return chunk.values
        out = chunk.values.copy()
        if mask is not None:
            mask.overwrite(out, chunk.first, None if chunk.fill is None else chunk.fill.own)
        if factor != 1:
            kernels.scale_values(out, flow.logical.dtype, factor, out)
            if not kernels.all_finite(out, flow.logical.dtype):
                raise InputError(
                    f"scaled by {factor:.4g} it leaves {flow.logical.dtype}'s range",
                    where=flow.name,
                    hint="use --no-rescale",
                )
        return out

    def _select_codes(self, flow: Flow, chunk: Chunk, mask: UnitMask) -> Array:
        codes = chunk.values.copy()
        fill = chunk.fill
        if flow.storage.kind == "pack8":
            if fill is None or fill.shared is None:
                mask.overwrite(codes, chunk.first, None if fill is None else fill.own)
            else:
                mask.overwrite(codes, chunk.first, fill.shared)
                flags = _unseen(flow, mask).of_rows(chunk.first, chunk.rows)
                unseen = flags.reshape(-1, codes.shape[1]).all(axis=1)
                codes[np.broadcast_to(unseen, len(codes))] = fill.own[np.broadcast_to(unseen, len(codes))]
            return codes
        first = (fill.shared if fill.shared is not None else fill.own) if fill is not None else None
        self._select_packed(flow, chunk, mask, codes, first)
        if fill is not None and fill.shared is not None and self._how is not None:
            self._select_unseen_blocks(flow, chunk, mask, codes, fill.own, self._how.block_size)
        return codes

    def _select_packed(self, flow: Flow, chunk: Chunk, mask: UnitMask, codes: Array, fill: Array | None) -> None:
        assert self._how is not None
        cols = flow.storage.view[2]
        count, zero = chunk.rows * cols, FORMATS[self._how.format].zero_code
        if mask.axis == "row":
            kernels.select_codes_rows(
                codes, start=chunk.first * cols, count=count, cols=cols, hidden=mask.marks, zero_code=zero, fill=fill
            )
        elif mask.axis == "column":
            kernels.select_codes_cols(
                codes, start=chunk.first * cols, count=count, cols=cols, hidden=mask.marks[0], zero_code=zero, fill=fill
            )
        else:
            flags = mask.of_rows(chunk.first, chunk.rows).reshape(-1)
            kernels.select_codes_elements(codes, count=count, hidden=flags, zero_code=zero, fill=fill)

    def _select_unseen_blocks(
        self, flow: Flow, chunk: Chunk, mask: UnitMask, codes: Array, own: Array, block: int
    ) -> None:
        """Blocks that show nothing of the model take the public base under its own scale."""
        cols = flow.storage.view[2]
        start, count = chunk.first * cols, chunk.rows * cols
        unseen = _unseen(flow, mask).full_blocks(block)[start // block : -(-(start + count) // block)]
        flags = np.repeat(unseen, block)[:count]
        kernels.select_codes_elements(codes, count=count, hidden=flags, zero_code=0, fill=own)


def _unseen(flow: Flow, mask: UnitMask) -> UnitMask:
    """What a client does not see of a packed tensor, whoever hides it: `mask` from this client, the server from all.

    A block of two units, each hidden by one of them, shows nothing either, so its scale must not speak of the second.
    """
    by_server = flow.hidden
    if by_server is None:
        return mask
    return UnitMask(mask.axis, mask.view, mask.marks | flow.storage.working(by_server).marks)


def write_rows(sink: TensorSink, flow: Flow, chunk: Chunk, values: Array) -> None:
    """Write values or codes where their rows belong."""
    cols = flow.storage.view[2]
    offset = chunk.first * cols // 2 if flow.storage.kind == "pack4" else chunk.first * cols * values.itemsize
    sink.write(flow.name, offset, values)


def write_scales(sink: TensorSink, flow: Flow, scales: Scales) -> None:
    """Write the stored tensors that hold a tensor's block scales."""
    _, rows, cols = flow.storage.view
    for name, array in companion_arrays(flow.name, (rows, cols), flow.logical.dtype, scales).items():
        sink.write(name, 0, array)
