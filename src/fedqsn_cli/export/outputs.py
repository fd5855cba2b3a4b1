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
from fedqsn_cli.masks.job_masks import ClientMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.bnb_format import companion_arrays, companion_specs
from fedqsn_cli.quantization.codebooks import FORMATS
from fedqsn_cli.quantization.scales import Scales

Array = NDArray[Any]

METADATA = {"format": "pt"}  # of safetensors files, as transformers writes it


def tensor_specs(tensor_tasks: Sequence[TensorTask], quantization: Quantization | None) -> list[TensorSpec]:
    """All stored tensors of an output, in the order in which a pass writes them."""
    specs: list[TensorSpec] = []
    for task in tensor_tasks:
        specs += stored_specs(task, quantization)
    return specs


def stored_specs(task: TensorTask, quantization: Quantization | None) -> list[TensorSpec]:
    """The stored tensors that one tensor of the model becomes."""
    if quantization is None or not task.layout.kind.startswith("pack"):
        return [TensorSpec(task.name, task.tensor.dtype, task.tensor.shape)]
    _, rows, cols = task.layout.view
    return companion_specs(
        task.name,
        (rows, cols),
        task.tensor.dtype,
        quantization.format,
        quantization.block_size,
        quantization.double_quant,
    )


class ServerOutput:
    """Writes the chunks of a pass as they are: a server model or a quantized model."""

    def __init__(self, sink: TensorSink, quantization: Quantization | None) -> None:
        self._sink = sink
        self._quantization = quantization

    def take(self, task: TensorTask, chunk: Chunk) -> None:
        """Write the rows of a chunk."""
        write_rows(self._sink, task, chunk, chunk.values)

    def finish(self, task: TensorTask, scales: TensorScales | None) -> None:
        """Write the block scales."""
        if scales is not None:
            write_scales(self._sink, task, scales.model)


class ClientOutput:
    """Writes the proxy of one client: s · (M_C ⊙ Q(X) + (1 − M_C) ⊙ Q(R)).

    Args:
        sink: where it is written.
        quantization: of the pass.
        hidden: what the client mask hides of a tensor (stored view); None for nothing.
        factor: the scale s of a tensor.
    """

    def __init__(
        self,
        sink: TensorSink,
        quantization: Quantization | None,
        hidden: Callable[[TensorPlan], UnitMask | None],
        factor: Callable[[TensorPlan], np.float32],
    ) -> None:
        self._sink = sink
        self._quantization = quantization
        self._hidden = hidden
        self._factor = factor
        self._current: tuple[str, UnitMask | None] = ("", None)

    def take(self, task: TensorTask, chunk: Chunk) -> None:
        """Select what the client sees of a chunk, and write it."""
        values = chunk.values
        if task.plan.masked:
            mask = self._mask(task)
            if not task.layout.packed:
                values = self._select_values(task, chunk, mask)
            elif mask is not None and self._quantization is not None:
                values = self._select_codes(task, chunk, mask, self._quantization)
        write_rows(self._sink, task, chunk, values)

    def finish(self, task: TensorTask, scales: TensorScales | None) -> None:
        """Scale and select the block scales, and write them."""
        if scales is None:
            return
        selected = scales.model
        mask = self._mask(task)
        if mask is not None and self._quantization is not None:
            unseen = _unseen(task, mask).full_blocks(task.layout.scale_block(self._quantization.block_size))
            selected = selected.without(unseen, scales.base)
        if task.plan.masked:
            with np.errstate(over="ignore"):
                selected = selected.times(self._factor(task.plan))
            if not np.isfinite(selected.absmax).all():
                raise InputError("scaled it leaves the range of fp32", where=task.name, hint="use --no-rescale")
        write_scales(self._sink, task, selected)

    def _mask(self, task: TensorTask) -> UnitMask | None:
        """What is hidden of the tensor, in the view in which its values come; kept for all its chunks."""
        if self._current[0] != task.name:
            mask = self._hidden(task.plan)
            if mask is not None and task.layout.packed:
                mask = task.layout.working(mask)
            self._current = (task.name, mask)
        return self._current[1]

    def _select_values(self, task: TensorTask, chunk: Chunk, mask: UnitMask | None) -> Array:
        factor = self._factor(task.plan)
        if factor == 1 and mask is None:
            return chunk.values
        out = chunk.values.copy()
        if mask is not None:
            mask.overwrite(out, chunk.first, None if chunk.fill is None else chunk.fill.own)
        if factor != 1:
            kernels.scale_values(out, task.tensor.dtype, factor, out)
            if not kernels.all_finite(out, task.tensor.dtype):
                raise InputError(
                    f"scaled by {factor:.4g} it leaves {task.tensor.dtype}'s range",
                    where=task.name,
                    hint="use --no-rescale",
                )
        return out

    def _select_codes(self, task: TensorTask, chunk: Chunk, mask: UnitMask, quantization: Quantization) -> Array:
        codes = chunk.values.copy()
        fill = chunk.fill
        if task.layout.kind == "pack8":
            if fill is None or fill.shared is None:
                mask.overwrite(codes, chunk.first, None if fill is None else fill.own)
            else:
                mask.overwrite(codes, chunk.first, fill.shared)
                flags = _unseen(task, mask).flags_of_rows(chunk.first, chunk.rows)
                unseen = flags.reshape(-1, codes.shape[1]).all(axis=1)
                codes[np.broadcast_to(unseen, len(codes))] = fill.own[np.broadcast_to(unseen, len(codes))]
            return codes
        first = (fill.shared if fill.shared is not None else fill.own) if fill is not None else None
        _select_packed(codes, task, chunk, mask, FORMATS[quantization.format].zero_code, first)
        if fill is not None and fill.shared is not None:
            _select_unseen_blocks(codes, task, chunk, mask, fill.own, quantization.block_size)
        return codes


