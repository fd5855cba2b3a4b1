"""FQ001, FQ003, FQ007: build each proxy again from server-visible weights alone, and compare every byte.

What hidden weights could have changed is changed nowhere if the bytes are equal. Where they differ, the tensor is
quantized in the ways that are known to leak, to say which one it was:

    before    s · M_V ⊙ Q(W)          scales taken before the server mask                    FQ003
    after     s · Q(M_V ⊙ W)          scales taken after the client mask                     FQ009
    not       s · M_V ⊙ W             not quantized at all, though proxy.json says so        FQ007
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.rows import plain
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.checkpoint import TensorSink
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.export.encode import encode
from fedqsn_cli.export.outputs import ClientOutput, stored_specs
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS, Digests, run
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.layout import row_chunks

Array = NDArray[Any]
RULE = "FQ001"


@dataclass
class ComparingSink:
    """Takes what an export would write, and compares it with what a proxy holds.

    Args:
        differing: bytes that differ, by stored tensor; -1 where it is missing or has another dtype or shape.
    """

    proxy: OpenedProxy
    differing: dict[str, int] = field(default_factory=dict)

    def expect(self, tasks: Sequence[TensorTask], how: Quantization | None) -> None:
        """Compare names, dtypes and shapes."""
        entries = self.proxy.checkpoint.entries
        for task in tasks:
            for spec in stored_specs(task, how):
                entry = entries.get(spec.name)
                same = entry is not None and (entry.dtype, entry.shape) == (spec.dtype, spec.shape)
                self.differing[spec.name] = 0 if same else -1

    def write(self, name: str, offset: int, data: Array) -> None:
        """Compare bytes with those of the proxy's tensor at the same place."""
        if self.differing[name] < 0:
            return
        wanted = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        found = np.empty(wanted.size, np.uint8)
        self.proxy.checkpoint.read_into(name, offset, found)
        if not np.array_equal(wanted, found):
            self.differing[name] += int(np.count_nonzero(wanted != found))


def check_rebuild(inputs: Inputs, report: Report, progress: Progress | None = None) -> dict[str, set[str]]:
    """Rebuild all proxies; one pass over the truth for all that have the same format.

    Returns:
        For each scope whose proxy was rebuilt, the logical tensors that are not as they should be.
    """
    odd: dict[str, set[str]] = {}
    tasks: dict[str, list[OpenedProxy]] = {}
    for proxy in inputs.proxies:
        reason = _missing(inputs, proxy)
        if reason is None:
            tasks.setdefault(f"{proxy.manifest.quantization} {proxy.manifest.fill}", []).append(proxy)
        else:
            report.skip(RULE, proxy.scope, reason)
    for proxies in tasks.values():
        try:
            odd |= _rebuild(inputs, proxies, report, progress or Silent())
        except FedqsnError as error:
            for proxy in proxies:
                report.findings.append(finding("FQ903", proxy.scope, f"cannot be built again: {error.what}"))
                report.skip(RULE, proxy.scope, "the truth cannot be quantized as the proxy says")
    return odd


def _missing(inputs: Inputs, proxy: OpenedProxy) -> str | None:
    if inputs.origin is None or inputs.job is None:
        return "needs --truth and --key; without them weights, norms, biases and their scale are taken on trust"
    if proxy.manifest.fill == "base" and inputs.base is None:
        return "needs --public-base: its holes are filled with the public base"
    return None


def _rebuild(inputs: Inputs, proxies: Sequence[OpenedProxy], report: Report, progress: Progress) -> dict[str, set[str]]:
    assert inputs.origin is not None and inputs.job is not None
    how, filled = proxies[0].manifest.quantization, proxies[0].manifest.fill == "base"
    server = ServerMasks(inputs.job)
    tasks = tensor_tasks(inputs.origin, how, server.hidden)
    sinks = [ComparingSink(proxy) for proxy in proxies]
    for sink in sinks:
        sink.expect(tasks, how)
    outputs = [
        ClientOutput(cast(TensorSink, sink), how, _client_mask(sink.proxy, server), _factor(sink.proxy))
        for sink in sinks
    ]
    base = inputs.base if filled else None
    digests = run(inputs.origin, tasks, how, outputs, base=base, progress=progress)
    odd = {}
    for sink in sinks:
        if _is_other_model(inputs, sink.proxy, digests):
            message = "the ledger says that this proxy was exported from another model than the truth"
            report.findings.append(finding("FQ904", sink.proxy.scope, message))
            report.skip(RULE, sink.proxy.scope, "the truth is not the model of this release")
            continue
        found, names = _judge(inputs, sink, tasks, how)
        report.add(RULE, sink.proxy.scope, "every tensor was built again from server-visible weights", found)
        odd[sink.proxy.scope] = names
    return odd


