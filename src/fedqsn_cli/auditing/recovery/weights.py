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
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.completeness import NOT_A_NUMBER, Collector
from fedqsn_cli.auditing.findings import AttackScore, Finding, Recovery, TensorRecovery
from fedqsn_cli.auditing.kernels import hits
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.recovery import attacks
from fedqsn_cli.auditing.recovery.evidence import Evidence, Reading
from fedqsn_cli.auditing.recovery.low_rank import complete
from fedqsn_cli.auditing.recovery.metrics import COUNT, DD, EXACT, GG, HITS, WW, AttackResult, ErrorSums, G
from fedqsn_cli.auditing.recovery.sums import OrderedSums, Rows, RowSums, Target, TensorSums
from fedqsn_cli.auditing.rows import CHUNK, has_tensor, model_rows
from fedqsn_cli.errors import FedqsnError, FormatError
from fedqsn_cli.kernels.read_ahead import compute_ahead
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.public_base import PublicBase
from fedqsn_cli.models.tensor_task import TensorTask
from fedqsn_cli.quantization.layout import rows_at_a_time

Floats = NDArray[np.float32]
Array = NDArray[Any]

BEST_OF_EACH = "best of each tensor"


class WeightAttack:
    """All attacks on the proxies of one format: each alone, and all together if there are several.

    It looks at the truth as it is read (`TruthPass`). Sums of runs of rows are added in the order of rows: the result
    does not depend on which of several threads was faster.
    """

    def __init__(self, truth: OpenModel, base: PublicBase | None, proxies: Sequence[OpenedProxy]) -> None:
        self.proxies = proxies
        self._truth, self._base = truth, base
        self._targets = [Target(proxy.scope, [proxy]) for proxy in proxies]
        if len(proxies) > 1:
            self._targets.append(Target(f"coalition of {len(proxies)}", proxies))
        self.quantization = proxies[0].manifest.quantization
        self._block = self.quantization.block_size if self.quantization else 1
        self._tensors: dict[str, OrderedSums] = {}
        self._lock = Lock()

    def take(self, task: TensorTask, first: int, w: Floats) -> None:
        """Attack rows of a tensor; `result` tells what cannot be read of a proxy: others look at the truth, too."""
        found: RowSums | Exception
        try:
            found = self._attack(task, first, w)
        except (FedqsnError, OSError) as error:
            found = error
        with self._lock:
            self._sums_of(task).put(first, len(w), found)

    def _sums_of(self, task: TensorTask) -> OrderedSums:
        return self._tensors.setdefault(task.name, OrderedSums(self._no_sums(task)))

    def _no_sums(self, task: TensorTask) -> RowSums:
        return RowSums.none(self._targets, self._base is not None, has_tensor(self._base, task))

    def _attack(self, task: TensorTask, first: int, w: Floats) -> RowSums:
        _require(self._targets, task)
        base, with_base = self._base if has_tensor(self._base, task) else None, self._base is not None
        sums = self._no_sums(task)
        step = len(w) if task.layout.transposed else rows_at_a_time(task.layout, self._block, CHUNK)
        for begin in range(0, len(w), step):
            part, at = w[begin : begin + step], first + begin
            rows = Rows(task, at, part, None if base is None else model_rows(base, task, at, len(part)))
            sums.whole.add(part, part, *rows.everything)
            if sums.base is not None and rows.base is not None:
                sums.base.add(part, rows.base, *rows.everything, tolerance=0.0)
            _attack_rows(sums.targets, rows, with_base)
        return sums

    def result(self, tasks: Sequence[TensorTask], collector: Collector) -> list[Recovery]:
        """What was recovered, once all rows of these tensors were seen. Findings are those of FQ902.

        Raises:
            FormatError, OSError: a proxy cannot be read.
        """
        differences: dict[str, float | None] = {}
        for task, attacked in zip(tasks, compute_ahead(self._calls(tasks)), strict=True):
            differences[task.name], results = attacked
            for target, found in zip(self._targets, results, strict=True):
                target.results[task.name] = found
        return [_summary(target, tasks, differences, collector) for target in self._targets]

    def _calls(self, tasks: Sequence[TensorTask]) -> Iterator[Callable[[], Attacked] | None]:
        for task in tasks:
            if task.plan.axis == "element":
                yield None  # element masks are as large as their tensor: hold those of one tensor at a time
            yield partial(self._of_tensor, task)

    def _of_tensor(self, task: TensorTask) -> Attacked:
        base, with_base = self._base if has_tensor(self._base, task) else None, self._base is not None
        ordered = self._sums_of(task)
        if ordered.failure is not None:
            raise ordered.failure
        sums = ordered.sums
        results = [_results(one, sums.whole, sums.base, with_base) for one in sums.targets]
        if base is not None and sums.base is not None:
            for one, found in zip(sums.targets, results, strict=True):
                low_rank = _low_rank(self._truth, base, one, task, sums.base)
                found[attacks.LOW_RANK] = low_rank or found["clamp, base fill"]
        return None if sums.base is None else sums.base[DD], results


