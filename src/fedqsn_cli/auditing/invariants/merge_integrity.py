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
from fedqsn_cli.models.flow import Flow, flows
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
    for flow in flows(truth, None, ServerMasks(inputs.job).hidden):
        other = after.tensors.get(flow.name)
        if other is None or (other.dtype, other.shape) != (flow.logical.dtype, flow.logical.shape):
            found.append(finding(RULE, "after", "the model after the merge lacks this tensor", tensor=flow.name))
        elif flow.hidden is not None and (changed := _changed(inputs, flow)):
            message = "hidden units are not what they were (elements that differ)"
            found.append(finding(RULE, "after", message, tensor=flow.name, value=float(changed), limit=0.0))
    report.add(RULE, "after", "hidden units were compared bit for bit with those before the merge", found)


def _changed(inputs: Inputs, flow: Flow) -> int:
    """Hidden elements that differ; a server model must hold zeros there."""
    assert inputs.truth is not None and inputs.after is not None and flow.hidden is not None
    changed = 0
    for first, rows in row_chunks(flow.storage, 1, CHUNK_ELEMENTS):
        new = _bits(flow.hidden.take(inputs.after.read_rows(flow.name, flow.storage, first, rows), first))
        if inputs.after.kind == "server-model":
            changed += int(np.count_nonzero(new))
        else:
            old = _bits(flow.hidden.take(inputs.truth.read_rows(flow.name, flow.storage, first, rows), first))
            changed += int(np.count_nonzero(new != old))
    return changed


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(x).view(np.uint32 if x.dtype.itemsize == 4 else np.uint16)
