"""Weight recovery: every attack of `attacks`, on each proxy alone and on all of them together, in one pass.

    truth ──────▶ W ─┐
    base ───────▶ B ─┤ rows ─▶ sums of each attack ─▶ per tensor, best attack ─▶ AttackScore
    proxy 1..K ─▶ P ─┘

The truth is read once for the whole audit (`TruthPass`), by whoever needs it first.

What comes out is a lower bound on what leaks: better attacks may exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.completeness import NOT_A_NUMBER, Collector
from fedqsn_cli.auditing.findings import AttackScore, Finding, Recovery, TensorRecovery
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery import attacks
from fedqsn_cli.auditing.recovery.evidence import Evidence, Reading
from fedqsn_cli.auditing.recovery.intervals import once_rounded
from fedqsn_cli.auditing.recovery.low_rank import complete
from fedqsn_cli.auditing.recovery.metrics import COUNT, DD, HITS, WW, AttackResult, ErrorSums
from fedqsn_cli.auditing.recovery.sums import BASE, EVERYTHING, TRUTH, OrderedSums, Rows, Sums, Target
from fedqsn_cli.auditing.rows import CHUNK, has_tensor, model_rows
from fedqsn_cli.auditing.stored_rows import StoredRows
from fedqsn_cli.errors import FedqsnError
from fedqsn_cli.kernels.read_ahead import compute_ahead
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization.layout import rows_at_a_time

Array = NDArray[Any]
Floats = NDArray[np.float32]

BEST_OF_EACH = "best of each tensor"


class WeightAttack:
    """All attacks on the proxies of one format: each alone, and all together if there are several.

    It looks at the truth as it is read (`TruthPass`). Sums of runs of rows are added in the order of rows: the result
    does not depend on which of several threads was faster.
    """

    def __init__(self, truth: OpenModel, base: PublicBase | None, proxies: Sequence[OpenedProxy]) -> None:
        self.proxies = proxies
        self._truth, self._base = truth, base
        self._alone = [Target(proxy.scope, [proxy]) for proxy in proxies]
        self._together = Target(f"coalition of {len(proxies)}", proxies) if len(proxies) > 1 else None
        self._targets = [*self._alone, *([self._together] if self._together is not None else [])]
        self.quantization = proxies[0].manifest.quantization
        self._block = self.quantization.block_size if self.quantization else 1
        self._tensors: dict[str, OrderedSums] = {}
        self._lock = Lock()

    def take(self, task: TensorTask, first: int, stored: Array) -> None:
        """Attack rows of a tensor; `result` tells what cannot be read of a proxy: others look at the truth, too."""
        found: Sums | Exception
        try:
            found = self._attack(task, first, stored)
        except (FedqsnError, OSError) as error:
            found = error
        with self._lock:
            self._tensors.setdefault(task.name, OrderedSums()).put(first, _count(task, stored), found)

    def _attack(self, task: TensorTask, first: int, stored: Array) -> Sums:
        count, base, sums = _count(task, stored), self._base_of(task), Sums()
        whole = task.layout.transposed or self._compares_as_stored(task)
        step = count if whole else rows_at_a_time(task.layout, self._block, CHUNK)
        for begin in range(0, count, step):
            at, part = first + begin, stored if step >= count else stored[begin : begin + step]
            truth = StoredRows.of(part.T if task.layout.transposed else part, task.tensor.dtype)
            rows = Rows(task, at, truth, None if base is None else model_rows(base, task, at, truth.rows))
            rows.add(sums[EVERYTHING, TRUTH], truth, rows.everything)
            rows.add_base(sums[EVERYTHING, BASE], rows.everything)
            self._attack_rows(sums, rows)
        return sums

    def _compares_as_stored(self, task: TensorTask) -> bool:
        """Are rows of the tensor compared without wide copies of them? Then all can be taken at once."""
        alone = self._base is None and len(self._targets) == 1 and not self._targets[0].reads_holes
        return alone and task.name in self.proxies[0].tensors and once_rounded(self.proxies[0], task)

    def _base_of(self, task: TensorTask) -> PublicBase | None:
        return self._base if has_tensor(self._base, task) else None

    def _attack_rows(self, sums: Sums, rows: Rows) -> None:
        """One chunk: every proxy alone, then what they say together."""
        shape = rows.truth.rows, rows.truth.cols
        together = Evidence.none(shape, scale_block(self.proxies[0], rows.task)) if self._together else None
        for target in self._alone:
            reading = Reading.of(target.proxies[0], rows.task, rows.first, rows.truth.rows)
            self._attack_alone(sums, target, rows, reading)
            if together is not None:
                together.add(reading)
        if together is not None and self._together is not None:
            self._attack_together(sums, self._together, rows, together)

    def _attack_alone(self, sums: Sums, target: Target, rows: Rows, reading: Reading) -> None:
        """Add one proxy's rows."""
        shown, descaled = (reading.row_flags, reading.flags), sums[target.scope, "descale"]
        if reading.is_certain:  # the factor is taken away in the same pass
            rows.add(descaled, reading.stored, shown, divisor=reading.factor)
        else:
            rows.add(descaled, StoredRows.of(reading.values), shown, certain=reading.certain)
        rows.add_base(sums[target.scope, BASE], shown)
        if target.reads_holes:
            rows.add(sums[target.scope, attacks.HOLES], StoredRows.of(reading.values), rows.everything)
        if self._base is not None:
            alone = Evidence.none((rows.truth.rows, rows.truth.cols))
            alone.add(reading)
            rows.add(sums[target.scope, "clamp"], StoredRows.of(attacks.clamp(alone, rows.base)), shown)

    def _attack_together(self, sums: Sums, target: Target, rows: Rows, evidence: Evidence) -> None:
        """Add what several proxies say about the same rows."""
        seen = evidence.count > 0
        shown = np.asarray(seen.any(axis=1)), seen.astype(np.float32)
        for name, estimate in self._estimates(target).items():
            certain = attacks.known_edges(evidence) if name == attacks.SCALE_READING else None
            guess = StoredRows.of(estimate(evidence, rows.base))
            rows.add(sums[target.scope, name], guess, shown, certain=certain)
        rows.add_base(sums[target.scope, BASE], shown)

    def _estimates(self, target: Target) -> dict[str, attacks.Estimate]:
        return attacks.estimates(len(target.proxies), self._base is not None)

    def result(self, tasks: Sequence[TensorTask], collector: Collector) -> list[Recovery]:
        """What was recovered, once all rows of these tensors were seen. Findings are those of FQ902.

        Raises:
            FormatError, OSError: a proxy cannot be read.
        """
        differences: dict[str, float | None] = {}
        for task, results in zip(tasks, compute_ahead(self._calls(tasks)), strict=True):
            everything = self._tensors[task.name].sums[EVERYTHING, BASE]
            differences[task.name] = None if self._base_of(task) is None else everything[DD]
            for target, found in zip(self._targets, results, strict=True):
                target.results[task.name] = found
        return [_summary(target, tasks, differences, collector) for target in self._targets]

    def _calls(self, tasks: Sequence[TensorTask]) -> Iterator[Callable[[], list[Results]] | None]:
        for task in tasks:
            if task.plan.axis == "element":
                yield None  # element masks are as large as their tensor: hold those of one tensor at a time
            yield partial(self._of_tensor, task)

    def _of_tensor(self, task: TensorTask) -> list[Results]:
        """Of each target."""
        ordered = self._tensors.setdefault(task.name, OrderedSums())
        if ordered.failure is not None:
            raise ordered.failure
        return [self._results(target, task, ordered.sums) for target in self._targets]

    def _results(self, target: Target, task: TensorTask, sums: Sums) -> Results:
        """All attacks on a tensor."""
        base, whole, results = self._base_of(task), sums[EVERYTHING, TRUTH], Results()
        hidden_base = None if base is None else sums[EVERYTHING, BASE].minus(sums[target.scope, BASE])
        for name in self._estimates(target):
            shown = sums[target.scope, name]
            for fill in attacks.fills(self._base is not None):
                guessed = attacks.filled(fill, shown, whole.minus(shown), hidden_base)
                results[attacks.name_of(name, fill)] = AttackResult(shown, guessed)
        if target.reads_holes:
            shown = sums[target.scope, "descale"]
            results[attacks.HOLES] = AttackResult(shown, sums[target.scope, attacks.HOLES].minus(shown))
        if base is not None and hidden_base is not None:
            large = min(task.layout.view[1:]) >= 32  # enough to have a rank
            completed = complete(self._truth, base, target.proxies, task) if large else None
            clamped = results["clamp, base fill"]
            results[attacks.LOW_RANK] = clamped if completed is None else AttackResult(completed, hidden_base)
        return results


