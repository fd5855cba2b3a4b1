"""The report as a list of sections: what the terminal prints, and Markdown lays out in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fedqsn_cli.auditing.findings import AttackScore, Audit, FunctionRecovery, Recovery
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.auditing.report.wording import (
    LOWER_BOUND,
    NOT_SKILL,
    SEVERITIES,
    delta,
    meaning,
    members,
    nearly_all_seen,
    ordered,
    rule_name,
    squared,
    unchecked,
    verdict,
    worst_recovery,
)
from fedqsn_cli.console import Facts, Part, Table
from fedqsn_cli.exposure.results import Coalition, Exposure
from fedqsn_cli.text import percent, real

MOST_TENSORS = 8
MOST_SCOPES = 12
MOST_CLIENTS = 10
MOST_FINDINGS = 100

MEASURES = ("known exactly", "error", "error of what is shown", "cosine", "weight difference", "its direction")
"""The columns of an attack's score."""

_NUMBERS = frozenset(
    {*MEASURES, "shown", "proxies", "first", "now", "loss", "accuracy", "public examples", "rho", "steps"}
)
_CURVE = ("public examples", "loss", "accuracy", "rho", "base alone, loss", "gain over base")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report.

    Args:
        kind: what it tells; "measured" ones may be folded away.
        parts: tables and sentences, from top to bottom. note: a remark on all of them.
    """

    kind: Literal["verdict", "headline", "findings", "not checked", "measured", "count"]
    parts: Sequence[Part]
    note: str | None = None


def sections(audit: Audit) -> Iterator[Section]:
    """The report from top to bottom."""
    yield Section("verdict", [Facts([("verdict", verdict(audit)), ("meaning", meaning(audit))])])
    lines = headline(audit)
    if lines:
        yield Section("headline", [Facts(lines)])
    if audit.findings:
        yield Section("findings", _findings(audit))
    rows = [(rule_name(check.rule), check.scope, check.why) for check in unchecked(audit)]
    if rows:
        yield Section("not checked", [Table(("not checked", "scope", "why"), rows)])
    if audit.function is not None:
        yield Section("measured", _function(audit.function))
    if audit.exposure is not None:
        yield Section("measured", _exposure(audit.exposure))
    worst = worst_recovery(audit)
    if worst is not None:
        yield Section("measured", [*_recoveries(audit.recovery), *_recovery(worst)], f"{LOWER_BOUND} {NOT_SKILL}")
    yield Section("count", [_count(audit)])


def _findings(audit: Audit) -> list[Part]:
    rows = [
        (rule_name(finding.rule), SEVERITIES[finding.severity], finding.scope, finding.tensor or "-", finding.message)
        for finding in ordered(audit)[:MOST_FINDINGS]
    ]
    table = Table(("rule", "kind", "scope", "tensor", "what is wrong"), rows)
    return [table, *_left_out(len(audit.findings) - len(rows), "findings")]


def _left_out(count: int, what: str) -> list[Part]:
    return [f"... and {count} {what} more (--format json lists all)"] if count else []


def _exposure(exposure: Exposure) -> list[Part]:
    facts: list[tuple[str, object]] = [
        ("hidden from everyone", percent(exposure.hidden_share)),
        ("in the clear", percent(exposure.clear_share)),
    ]
    when = nearly_all_seen(exposure)
    facts += [("99 % of the rest seen", when)] if when is not None else []
    facts += [(f"worst {coalition.size} clients", _coalition(coalition)) for coalition in exposure.coalitions]
    return [*_clients(exposure), Facts(facts)]


def _coalition(coalition: Coalition) -> str:
    bound = f", none more than {percent(coalition.at_most)}; {coalition.tried} tried"
    how = coalition.method if coalition.method == "exact" else f"{coalition.method}{bound}"
    return f"{percent(coalition.share)} ({members(coalition.members)}; {how})"


def _clients(exposure: Exposure) -> list[Part]:
    """The most exposed clients."""
    worst = sorted(exposure.clients, key=lambda client: -client.shares[-1])[:MOST_CLIENTS]
    if not worst:
        return []
    rows = [
        (client.client, len(client.rounds), percent(client.shares[0]), percent(client.shares[-1])) for client in worst
    ]
    count = len(exposure.clients)
    who = f"the {len(worst)} most exposed of {count} clients" if count > len(worst) else "clients"
    estimate = "" if exposure.looked_at >= 1 else f" (estimated from {percent(exposure.looked_at)} of all units)"
    title = f"What {who} have seen of all parameters{estimate}:"
    return [title, Table(("client", "proxies", "first", "now"), rows, _NUMBERS)]


def cells(score: AttackScore, error: Callable[[float], str] = squared) -> tuple[str, ...]:
    """The values of MEASURES; `error` writes one whose logarithm is given."""
    return (
        percent(score.exact_share),
        error(score.log10_nmse),
        error(score.log10_nmse_visible),
        f"{score.cosine:.4f}",
        delta(score.delta_recovered),
        delta(score.delta_direction),
    )


def _recoveries(recoveries: Sequence[Recovery]) -> list[Part]:
    """The worst of each measure, a line a proxy; those that give most away first."""
    worst = sorted(recoveries, key=lambda recovery: recovery.peak.log10_nmse)[:MOST_SCOPES]
    rows = [(recovery.scope, recovery.best.attack, *cells(recovery.peak)) for recovery in worst]
    table = Table(("given", "best attack", *MEASURES), rows, _NUMBERS)
    title = "What the attacks recover of all weights (error: squared, 1 knows nothing):"
    return [title, table, *_left_out(len(recoveries) - len(worst), "proxies")]


def _recovery(recovery: Recovery) -> list[Part]:
    rows = [(score.attack, *cells(score)) for score in recovery.attack_table]
    attacks = Table(("attack", *MEASURES), rows, _NUMBERS)
    largest = sorted(recovery.tensors, key=lambda tensor: (-tensor.parameters, tensor.tensor))[:MOST_TENSORS]
    tensors = Table(
        ("tensor", "role", "shown", "known exactly", "error", "cosine", "weight difference", "best attack"),
        [
            (
                tensor.tensor,
                tensor.role,
                percent(tensor.visible_share),
                percent(tensor.exact_share),
                squared(tensor.log10_nmse),
                f"{tensor.cosine:.4f}",
                delta(tensor.delta_recovered),
                tensor.attack,
            )
            for tensor in largest
        ],
        _NUMBERS,
    )
    name = f"{recovery.scope}, attack by attack and for its largest tensors:"
    return [name[0].upper() + name[1:], attacks, tensors]


def _function(function: FunctionRecovery) -> list[Part]:
    rows = [(score.model, real(score.loss), real(score.accuracy)) for score in function.scores]
    rho = "not defined: the global model is no better" if function.rho is None else f"{function.rho:.3f}"
    floor = f"{function.floor}, loss {real(function.floor_loss)}"
    parts: list[Part] = [
        f"Recovered function, {function.scope}:",
        Table(("model", "loss", "accuracy"), rows, _NUMBERS),
        Facts([("attack", function.attack), ("floor", floor), ("rho", rho)]),
    ]
    if function.curve:
        points = [
            (point.public_examples, *map(real, (point.loss, point.accuracy, point.rho, point.base_loss, point.gain)))
            for point in function.curve
        ]
        parts.append(Table(_CURVE, points, frozenset(_CURVE)))
    if function.attempts:
        parts.append(attempts(function))
    left_out = "; ".join(function.left_out)
    return [*parts, f"Not tried, for lack of time: {left_out}"] if left_out else parts


def attempts(function: FunctionRecovery | None) -> Table:
    """Every attack that was tried on the function: by the examples that it used, the best first."""
    tried = function.attempts if function is not None else ()
    best = sorted(tried, key=lambda attempt: (attempt.public_examples, attempt.loss))
    rows = [
        (one.attack, one.public_examples, real(one.loss), real(one.accuracy), one.steps, one.source) for one in best
    ]
    return Table(("attack on the function", "public examples", "loss", "accuracy", "steps", "source"), rows, _NUMBERS)


def _count(audit: Audit) -> str:
    passed = sum(check.status == "pass" for check in audit.checked)
    failed = sum(check.status == "fail" for check in audit.checked)
    return f"{passed} checks passed, {failed} failed, {len(audit.checked) - passed - failed} not run"
