"""Weight recovery: every attack of `attacks`, on each proxy alone and on all of them together, in one pass.

    truth ──────▶ W ─┐
    base ───────▶ B ─┤ rows ─▶ sums of each attack ─▶ per tensor, best attack ─▶ AttackScore
    proxy 1..K ─▶ P ─┘

What comes out is a lower bound on what leaks: an attack that nobody has thought of may do better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.auditing.findings import AttackScore, Finding, Recovery, TensorRecovery
from fedqsn_cli.auditing.inputs import Inputs, OpenedProxy, Report
from fedqsn_cli.auditing.kernels import hits
from fedqsn_cli.auditing.recovery import attacks
from fedqsn_cli.auditing.recovery.attacks import Evidence
from fedqsn_cli.auditing.recovery.intervals import exact_guess, intervals, read_values
from fedqsn_cli.auditing.recovery.metrics import COUNT, DD, EXACT, HITS, Outcome, Sums
from fedqsn_cli.auditing.rows import CHUNK, has_tensor, model_rows, shown_flags
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.errors import FedqsnError, FormatError
from fedqsn_cli.kernels.read_ahead import read_ahead
from fedqsn_cli.models.tensor_task import TensorTask, tensor_tasks
from fedqsn_cli.progress import Progress, Silent
from fedqsn_cli.quantization.layout import row_chunks

Floats = NDArray[np.float32]
Array = NDArray[Any]

BEST_OF_EACH = "best of each tensor"


@dataclass
class Scope:
    """One proxy, or several that are put together.

    Args:
        shown: sums of each attack over shown elements of the tensor that is going by.
        base_shown: sums over the same elements with the public base as the guess.
    """

    name: str
    proxies: Sequence[OpenedProxy]
    tensors: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    shown: dict[str, Sums] = field(default_factory=dict)
    base_shown: Sums = field(default_factory=Sums)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one tensor: the truth and the public base (None where it has no such tensor), [rows, cols] fp32."""

    task: TensorTask
    first: int
    w: Floats
    base: Floats | None

    @property
    def everything(self) -> tuple[Array, Floats]:
        """Flags of all elements, as `Sums.add` takes them."""
        return np.ones(len(self.w), np.bool_), np.ones((1, self.w.shape[1]), np.float32)


def recover_weights(inputs: Inputs, report: Report, progress: Progress | None = None) -> tuple[Recovery, ...]:
    """Attack each proxy alone, and all proxies of one format together if there are several.

    Proxies of several rounds are put together too: their truth is the model that was given. Findings are only those of
    measures that are no numbers (FQ902) and of proxies that cannot be read (FQ903).
    """
    if inputs.truth is None:
        return ()
    groups: dict[str, list[OpenedProxy]] = {}
    for proxy in inputs.proxies:
        groups.setdefault(str(proxy.manifest.quantization), []).append(proxy)
    results: list[Recovery] = []
    for proxies in groups.values():
        scopes = [Scope(proxy.scope, [proxy]) for proxy in proxies]
        if len(proxies) > 1:
            scopes.append(Scope(f"coalition of {len(proxies)}", proxies))
        try:
            results += _attack(inputs, scopes, report, progress or Silent())
        except FedqsnError as error:
            for proxy in proxies:
                message = f"its weights cannot be measured: {error.what}"
                report.findings.append(finding("FQ903", proxy.scope, message))
    return tuple(results)


def _attack(inputs: Inputs, scopes: list[Scope], report: Report, progress: Progress) -> Iterator[Recovery]:
    assert inputs.truth is not None
    how = scopes[0].proxies[0].manifest.quantization
    tasks = [task for task in tensor_tasks(inputs.truth, how, lambda tensor: None) if task.tensor.is_float]
    differences: dict[str, float | None] = {}
    progress.start("attacking", sum(task.size for task in tasks), "weights")
    for task in tasks:
        whole, base_whole = Sums(), Sums()
        _require(scopes, task)
        with_base = has_tensor(inputs.base, task)
        for scope in scopes:
            names = attacks.estimates(len(scope.proxies), inputs.base is not None)
            scope.shown, scope.base_shown = {name: Sums() for name in names}, Sums()
        for rows in _rows(inputs, task, how.block_size if how else 1, with_base):
            whole.add(rows.w, rows.w, *rows.everything)
            if rows.base is not None:
                base_whole.add(rows.w, rows.base, *rows.everything, tolerance=0.0)
            _attack_rows(scopes, rows, inputs.base is not None)
            progress.advance(rows.w.size)
        differences[task.name] = base_whole[DD] if with_base else None
        for scope in scopes:
            scope.tensors[task.name] = _outcomes(
                scope, whole, base_whole if with_base else None, inputs.base is not None
            )
            if with_base:
                _try_low_rank(inputs, scope, task, whole, base_whole)
    progress.finish()
    for scope in scopes:
        yield _summary(scope, tasks, differences, report)


