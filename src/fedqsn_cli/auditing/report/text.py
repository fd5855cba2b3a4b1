"""The report for people at a terminal: verdict, findings, then the measurements."""

from __future__ import annotations

from collections.abc import Sequence

from fedqsn_cli import console
from fedqsn_cli.auditing.findings import AttackScore, Audit, FunctionRecovery, Recovery
from fedqsn_cli.auditing.report.common import (
    LOWER_BOUND,
    WORDS,
    delta,
    meaning,
    members,
    ordered,
    proxies_to_99,
    rule_name,
    squared,
    unchecked,
    verdict,
)
from fedqsn_cli.console import Facts, Part, Table
from fedqsn_cli.exposure.results import Exposure
from fedqsn_cli.text import percent, real

NOT_CHECKED = "not checked"
MOST_TENSORS = 8
MOST_SCOPES = 12
MOST_CLIENTS = 10
MOST_FINDINGS = 100


def render(audit: Audit) -> str:
    """The parts as plain text."""
    return console.as_text(parts(audit))


def parts(audit: Audit) -> list[Part]:
    """The report from top to bottom."""
    made: list[Part] = [Facts([("verdict", verdict(audit)), ("meaning", meaning(audit))])]
    made += [*_findings(audit), *_not_checked(audit)]
    if audit.exposure is not None:
        made += _exposure(audit.exposure)
    if audit.recovery:
        made += [*_recoveries(audit.recovery), *_recovery(min(audit.recovery, key=lambda one: one.peak.log10_nmse))]
        made.append(LOWER_BOUND)
    if audit.function is not None:
        made += _function(audit.function)
    return [*made, _count(audit)]


def _findings(audit: Audit) -> list[Part]:
    found = ordered(audit)
    if not found:
        return []
    rows = [
        (rule_name(one.rule), WORDS[one.severity], one.scope, one.tensor or "-", one.message)
        for one in found[:MOST_FINDINGS]
    ]
    table = Table(("rule", "kind", "scope", "tensor", "what is wrong"), rows)
    more = len(found) - len(rows)
    return [table, f"... and {more} findings more (--format json lists all)"] if more else [table]


def _exposure(exposure: Exposure) -> list[Part]:
    estimate = "" if exposure.looked_at >= 1 else f" (estimated from {percent(exposure.looked_at)} of all units)"
    facts: list[tuple[str, object]] = [
        ("hidden from everyone", percent(exposure.hidden_share)),
        ("in the clear", percent(exposure.clear_share)),
        ("99 % of the rest seen", f"after {proxies_to_99(exposure.proxies_to_99)}"),
    ]
    for one in exposure.coalitions:
        how = {"exact": "exact", "greedy": "greedy", "sampled": "sampled"}[one.method]
        bound = "" if one.method == "exact" else f", none more than {percent(one.at_most)}; {one.tried} tried"
        who = f"{members(one.members)}; {how}{bound}"
        facts.append((f"worst {one.size} clients", f"{percent(one.share)} ({who})"))
    worst = sorted(exposure.clients, key=lambda client: -client.shares[-1])[:MOST_CLIENTS]
    rows = [
        (client.client, len(client.rounds), percent(client.shares[0]), percent(client.shares[-1])) for client in worst
    ]
    numbers = frozenset({"proxies", "first", "now"})
    shown = f"What clients have seen of all parameters{estimate}:"
    if len(exposure.clients) > len(worst):
        who = f"the {len(worst)} most exposed of {len(exposure.clients)} clients"
        shown = f"What {who} have seen of all parameters{estimate}:"
    table: list[Part] = [shown, Table(("client", "proxies", "first", "now"), rows, numbers)] if rows else []
    return [*table, Facts(facts)]


_MEASURES = ("known exactly", "error", "error of what is shown", "cosine", "secret difference")


def _cells(one: AttackScore) -> tuple[str, ...]:
    return (
        percent(one.exact_share),
        squared(one.log10_nmse),
        squared(one.log10_nmse_visible),
        f"{one.cosine:.4f}",
        delta(one.delta_recovered),
    )


def _recoveries(found: Sequence[Recovery]) -> list[Part]:
    """The worst of each measure, a line a proxy; those that give most away first."""
    worst = sorted(found, key=lambda one: one.peak.log10_nmse)[:MOST_SCOPES]
    rows = [(one.scope, one.best.attack, *_cells(one.peak)) for one in worst]
    table = Table(("given", "best attack", *_MEASURES), rows, frozenset(_MEASURES))
    more = len(found) - len(worst)
    title = "What the attacks recover of all weights (error: squared, 1 knows nothing):"
    return [title, table, *([f"... and {more} proxies more (--format json lists all)"] if more else [])]


def _recovery(recovery: Recovery) -> list[Part]:
    attacks = Table(
        ("attack", *_MEASURES), [(one.attack, *_cells(one)) for one in recovery.attack_table], frozenset(_MEASURES)
    )
    largest = sorted(recovery.tensors, key=lambda one: (-one.parameters, one.tensor))[:MOST_TENSORS]
    tensors = Table(
        ("tensor", "role", "shown", "known exactly", "error", "cosine", "secret difference", "best attack"),
        [
            (
                one.tensor,
                one.role,
                percent(one.visible_share),
                percent(one.exact_share),
                squared(one.log10_nmse),
                f"{one.cosine:.4f}",
                delta(one.delta_recovered),
                one.attack,
            )
            for one in largest
        ],
        frozenset({"shown", *_MEASURES}),
    )
    name = f"{recovery.scope}, attack by attack and for its largest tensors:"
    return [name[0].upper() + name[1:], attacks, tensors]


def _function(function: FunctionRecovery) -> list[Part]:
    numbers = frozenset({"loss", "accuracy", "public examples", "rho", "base alone, loss", "gain over base"})
    scores = Table(
        ("model", "loss", "accuracy"),
        [(one.model, real(one.loss), real(one.accuracy)) for one in function.scores],
        numbers,
    )
    rho = "not defined: the global model is no better" if function.rho is None else f"{function.rho:.3f}"
    facts = Facts(
        [("attack", function.attack), ("floor", f"{function.floor}, loss {real(function.floor_loss)}"), ("rho", rho)]
    )
    made: list[Part] = [f"Recovered function, {function.scope}:", scores, facts]
    if function.curve:
        rows = [
            (one.public_examples, *map(real, (one.loss, one.accuracy, one.rho, one.base_loss, one.gain)))
            for one in function.curve
        ]
        heads = ("public examples", "loss", "accuracy", "rho", "base alone, loss", "gain over base")
        made.append(Table(heads, rows, numbers))
    return made


def _not_checked(audit: Audit) -> list[Part]:
    rows = [(rule_name(check.rule), check.scope, check.why) for check in unchecked(audit)]
    return [Table((NOT_CHECKED, "scope", "why"), rows)] if rows else []


def _count(audit: Audit) -> str:
    passed = sum(check.status == "pass" for check in audit.checked)
    failed = sum(check.status == "fail" for check in audit.checked)
    return f"{passed} checks passed, {failed} failed, {len(audit.checked) - passed - failed} not run"
