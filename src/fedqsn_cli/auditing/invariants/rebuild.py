"""FQ001, FQ003, FQ007: build each proxy again from server-visible weights alone, and compare every byte.

What hidden weights could have changed is changed nowhere if the bytes are equal. Where they differ, the tensor is
quantized in the ways that are known to leak, to say which one it was:

    before    s · M_V ⊙ Q(W)          scales taken before the server mask                    FQ003
    after     s · Q(M_V ⊙ W)          scales taken after the client mask                     FQ009
    not       s · M_V ⊙ W             not quantized at all, though proxy.json says so        FQ007
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.artifacts.manifests import Quantization
from fedqsn_cli.auditing.checks import Together, check, grouped
from fedqsn_cli.auditing.completeness import DOES_NOT_BELONG
from fedqsn_cli.auditing.findings import Entry, Finding
from fedqsn_cli.auditing.inputs import BASE, ORIGIN, OWNER, PROXY, Inputs
from fedqsn_cli.auditing.invariants.holes import CLEAR_COPY, SCALE_FROM_HIDDEN
from fedqsn_cli.auditing.invariants.same_codes import CODES_DIFFER
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import EXPORT_AGAIN, Rule
from fedqsn_cli.auditing.rows import as_float32, shown_elements
from fedqsn_cli.checkpoint import TensorSink
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.export.encode import encode
from fedqsn_cli.export.outputs import ClientOutput, stored_specs
from fedqsn_cli.export.pipeline import CHUNK_ELEMENTS, run
from fedqsn_cli.kernels.digests import Algorithm, algorithm_of
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.job_masks import ServerMasks
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.planning.tensor_plan import TensorPlan
from fedqsn_cli.quantization import kernels
from fedqsn_cli.quantization.layout import row_chunks

Array = NDArray[Any]


@dataclass
class ComparingSink:
    """Takes what an export would write, and compares it with what a proxy holds.

    Args:
        differing: bytes that differ, by stored tensor; -1 where it is missing or has another dtype or shape.
    """

    proxy: OpenedProxy
    differing: dict[str, int] = field(default_factory=dict)

    def expect(self, tasks: Sequence[TensorTask], quantization: Quantization | None) -> None:
        """Compare names, dtypes and shapes."""
        entries = self.proxy.checkpoint.entries
        for task in tasks:
            for spec in stored_specs(task, quantization):
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


HIDDEN_INFLUENCE = Rule(
    "FQ001",
    "hidden-influence",
    "hard",
    what="The proxy is built again from server-visible weights of the truth; every byte of every tensor must be equal.",
    why="A byte that server-visible weights do not explain may carry hidden ones.",
    fix=EXPORT_AGAIN + " If it happens again, the exporting tool computes with hidden weights.",
    scope="invariants",
    needs=(PROXY, OWNER),
)


def each_format(inputs: Inputs) -> list[Together]:
    """The proxies of each format, which one pass over the truth builds again."""

    def kind(proxy: OpenedProxy) -> object:
        said = proxy.manifest
        return None if proxy.reproduced else (str(said.quantization), said.fill, _algorithm(inputs, proxy))

    return grouped(inputs.proxies, kind)


def _algorithm(inputs: Inputs, proxy: OpenedProxy) -> Algorithm:
    """That of the digest of the model in the ledger."""
    release = inputs.release(proxy)
    return algorithm_of(release.model_digest if release is not None else None)


@check(
    HIDDEN_INFLUENCE,
    each_format,
    ORIGIN,
    more="; without them weights, norms, biases and their scale are taken on trust",
    problem="cannot be built again",
    failed="the truth cannot be quantized as the proxy says",
)
def rebuild(inputs: Inputs, group: Together, given: tuple[OpenModel, JobKey]) -> Iterator[Entry]:
    """Build proxies again, and note which of their tensors are not as they should be."""
    if group.proxies[0].reproduced:
        for scope in group.scopes:
            yield from HIDDEN_INFLUENCE.checked(scope, "the release was made again from server-visible weights")
        return
    (origin, job), manifest = given, group.proxies[0].manifest
    quantization, filled = manifest.quantization, manifest.fill == "base"
    if filled and inputs.base is None:
        for scope in group.scopes:
            yield HIDDEN_INFLUENCE.lacks(scope, BASE, more=": its holes are filled with the public base")
        return
    server = ServerMasks(job)
    tasks = tensor_tasks(origin, quantization, server.hidden_on_the_way)
    sinks = [ComparingSink(proxy) for proxy in group.proxies]
    for sink in sinks:
        sink.expect(tasks, quantization)
    outputs = [
        ClientOutput(
            cast(TensorSink, sink), quantization, _client_mask(sink.proxy, server), _rescale_factor(sink.proxy)
        )
        for sink in sinks
    ]
    base = inputs.base if filled else None
    mismatched: dict[str, set[str]] = {}
    algorithm = _algorithm(inputs, group.proxies[0])
    digests = run(origin, tasks, quantization, outputs, base=base, algorithm=algorithm, progress=inputs.progress)
    for sink in sinks:
        scope, release = sink.proxy.scope, inputs.release(sink.proxy)
        if release is not None and release.model_digest != digests.model:
            message = "the ledger says that this proxy was exported from another model than the truth"
            yield DOES_NOT_BELONG.finding(scope, message)
            yield HIDDEN_INFLUENCE.not_run(scope, "the truth is not the model of this release")
            continue
        found = list(_mismatches(origin, sink, tasks, quantization))
        why = "every tensor was built again from server-visible weights"
        yield from HIDDEN_INFLUENCE.checked(scope, why, found)
        mismatched[scope] = {name for finding in found if (name := finding.tensor) is not None}
    for proxy in group.proxies:
        proxy.mismatched = mismatched.get(proxy.scope)


def _client_mask(proxy: OpenedProxy, server: ServerMasks) -> Callable[[TensorPlan], UnitMask | None]:
    """What the proxy hides beyond the server mask, by its own account."""

    def hidden(tensor: TensorPlan) -> UnitMask | None:
        visible = proxy.visible(tensor.name) if tensor.masked else None
        if visible is None:
            return None
        by_server = server.hidden(tensor)
        marks = ~visible.flags if by_server is None else ~(visible.flags | by_server.flags)
        return UnitMask(visible.axis, visible.view, marks) if marks.any() else None

    return hidden


def _rescale_factor(proxy: OpenedProxy) -> Callable[[TensorPlan], np.float32]:
    return lambda tensor: proxy.factor(tensor.name)


def _mismatches(
    origin: OpenModel, sink: ComparingSink, tasks: Sequence[TensorTask], quantization: Quantization | None
) -> Iterator[Finding]:
    """Findings for the tensors that differ, each with the way in which it leaks if that is known."""
    scope = sink.proxy.scope
    for task in tasks:
        counts = [sink.differing[spec.name] for spec in stored_specs(task, quantization)]
        if min(counts) < 0:
            message = "is not stored in the dtype and shape in which an export stores it"
            yield CLEAR_COPY.finding(scope, message, tensor=task.name)
        share = sum(count for count in counts if count > 0)
        if share:
            message = "bytes that server-visible weights do not explain"
            yield HIDDEN_INFLUENCE.finding(scope, message, tensor=task.name, value=float(share), limit=0.0)
        leak = _explain(origin, sink.proxy, task, quantization) if any(counts) else None
        if leak is not None:
            yield leak.finding(scope, _LEAKS[leak], tensor=task.name)


_LEAKS = {  # in the order in which they are named where several explain the same values
    SCALE_FROM_HIDDEN: "its scales are those of the weights before the server mask",
    CLEAR_COPY: "its weights are not quantized, though proxy.json says that they are",
    CODES_DIFFER: "its scales were taken after the client mask, so they differ from client to client",
}
RIGHT = None  # as it should be where units are visible; then something else in the tensor differs


def _explain(origin: OpenModel, proxy: OpenedProxy, task: TensorTask, quantization: Quantization | None) -> Rule | None:
    """The rule that tells how a tensor was quantized, if it was in one of the known wrong ways."""
    if quantization is None or task.layout.kind == "raw" or proxy.manifest.fill != "zero":
        return None
    candidates: set[Rule | None] = {RIGHT, *_LEAKS}
    try:
        for first, rows in row_chunks(task.layout, quantization.block_size, CHUNK_ELEMENTS):
            candidates &= _explanations(origin, proxy, task, quantization, first, rows)
            if not candidates:
                return None
    except (FedqsnError, kernels.NonFinite):
        return None
    return RIGHT if RIGHT in candidates else next(rule for rule in _LEAKS if rule in candidates)


def _explanations(
    origin: OpenModel, proxy: OpenedProxy, task: TensorTask, quantization: Quantization, first: int, rows: int
) -> set[Rule | None]:
    """Which ways of quantizing give what the proxy shows in these rows."""
    values = proxy.values(task.name, task.layout, first, rows)
    visible = proxy.visible(task.name)
    x = origin.read_rows(task.name, task.layout, first, rows)
    masked, right = x.copy(), x.copy()
    if task.hidden is not None:
        task.hidden.overwrite(right, first, None)
    if visible is not None:
        visible.inverted().overwrite(masked, first, None)
    shown = np.broadcast_to(shown_elements(proxy, task.name, task.layout, first, rows), values.shape)
    guesses: dict[Rule | None, Array] = {
        RIGHT: decoded(task, quantization, right),
        SCALE_FROM_HIDDEN: decoded(task, quantization, x),
        CODES_DIFFER: decoded(task, quantization, masked),
        CLEAR_COPY: as_float32(task, x),
    }
    factor = proxy.factor(task.name)
    tolerance = 0.02 if quantization.double_quant else {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}[task.tensor.dtype]
    if task.layout.packed and not quantization.double_quant:
        tolerance = 1e-5
    return {
        explanation
        for explanation, guess in guesses.items()
        if np.allclose(values[shown], guess[shown] * factor, rtol=tolerance, atol=1e-12)
    }


def decoded(task: TensorTask, quantization: Quantization, x: Array) -> Array:
    """Q(x) as fp32 values of the working view; x are rows as they are stored."""
    values, scales = encode(task, quantization, x)
    if scales is None:
        return as_float32(task, values)
    rows, cols = x.shape[::-1] if task.layout.transposed else x.shape
    out = np.empty((rows, cols), np.float32)
    if task.layout.kind == "pack8":
        kernels.dequantize_int8(values, scales, "F32", out)
    else:
        kernels.dequantize_4bit(
            values, scales, format=quantization.format, block=quantization.block_size, dtype="F32", out=out
        )
    return out