def _require(scopes: Sequence[Scope], task: TensorTask) -> None:
    """Every proxy must have the tensor. Raises FormatError."""
    for scope in scopes:
        if any(task.name not in proxy.tensors for proxy in scope.proxies):
            raise FormatError("a tensor of the model is missing", where=f"{scope.name}: {task.name}")


def _rows(inputs: Inputs, task: TensorTask, block: int, with_base: bool) -> Iterator[Rows]:
    """The tensor in runs of whole rows of its working view, read ahead in a thread."""
    with ThreadPoolExecutor(1) as reader:
        calls = (partial(_load, inputs, task, *run, with_base) for run in row_chunks(task.layout, block, CHUNK))
        yield from read_ahead(reader, calls, depth=2)


def _load(inputs: Inputs, task: TensorTask, first: int, rows: int, with_base: bool) -> Rows:
    assert inputs.truth is not None
    w = model_rows(inputs.truth, task, first, rows)
    base = model_rows(inputs.base, task, first, rows) if with_base and inputs.base is not None else None
    return Rows(task, first, w, base)


def _attack_rows(scopes: list[Scope], rows: Rows, with_base: bool) -> None:
    """One chunk: every proxy alone, then what they say together."""
    together = scopes[-1] if len(scopes[-1].proxies) > 1 else None
    evidence = Evidence.none(rows.w.shape, scale_block(together.proxies[0], rows.task)) if together else None
    for scope in scopes:
        if scope is together:
            continue
        alone = _attack_one(scope, rows, with_base, together is not None)
        if evidence is not None and alone is not None:
            evidence.add(*alone)
    if together is not None and evidence is not None:
        seen = evidence.count > 0
        row_flags, flags = np.asarray(seen.any(axis=1)), seen.astype(np.float32)
        _add_estimates(together, rows, evidence, row_flags, flags)


def _attack_one(
    scope: Scope, rows: Rows, with_base: bool, more: bool
) -> tuple[Floats, Floats, Floats, NDArray[np.bool_], Floats] | None:
    """Add one proxy's rows; what it says comes back if it will be put together with others."""
    proxy, task = scope.proxies[0], rows.task
    sent = read_values(proxy, task, rows.first, len(rows.w))
    row_flags, flags = shown_flags(proxy, task, rows.first, len(rows.w))
    values, certain = exact_guess(proxy, task, sent)
    _add_first(scope.shown["descale"], rows.w, values, certain, row_flags, flags)
    if rows.base is not None:
        scope.base_shown.add(rows.w, rows.base, row_flags, flags, tolerance=0.0)
    if not (more or with_base):
        return None
    low, high = intervals(proxy, task, rows.first, len(rows.w), sent)
    shown = row_flags[:, None] & (flags > 0)
    if with_base:
        alone = Evidence.none(rows.w.shape)
        alone.add(values, low, high, shown, certain)
        guess = values if rows.base is None else attacks.clamp(alone, rows.base)
        scope.shown["clamp"].add(rows.w, guess, row_flags, flags)
    return values, low, high, shown, certain


def scale_block(proxy: OpenedProxy, task: TensorTask) -> int:
    """Elements in a row that share a scale; 1 where they lie in columns, or have none."""
    packing, how = proxy.tensors[task.name].packing, proxy.manifest.quantization
    if packing is not None:
        return packing.block or task.layout.view[2]
    flat = how is not None and task.layout.kind == "snap" and task.layout.geometry == "flat"
    return how.block_size if how is not None and flat and how.format != "int8" else 1


def _add_first(sums: Sums, w: Floats, values: Floats, certain: Floats, row_flags: Array, flags: Floats) -> None:
    """Errors count by the values, exact ones by what the attacker is certain of."""
    if certain is values:
        sums.add(w, values, row_flags, flags)
        return
    own = Sums()
    own.add(w, values, row_flags, flags, tolerance=-1.0)
    own.values[HITS] = hits(w, certain, row_flags, flags, EXACT)
    sums.values += own.values


def _add_estimates(scope: Scope, rows: Rows, evidence: Evidence, row_flags: Array, flags: Floats) -> None:
    for name, estimate in attacks.estimates(len(scope.proxies), "clamp" in scope.shown).items():
        guess = evidence.first if name == "clamp" and rows.base is None else estimate(evidence, rows.base)
        certain = attacks.known_edges(evidence) if name == attacks.SCALE_READING else guess
        _add_first(scope.shown[name], rows.w, guess, certain, row_flags, flags)
    if rows.base is not None:
        scope.base_shown.add(rows.w, rows.base, row_flags, flags, tolerance=0.0)


def _outcomes(scope: Scope, whole: Sums, base_whole: Sums | None, with_base: bool) -> dict[str, Outcome]:
    """All attacks on the tensor that has gone by."""
    outcomes = {}
    for name, shown in scope.shown.items():
        hidden = whole.minus(shown)
        hidden_base = base_whole.minus(scope.base_shown) if base_whole is not None else None
        for fill in attacks.fills(with_base):
            guessed = attacks.filled(fill, shown, hidden, hidden_base)
            outcomes[attacks.name_of(name, fill)] = Outcome(shown, guessed)
    return outcomes


