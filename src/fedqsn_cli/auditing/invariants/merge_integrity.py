"""FQ008: a merge must leave hidden units as they are, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, Report
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.quantization.layout import row_chunks

RULE = "FQ008"


def check_merged(inputs: Inputs, report: Report) -> None:
    """Compare the hidden units of the truth with those of the model after the merge."""
    if inputs.after is None or inputs.truth is None or inputs.job is None:
        report.skip(RULE, "after", "needs --truth, --after and --key")
        return
    after, truth = inputs.after, inputs.truth
    if after.manifest is not None and after.kind == "server-model" and after.manifest.fill == "base":
        report.skip(RULE, "after", "its holes are filled with the public base; give the global model")
        return
    found: list[Finding] = []
    for task in tensor_tasks(truth, None, ServerMasks(inputs.job).hidden):
        other = after.tensors.get(task.name)
        if other is None or (other.dtype, other.shape) != (task.tensor.dtype, task.tensor.shape):
            found.append(finding(RULE, "after", "the model after the merge lacks this tensor", tensor=task.name))
        elif task.hidden is not None and (changed := _changed(inputs, task)):
            message = "hidden units are not what they were (elements that differ)"
            found.append(finding(RULE, "after", message, tensor=task.name, value=float(changed), limit=0.0))
    report.add(RULE, "after", "hidden units were compared bit for bit with those before the merge", found)


def _changed(inputs: Inputs, task: TensorTask) -> int:
    """Hidden elements that differ; a server model must hold zeros there."""
    assert inputs.truth is not None and inputs.after is not None and task.hidden is not None
    changed = 0
    for first, rows in row_chunks(task.layout, 1, CHUNK_ELEMENTS):
        new = _bits(task.hidden.select(inputs.after.read_rows(task.name, task.layout, first, rows), first))
        if inputs.after.kind == "server-model":
            changed += int(np.count_nonzero(new))
        else:
            old = _bits(task.hidden.select(inputs.truth.read_rows(task.name, task.layout, first, rows), first))
            changed += int(np.count_nonzero(new != old))
    return changed


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(x).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)
