"""What a rule of the audit is. Each is declared once, beside the check that applies it; `rules.py` lists them all.

Ids are stable: a rule that is removed leaves its number unused.

FQ00x, FQ01x   hard invariants: never waivable, exit code 4
FQ1xx          exposure, from ledger and key
FQ2xx          recovered weights
FQ3xx          recovered function
FQ9xx          the audit could not be completed: exit code 3, never a pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedqsn_cli.auditing.findings import Check, Entry, Finding, Severity
from fedqsn_cli.auditing.policy import Policy

T = TypeVar("T")

EXPORT_AGAIN = "Do not send this proxy. Export it again with `fedqsn export-proxy`, in a new round."


@dataclass(frozen=True)
class Need(Generic[T]):
    """Something that a check cannot do without.

    Args:
        options: how reports name it, such as "--truth".
        find: takes it from the audit's inputs; None where it was not given.
    """

    options: tuple[str, ...]
    find: Callable[[Any], T | None]


def never_limited(policy: Policy) -> bool:
    """A rule that no policy sets a limit for."""
    return False


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        scope: the part of an audit that policies require it with; None: only by its id.
        needs: the inputs without which it cannot be checked.
        limited: does a policy set a limit for it? Then it must have been checked.
        what, why, fix: what it looks at, why that matters, and how to fix what it finds.
    """

    id: str
    name: str
    severity: Severity
    what: str
    why: str
    fix: str
    scope: str | None = None
    needs: tuple[Need[Any], ...] = ()
    limited: Callable[[Policy], bool] = never_limited

    @property
    def anchor(self) -> str:
        """Where the documentation explains it: docs/rules.md#..."""
        return f"{self.id.lower()}-{self.name}"

    def finding(
        self,
        scope: str,
        message: str,
        *,
        tensor: str | None = None,
        value: float | None = None,
        limit: float | None = None,
    ) -> Finding:
        """A finding with the rule's own severity."""
        return Finding(self.id, scope, tensor, message, value, limit, self.severity)

    def checked(self, scope: str, why: str, found: Sequence[Finding] = ()) -> Iterator[Entry]:
        """The findings of a check that ran, and the check: it passed if it found nothing."""
        yield from found
        yield Check(self.id, scope, "fail" if found else "pass", why)

    def failed(self, scope: str, why: str) -> Check:
        """A check that ran and found something."""
        return Check(self.id, scope, "fail", why)

    def not_run(self, scope: str, why: str) -> Check:
        """A check that could not run."""
        return Check(self.id, scope, "not-run", why)

    def lacks(self, scope: str, *needs: Need[Any], more: str = "") -> Check:
        """A check that could not run without these inputs; `more` ends the sentence."""
        return self.not_run(scope, needed(*needs) + more)


def needed(*needs: Need[Any]) -> str:
    """`needs --truth, --key and --ledger`."""
    options = [option for need in needs for option in need.options]
    return "needs " + " and ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)