Attacked = tuple[float | None, list[dict[str, AttackResult]]]
"""Of one tensor: its squared distance to the public base, and the results of each target by attack."""


def _require(targets: Sequence[Target], task: TensorTask) -> None:
    """Every proxy must have the tensor. Raises FormatError."""
    for target in targets:
        if any(task.name not in proxy.tensors for proxy in target.proxies):
            raise FormatError("a tensor of the model is missing", where=f"{target.scope}: {task.name}")


def _attack_rows(sums: Sequence[TensorSums], rows: Rows, with_base: bool) -> None:
    """One chunk: every proxy alone, then what they say together."""
    together = sums[-1] if len(sums[-1].target.proxies) > 1 else None
    block = scale_block(together.target.proxies[0], rows.task) if together else 1
    evidence = Evidence.none(rows.w.shape, block) if together else None
    for one in sums:
        if one is not together:
            reading = Reading.of(one.target.proxies[0], rows.task, rows.first, len(rows.w))
            _attack_alone(one, rows, reading, with_base)
            if evidence is not None:
                evidence.add(reading)
    if together is not None and evidence is not None:
        _attack_together(together, rows, evidence)


def _attack_alone(sums: TensorSums, rows: Rows, reading: Reading, with_base: bool) -> None:
    """Add one proxy's rows."""
    row_flags, flags = reading.row_flags, reading.flags
    if reading.is_certain:  # the factor is taken away in the same pass
        sums.shown["descale"].add(rows.w, reading.sent, row_flags, flags, divisor=reading.factor)
    else:
        _add(sums.shown["descale"], rows.w, reading.values, reading.certain, row_flags, flags)
    if rows.base is not None:
        sums.base_shown.add(rows.w, rows.base, row_flags, flags, tolerance=0.0)
        sums.moved["descale"] += _squares(rows.base, reading.values, row_flags, flags)
    if sums.target.reads_holes:
        sums.as_filled.add(rows.w, reading.values, *rows.everything)
        if rows.base is not None:
            sums.moved_as_filled += _squares(rows.base, reading.values, *rows.everything)
    if with_base:
        alone = Evidence.none(rows.w.shape)
        alone.add(reading)
        guess = attacks.clamp(alone, rows.base)
        sums.shown["clamp"].add(rows.w, guess, row_flags, flags)
        if rows.base is not None:
            sums.moved["clamp"] += _squares(rows.base, guess, row_flags, flags)


def _attack_together(sums: TensorSums, rows: Rows, evidence: Evidence) -> None:
    """Add what several proxies say about the same rows."""
    seen = evidence.count > 0
    row_flags, flags = np.asarray(seen.any(axis=1)), seen.astype(np.float32)
    for name, estimate in attacks.estimates(len(sums.target.proxies), "clamp" in sums.shown).items():
        guess = estimate(evidence, rows.base)
        certain = attacks.known_edges(evidence) if name == attacks.SCALE_READING else guess
        _add(sums.shown[name], rows.w, guess, certain, row_flags, flags)
        if rows.base is not None:
            sums.moved[name] += _squares(rows.base, guess, row_flags, flags)
    if rows.base is not None:
        sums.base_shown.add(rows.w, rows.base, row_flags, flags, tolerance=0.0)


def _squares(base: Floats, guess: Floats, row_flags: Array, flags: Floats) -> float:
    """||W' - B||² of the elements that are shown."""
    sums = ErrorSums()
    sums.add(base, guess, row_flags, flags)
    return sums[DD]


