"""FQ901 to FQ905: what keeps an audit from being complete, and where findings and checks are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from fedqsn_cli.auditing.findings import Check, Entry, Finding
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.errors import FedqsnError

T = TypeVar("T")

MISSING_INPUT = Rule(
    "FQ901",
    "missing-input",
    "incomplete",
    what="A check that the policy requires could not run, because an input was not given.",
    why="What was not looked at has not passed.",
    fix="Give the input that the message names, or take the check out of the policy's scope.",
)
NOT_A_NUMBER = Rule(
    "FQ902",
    "not-a-number",
    "incomplete",
    what="A measure is NaN or infinite.",
    why="A comparison with NaN is always false, so it would pass every limit.",
    fix="Look for NaN or infinite weights in the truth and in the proxy.",
)
UNREADABLE = Rule(
    "FQ903",
    "unreadable",
    "incomplete",
    what="An artifact cannot be read: missing, malformed, truncated.",
    why="What cannot be read has not been checked.",
    fix="Fetch or export it again.",
)
DOES_NOT_BELONG = Rule(
    "FQ904",
    "does-not-belong",
    "incomplete",
    what="Two inputs do not belong together: another model, another job, another plan.",
    why="Comparing them would measure nothing.",
    fix="Give the model that the proxy was exported from, its key and its ledger.",
)
WAIVER_EXPIRED = Rule(
    "FQ905",
    "waiver-expired",
    "incomplete",
    what="A waiver of the policy has expired. One that covers nothing is only noted.",
    why="A waiver is a decision with a date; after it the decision must be made again.",
    fix="Remove it, or renew it with a new date.",
)


@dataclass
class Collector:
    """Findings and checks as they come in."""

    findings: list[Finding] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    _known: set[Finding] = field(default_factory=set)

    def add(self, entries: Iterable[Entry]) -> bool:
        """Add findings and checks, in any order; True when there are no more."""
        for entry in entries:
            if not isinstance(entry, Finding):
                self.checks.append(entry)
            elif entry not in self._known:  # two rules may find the same
                self._known.add(entry)
                self.findings.append(entry)
        return True

    def attempt(self, call: Callable[[], T], *scopes: str, problem: str = "") -> T | None:
        """The result of a call; where something cannot be read, None, and a finding for each scope.

        Args:
            problem: what could not be done, before what went wrong. No message tells a path.
        """
        try:
            return call()
        except (FedqsnError, OSError) as error:
            what = error.what if isinstance(error, FedqsnError) else f"cannot be read ({type(error).__name__})"
            message = f"{problem}: {what}" if problem else what
            self.add(UNREADABLE.finding(scope, message) for scope in scopes)
            return None