def _try_low_rank(inputs: Inputs, scope: Scope, task: TensorTask, whole: Sums, base_whole: Sums) -> None:
    """Low-rank completion, where the tensor is a matrix that is large enough to have a rank."""
    from fedqsn_cli.auditing.recovery.low_rank import complete

    outcomes = scope.tensors[task.name]
    shown = complete(inputs, scope.proxies, task) if min(task.layout.view[1:]) >= 32 else None
    if shown is None:
        outcomes[attacks.LOW_RANK] = outcomes["clamp, base fill"]
    else:
        outcomes[attacks.LOW_RANK] = Outcome(shown, base_whole.minus(scope.base_shown))


def _summary(
    scope: Scope, tasks: Sequence[TensorTask], differences: dict[str, float | None], report: Report
) -> Recovery:
    """Put tensors together, choose the best attacks."""
    names = [name for name in scope.tensors[tasks[0].name] if name != attacks.LOW_RANK]
    if any(attacks.LOW_RANK in outcomes for outcomes in scope.tensors.values()):
        names.append(attacks.LOW_RANK)
    known = [value for value in differences.values() if value is not None]
    difference = sum(known) + _unknown(scope, differences) if known else None
    totals = {name: _total(scope, name) for name in names}
    bests = {task.name: _best(scope.tensors[task.name]) for task in tasks}
    totals[BEST_OF_EACH] = _sum(scope.tensors[name][best] for name, best in bests.items())
    table = [outcome.score(name, difference) for name, outcome in totals.items()]
    table.insert(0, _as_sent(scope, difference))
    tensors = tuple(_of_tensor(scope, task, bests[task.name], differences[task.name]) for task in tasks)
    best = min(table, key=lambda score: (math.isnan(score.log10_nmse), score.log10_nmse))
    report.findings += _not_numbers(scope, table, tensors)
    return Recovery(scope.name, tuple(table), best, tensors)


def _unknown(scope: Scope, differences: dict[str, float | None]) -> float:
    """||W - 0||² of tensors that the base does not have: all of them is secret."""
    outcomes = (next(iter(scope.tensors[name].values())) for name, value in differences.items() if value is None)
    return sum(outcome.shown[2] + outcome.guessed[2] for outcome in outcomes)


def _total(scope: Scope, name: str) -> Outcome:
    return _sum(outcomes.get(name, next(iter(outcomes.values()))) for outcomes in scope.tensors.values())


def _sum(outcomes: Any) -> Outcome:
    total = Outcome(Sums(), Sums())
    for outcome in outcomes:
        total = total.plus(outcome)
    return total


def _best(outcomes: dict[str, Outcome]) -> str:
    return min(outcomes, key=lambda name: (math.isnan(outcomes[name].error), outcomes[name].error))


def _as_sent(scope: Scope, difference: float | None) -> AttackScore:
    """The values of one proxy as they are, without taking the scale away; of several, those of the first."""
    total = Outcome(Sums(), Sums())
    proxy = scope.proxies[0]
    for name, outcomes in scope.tensors.items():
        plainest = next(iter(outcomes.values()))
        factor = float(proxy.factor(name))
        shown = plainest.shown.scaled(factor) if factor != 1 else plainest.shown
        total = total.plus(Outcome(shown, plainest.guessed))
    return total.score(attacks.AS_SENT, difference)


def _of_tensor(scope: Scope, task: TensorTask, best: str, difference: float | None) -> TensorRecovery:
    outcomes = scope.tensors[task.name]
    score = outcomes[best].score(best, difference)
    hits = max(outcome.shown[HITS] + outcome.guessed[HITS] for outcome in outcomes.values())
    return TensorRecovery(
        task.name,
        task.plan.role,
        task.size,
        outcomes[best].shown[COUNT] / max(1, task.size),
        hits / max(1, task.size),
        score.log10_nmse,
        score.cosine,
        score.delta_recovered,
        best,
        score.log10_nmse_visible,
    )


def _not_numbers(scope: Scope, table: Sequence[AttackScore], tensors: Sequence[TensorRecovery]) -> Iterator[Finding]:
    """FQ902: a comparison with NaN would pass every limit."""
    for tensor in tensors:
        measures = (tensor.exact_share, tensor.log10_nmse, tensor.cosine, tensor.log10_nmse_visible)
        if not all(map(math.isfinite, measures)):
            yield finding(
                "FQ902", scope.name, "what is recovered is not a number: NaN or infinite weights", tensor=tensor.tensor
            )
    if not all(math.isfinite(score.log10_nmse) and math.isfinite(score.cosine) for score in table):
        yield finding("FQ902", scope.name, "what is recovered of all weights is not a number")