def _client_mask(proxy: OpenedProxy, server: ServerMasks) -> Any:
    """What the proxy hides beyond the server mask, by its own account."""

    def hidden(tensor: TensorPlan) -> UnitMask | None:
        visible = proxy.visible(tensor.name) if tensor.masked else None
        if visible is None:
            return None
        by_server = server.hidden(tensor)
        marks = ~visible.flags if by_server is None else ~(visible.flags | by_server.flags)
        return UnitMask(visible.axis, visible.view, marks) if marks.any() else None

    return hidden


def _factor(proxy: OpenedProxy) -> Any:
    return lambda tensor: proxy.factor(tensor.name)


def _is_other_model(inputs: Inputs, proxy: OpenedProxy, digests: Digests) -> bool:
    release = inputs.release(proxy)
    return release is not None and release.model_digest != digests.model


def _judge(
    inputs: Inputs, sink: ComparingSink, tasks: Sequence[TensorTask], how: Quantization | None
) -> tuple[list[Finding], set[str]]:
    """Findings for the tensors that differ, each with the way in which it leaks if that is known."""
    found, names = [], set()
    for task in tasks:
        counts = [sink.differing[spec.name] for spec in stored_specs(task, how)]
        if not any(counts):
            continue
        names.add(task.name)
        scope, name = sink.proxy.scope, task.name
        if min(counts) < 0:
            message = "is not stored in the dtype and shape in which an export stores it"
            found.append(finding("FQ007", scope, message, tensor=name))
        share = sum(count for count in counts if count > 0)
        if share:
            message = "bytes that server-visible weights do not explain"
            found.append(finding(RULE, scope, message, tensor=name, value=float(share), limit=0.0))
        leak = _explain(inputs, sink.proxy, task, how)
        if leak is not None:
            found.append(finding(leak, scope, _LEAKS[leak], tensor=name))
    return found, names


_RIGHT = "as it should be"  # where units are visible; then something else in the tensor differs
_LEAKS = {
    "FQ003": "its scales are those of the weights before the server mask",
    "FQ007": "its weights are not quantized, though proxy.json says that they are",
    "FQ009": "its scales were taken after the client mask, so they differ from client to client",
}


def _explain(inputs: Inputs, proxy: OpenedProxy, task: TensorTask, how: Quantization | None) -> str | None:
    """The rule that tells how a tensor was quantized, if it was in one of the known wrong ways."""
    if how is None or task.layout.kind == "raw" or proxy.manifest.fill != "zero":
        return None
    candidates = {_RIGHT, *_LEAKS}
    try:
        for first, rows in row_chunks(task.layout, how.block_size, CHUNK_ELEMENTS):
            candidates &= _explanations(inputs, proxy, task, how, first, rows)
            if not candidates:
                return None
    except (FedqsnError, kernels.NonFinite):
        return None
    return None if _RIGHT in candidates else min(candidates)


def _explanations(
    inputs: Inputs, proxy: OpenedProxy, task: TensorTask, how: Quantization, first: int, rows: int
) -> set[str]:
    """Which wrong ways give what the proxy shows in these rows."""
    assert inputs.origin is not None
    found = proxy.values(task.name, task.layout, first, rows)
    visible = proxy.visible(task.name)
    shown = np.ones(found.shape, np.bool_)
    x = inputs.origin.read_rows(task.name, task.layout, first, rows)
    masked, right = x.copy(), x.copy()
    if task.hidden is not None:
        task.hidden.overwrite(right, first, None)
    if visible is not None:
        visible.inverted().overwrite(masked, first, None)
        work = task.layout.working(visible)
        shown = np.broadcast_to(work.element_flags(first, rows), found.shape)
    factor = proxy.factor(task.name)
    guesses = {_RIGHT: decoded(task, how, right), "FQ003": decoded(task, how, x)}
    guesses |= {"FQ009": decoded(task, how, masked), "FQ007": plain(task, x)}
    tolerance = 0.02 if how.double_quant else {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}[task.tensor.dtype]
    if task.layout.packed and not how.double_quant:
        tolerance = 1e-5
    return {
        rule
        for rule, guess in guesses.items()
        if np.allclose(found[shown], guess[shown] * factor, rtol=tolerance, atol=1e-12)
    }


def decoded(task: TensorTask, how: Quantization, x: Array) -> Array:
    """Q(x) as fp32 values of the working view; x are rows as they are stored."""
    values, scales = encode(task, how, x)
    if scales is None:
        return plain(task, values)
    rows, cols = x.shape[::-1] if task.layout.transposed else x.shape
    out = np.empty((rows, cols), np.float32)
    if task.layout.kind == "pack8":
        kernels.dequantize_int8(values, scales, "F32", out)
    else:
        kernels.dequantize_4bit(values, scales, format=how.format, block=how.block_size, dtype="F32", out=out)
    return out