def _select_packed(
    codes: Array, task: TensorTask, chunk: Chunk, mask: UnitMask, zero_code: int, fill: Array | None
) -> None:
    """Overwrite the 4-bit codes of hidden units with those of the fill, or of zero."""
    cols = task.layout.view[2]
    start, count, hidden = chunk.first * cols, chunk.rows * cols, mask.flags
    if mask.axis == "row":
        kernels.select_codes_rows(
            codes, start=start, count=count, cols=cols, hidden=hidden, zero_code=zero_code, fill=fill
        )
    elif mask.axis == "column":
        kernels.select_codes_cols(
            codes, start=start, count=count, cols=cols, hidden=hidden[0], zero_code=zero_code, fill=fill
        )
    else:
        hidden = mask.flags_of_rows(chunk.first, chunk.rows).reshape(-1)
        kernels.select_codes_elements(codes, count=count, hidden=hidden, zero_code=zero_code, fill=fill)


def _select_unseen_blocks(codes: Array, task: TensorTask, chunk: Chunk, mask: UnitMask, own: Array, block: int) -> None:
    """Blocks that show nothing of the model take the public base under its own scale."""
    cols = task.layout.view[2]
    start, count = chunk.first * cols, chunk.rows * cols
    unseen = _unseen(task, mask).full_blocks(block)[start // block : -(-(start + count) // block)]
    flags = np.repeat(unseen, block)[:count]
    kernels.select_codes_elements(codes, count=count, hidden=flags, zero_code=0, fill=own)


def client_output(sink: TensorSink, quantization: Quantization | None, masks: ClientMasks) -> ClientOutput:
    """The output of one client's proxy."""
    return ClientOutput(sink, quantization, masks.hidden, masks.factor)


def _unseen(task: TensorTask, mask: UnitMask) -> UnitMask:
    """What a client does not see of a packed tensor: hidden by `mask` from this client, or by the server from all.

    A block of two units, each hidden by one of the two, shows nothing either, so its scale must not depend on them.
    """
    by_server = task.hidden
    if by_server is None:
        return mask
    return UnitMask(mask.axis, mask.view, mask.flags | task.layout.working(by_server).flags)


def write_rows(sink: TensorSink, task: TensorTask, chunk: Chunk, values: Array) -> None:
    """Write values or codes at the offset of their rows."""
    cols = task.layout.view[2]
    offset = chunk.first * cols // 2 if task.layout.kind == "pack4" else chunk.first * cols * values.itemsize
    sink.write(task.name, offset, values)


def write_scales(sink: TensorSink, task: TensorTask, scales: Scales) -> None:
    """Write the stored tensors that hold a tensor's block scales."""
    _, rows, cols = task.layout.view
    for name, array in companion_arrays(task.name, (rows, cols), task.tensor.dtype, scales).items():
        sink.write(name, 0, array)
