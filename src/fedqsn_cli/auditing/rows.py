"""Rows of models and proxies side by side, chunk by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.layout import TensorLayout

Array = NDArray[Any]
Floats = NDArray[np.float32]

CHUNK = 1 << 19  # elements; a few fp32 arrays of it stay in the cache


def has_tensor(model: PublicBase | None, task: TensorTask) -> bool:
    """Has the public base values for this tensor?"""
    return model is not None and task.name in model.tensors


def model_rows(model: OpenModel | PublicBase, task: TensorTask, first: int, rows: int) -> Floats:
    """Rows of a model's tensor in fp32, in the working view."""
    stored = model.read_rows(task.name, task.layout, first, rows)
    return np.asarray(as_float32(TensorTask(task.plan, model.tensors[task.name], task.layout, None), stored))


def as_float32(task: TensorTask, stored: Array) -> Array:
    """Stored rows in fp32, in the working view."""
    wide = kernels.widened(stored, task.tensor.dtype).reshape(stored.shape)
    return np.ascontiguousarray(wide.T) if task.layout.transposed else wide


def shown_elements(proxy: OpenedProxy, name: str, layout: TensorLayout, first: int, rows: int) -> Array:
    """Which elements of rows of the working view a proxy shows; broadcasts to [rows, cols]."""
    visible = proxy.visible(name)
    return np.ones((1, 1), np.bool_) if visible is None else layout.working(visible).element_flags(first, rows)


def shown_flags(proxy: OpenedProxy, task: TensorTask, first: int, rows: int) -> tuple[Array, Floats]:
    """Which elements of rows a proxy shows: row flags [rows], and fp32 [1, cols] or [rows, cols]; both are needed."""
    visible = proxy.visible(task.name)
    if visible is None:
        return np.ones(rows, np.bool_), np.ones((1, task.layout.view[2]), np.float32)
    row_flags, flags = task.layout.working(visible).split_flags(first, rows)
    return np.ascontiguousarray(row_flags), np.ascontiguousarray(flags, dtype=np.float32)
