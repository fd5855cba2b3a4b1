"""All rules and checks of the audit, read from the modules that declare them.

A new rule is one new file, and its name in MODULES. Checks run in that order: a failed one often explains the next.
"""

from __future__ import annotations

from typing import TypeVar

from fedqsn_cli.auditing import completeness
from fedqsn_cli.auditing.checks import AuditCheck
from fedqsn_cli.auditing.invariants import (
    contents,
    copied_units,
    holes,
    masks,
    other_models,
    rebuild,
    reproduce,
    same_codes,
    signed,
)
from fedqsn_cli.auditing.limits import companions, exposure, function, options, recovery, regression
from fedqsn_cli.auditing.limits.measured import LimitCheck
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.registry import Rule

T = TypeVar("T")

MODULES = (
    reproduce,
    contents,
    signed,
    masks,
    rebuild,
    holes,
    same_codes,
    copied_units,
    other_models,
    companions,
    exposure,
    options,
    recovery,
    function,
    regression,
    completeness,
)


def _declared(kind: type[T]) -> list[T]:
    """Everything of a kind that the modules declare, or import from one another, once each."""
    values = (value for module in MODULES for value in vars(module).values())
    return list(dict.fromkeys(value for value in values if isinstance(value, kind)))


RULES: dict[str, Rule] = {rule.id: rule for rule in sorted(_declared(Rule), key=lambda rule: rule.id)}
"""All rules by id, in the order of ids."""

CHECKS: list[AuditCheck] = _declared(AuditCheck)
"""What is applied to proxies and models, in this order."""

LIMITS: list[LimitCheck] = _declared(LimitCheck)
"""What is applied to measurements, in this order."""

SCOPES: dict[str, tuple[str, ...]] = {
    scope: tuple(rule.id for rule in RULES.values() if rule.scope == scope)
    for scope in dict.fromkeys(rule.scope for rule in RULES.values())
    if scope is not None
}
"""What a policy can require as a whole; single rules can be named too."""


def required(policy: Policy) -> frozenset[str]:
    """Rules that must have been checked: those named, those that a limit is set for, and that of a public base."""
    named = {rule for name in policy.scope.require for rule in SCOPES.get(name, (name,))}
    named |= {"FQ204"} if policy.threat.public_base else set()
    return frozenset(named | {rule.id for rule in RULES.values() if rule.limited(policy)})