def _count(task: TensorTask, stored: Array) -> int:
    """Rows of the working view."""
    return int(stored.shape[1 if task.layout.transposed else 0])


Results = dict[str, AttackResult]
"""Of one tensor: what each attack makes of it."""


def scale_block(proxy: OpenedProxy, task: TensorTask) -> int:
    """Elements in a row that share a scale; 1 where they are in columns, or have none."""
    packing, quantization = proxy.tensors[task.name].packing, proxy.manifest.quantization
    if packing is not None:
        return packing.block or task.layout.view[2]
    flat = task.layout.kind == "snap" and task.layout.geometry == "flat"
    return quantization.block_size if quantization is not None and flat and quantization.format != "int8" else 1


def _summary(
    target: Target, tasks: Sequence[TensorTask], differences: dict[str, float | None], collector: Collector
) -> Recovery:
    """Put tensors together, choose the best attacks."""
    names = [name for name in target.results[tasks[0].name] if name != attacks.LOW_RANK]
    if any(attacks.LOW_RANK in results for results in target.results.values()):
        names.append(attacks.LOW_RANK)
    known = [value for value in differences.values() if value is not None]
    difference = sum(known) + _without_base(target, differences) if known else None
    totals = {name: _total(target, name) for name in names}
    bests = {task.name: _best(target.results[task.name]) for task in tasks}
    totals[BEST_OF_EACH] = _sum(target.results[name][best] for name, best in bests.items())
    table = [result.score(name, difference) for name, result in totals.items()]
    table.insert(0, _as_sent(target, difference))
    tensors = tuple(_of_tensor(target, task, bests[task.name], differences[task.name]) for task in tasks)
    best = min(table, key=lambda score: (math.isnan(score.log10_nmse), score.log10_nmse))
    collector.add(_not_numbers(target.scope, table, tensors))
    return Recovery(target.scope, tuple(table), best, tensors)