def scale_block(proxy: OpenedProxy, task: TensorTask) -> int:
    """Elements in a row that share a scale; 1 where they are in columns, or have none."""
    packing, quantization = proxy.tensors[task.name].packing, proxy.manifest.quantization
    if packing is not None:
        return packing.block or task.layout.view[2]
    flat = task.layout.kind == "snap" and task.layout.geometry == "flat"
    return quantization.block_size if quantization is not None and flat and quantization.format != "int8" else 1


def _add(sums: ErrorSums, w: Floats, values: Floats, certain: Floats, row_flags: Array, flags: Floats) -> None:
    """Errors count by the values, exact ones by what the attacker is certain of."""
    if certain is values:
        sums.add(w, values, row_flags, flags)
        return
    own = ErrorSums()
    own.add(w, values, row_flags, flags, tolerance=-1.0)
    own.values[HITS] = hits(w, certain, row_flags, flags, EXACT)
    sums.values += own.values


def _results(
    sums: TensorSums, whole: ErrorSums, base_whole: ErrorSums | None, with_base: bool
) -> dict[str, AttackResult]:
    """All attacks on a tensor."""
    results = {}
    for name, shown in sums.shown.items():
        hidden = whole.minus(shown)
        hidden_base = base_whole.minus(sums.base_shown) if base_whole is not None else None
        for fill in attacks.fills(with_base):
            guessed = attacks.filled(fill, shown, hidden, hidden_base)
            moved = _moved(sums.moved[name], shown, guessed, hidden_base, fill) if with_base else None
            results[attacks.name_of(name, fill)] = AttackResult(shown, guessed, moved)
    if sums.target.reads_holes:
        shown = sums.shown["descale"]
        moved = sums.moved_as_filled if base_whole is not None else sums.as_filled[GG]
        results[attacks.HOLES] = AttackResult(shown, sums.as_filled.minus(shown), moved if with_base else None)
    return results


def _moved(of_shown: float, shown: ErrorSums, guessed: ErrorSums, base: ErrorSums | None, fill: str) -> float:
    """||W' - B||² of a whole tensor whose hidden elements were guessed in this way; B is 0 where it lacks the tensor.

    Args:
        base: sums over hidden elements with the public base as the guess.
    """
    if base is None:
        return shown[GG] + guessed[GG]
    if fill == "base":
        return of_shown
    mean = guessed[G] / guessed[COUNT] if guessed[COUNT] else 0.0
    return of_shown + base[GG] - 2 * mean * base[G] + base[COUNT] * mean * mean


def _low_rank(
    truth: OpenModel, base: PublicBase, sums: TensorSums, task: TensorTask, base_whole: ErrorSums
) -> AttackResult | None:
    """Low-rank completion, where the tensor is a matrix that is large enough to have a rank."""
    shown = complete(truth, base, sums.target.proxies, task) if min(task.layout.view[1:]) >= 32 else None
    return None if shown is None else AttackResult(shown, base_whole.minus(sums.base_shown))


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
    return sum(result.shown[WW] + result.guessed[WW] for result in results)


def _total(target: Target, name: str) -> AttackResult:
    return _sum(results.get(name, next(iter(results.values()))) for results in target.results.values())


def _sum(results: Iterable[AttackResult]) -> AttackResult:
    total = AttackResult(ErrorSums(), ErrorSums(), 0.0)
    for result in results:
        total = total.plus(result)
    return total


def _best(results: dict[str, AttackResult]) -> str:
    return min(results, key=lambda name: (math.isnan(results[name].error), results[name].error))


def _as_sent(target: Target, difference: float | None) -> AttackScore:
    """The values of one proxy as they are, without taking the scale away; of several, those of the first."""
    total = AttackResult(ErrorSums(), ErrorSums())
    proxy = target.proxies[0]
    for name, results in target.results.items():
        plainest = next(iter(results.values()))
        factor = float(proxy.factor(name))
        shown = plainest.shown.scaled(factor) if factor != 1 else plainest.shown
        total = total.plus(AttackResult(shown, plainest.guessed))
    return total.score(attacks.AS_SENT, difference)


def _of_tensor(target: Target, task: TensorTask, best: str, difference: float | None) -> TensorRecovery:
    results = target.results[task.name]
    score = results[best].score(best, difference)
    exact = max(result.shown[HITS] + result.guessed[HITS] for result in results.values())
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
