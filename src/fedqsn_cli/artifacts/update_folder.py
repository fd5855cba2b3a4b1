"""The shape of an update: what a client writes into update.safetensors, and what the owner expects there.

An update holds U = T − P (trained minus proxy) on the units that the client saw, one tensor for each float tensor of
the model, under its own name:

    axis      stored shape of U
    row       [lead, visible, ...rest], lead only for expert stacks
    column    [lead, rows, visible]
    element   [visible of all lead slices]
    None      the tensor's own shape; so it is for every tensor where clients train the fill, too
"""

from __future__ import annotations

UPDATE_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The safetensors dtype of each `--update-format`."""


def update_shape(shape: tuple[int, ...], axis: str | None, view: tuple[int, int, int], visible: int) -> tuple[int, ...]:
    """The shape of U for one tensor.

    Args:
        shape: of the tensor as it is stored.
        axis: along which its units lie: row, column, element, or None for a tensor without units.
        view: (lead, rows, cols) of the tensor.
        visible: number of visible units, over all lead slices; each slice has as many as the others.
    """
    lead, rows, cols = view
    if axis is None:
        return shape
    if axis == "element" or len(shape) == 1:
        return (visible,)
    per_slice = visible // lead
    if len(shape) == 2 and shape != (rows, cols):  # a bias for each slice of an expert stack
        return (lead, per_slice)
    matrix = (per_slice, cols) if axis == "row" else (rows, per_slice)
    return (lead, *matrix) if len(shape) == 3 else matrix