def _without_base(target: Target, differences: dict[str, float | None]) -> float:
    """||W - 0||² of tensors that the base does not have: all of them is secret."""
    results = (next(iter(target.results[name].values())) for name, value in differences.items() if value is None)
    return sum(result.whole[WW] for result in results)


def _total(target: Target, name: str) -> AttackResult:
    return _sum(results.get(name, next(iter(results.values()))) for results in target.results.values())


def _sum(results: Iterable[AttackResult]) -> AttackResult:
    return reduce(add, results, AttackResult(ErrorSums(), ErrorSums()))


def _best(results: dict[str, AttackResult]) -> str:
    return min(results, key=lambda name: (math.isnan(results[name].whole[DD]), results[name].whole[DD]))


def _as_sent(target: Target, difference: float | None) -> AttackScore:
    """The values of one proxy as they are, without taking the scale away; of several, those of the first."""
    total = AttackResult(ErrorSums(), ErrorSums())
    for name, results in target.results.items():
        plainest, factor = next(iter(results.values())), float(target.proxies[0].factor(name))
        total += plainest if factor == 1 else AttackResult(plainest.shown.scaled(factor), plainest.guessed)
    return total.score(attacks.AS_SENT, difference)._replace(delta_direction=None)


def _of_tensor(target: Target, task: TensorTask, best: str, difference: float | None) -> TensorRecovery:
    results = target.results[task.name]
    score = results[best].score(best, difference)
    exact = max(result.whole[HITS] for result in results.values())
    return TensorRecovery(
        task.name,
        task.plan.role,
        task.size,
        results[best].shown[COUNT] / max(1, task.size),
        exact / max(1, task.size),
        score.log10_nmse,
        score.cosine,
        score.delta_recovered,
        best,
        score.log10_nmse_visible,
    )


def _not_numbers(scope: str, table: Sequence[AttackScore], tensors: Sequence[TensorRecovery]) -> Iterator[Finding]:
    """FQ902: a comparison with NaN would pass every limit."""
    for tensor in tensors:
        measures = (tensor.exact_share, tensor.log10_nmse, tensor.cosine, tensor.log10_nmse_visible)
        if not all(map(math.isfinite, measures)):
            message = "what is recovered is not a number: NaN or infinite weights"
            yield NOT_A_NUMBER.finding(scope, message, tensor=tensor.tensor)
    if not all(math.isfinite(score.log10_nmse) and math.isfinite(score.cosine) for score in table):
        yield NOT_A_NUMBER.finding(scope, "what is recovered of all weights is not a number")
