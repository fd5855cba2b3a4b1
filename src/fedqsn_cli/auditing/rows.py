"""Rows of models and proxies side by side, chunk by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.inputs import OpenedProxy
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization import kernels

Array = NDArray[Any]
Floats = NDArray[np.float32]

CHUNK = 1 << 19  # elements; a few fp32 arrays of it stay in the cache


def has_tensor(model: PublicBase | None, task: TensorTask) -> bool:
    """Has the public base values for this tensor?"""
    return model is not None and task.name in model.tensors


def model_rows(model: OpenModel | PublicBase, task: TensorTask, first: int, rows: int) -> Floats:
    """Rows of a model's tensor in fp32, in the working view."""
    logical = model.tensors[task.name]
    x = model.read_rows(task.name, task.layout, first, rows)
    return np.asarray(plain(TensorTask(task.plan, logical, task.layout, None), x))


def shown_flags(proxy: OpenedProxy, task: TensorTask, first: int, rows: int) -> tuple[Array, Floats]:
    """Which elements of rows a proxy shows: row flags [rows], and fp32 [1, cols] or [rows, cols]."""
    visible = proxy.visible(task.name)
    cols = task.layout.view[2]
    if visible is None:
        return np.ones(rows, np.bool_), np.ones((1, cols), np.float32)
    row_flags, flags = task.layout.working(visible).split_flags(first, rows)
    return np.ascontiguousarray(row_flags), np.ascontiguousarray(flags, dtype=np.float32)


def plain(task: TensorTask, x: Array) -> Array:
    """Stored values as fp32 of the working view."""
    wide = kernels.widened(x, task.tensor.dtype).reshape(x.shape)
    return np.ascontiguousarray(wide.T) if task.layout.transposed else wide
