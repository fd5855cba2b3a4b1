"""How a check is run: over what it looks at, with the inputs that it needs.

    @check(MASK_NOT_FROM_KEY, each_proxy, KEY, problem="...")
    def masks_of_the_key(inputs: Inputs, proxy: OpenedProxy, job: JobKey) -> Iterator[Entry]: ...

A check yields findings and checks. Where its inputs are missing it is "not-run", with the reason, and never passes;
what cannot be read becomes an FQ903 finding, and what the check had found until then is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

from fedqsn_cli.auditing.completeness import Collector
from fedqsn_cli.auditing.findings import Entry
from fedqsn_cli.auditing.inputs import Inputs, ProxyFolder
from fedqsn_cli.auditing.opened_proxy import OpenedProxy
from fedqsn_cli.auditing.registry import Need, Rule


class Scoped(Protocol):
    """Something that a check looks at, and how findings name it."""

    @property
    def scopes(self) -> tuple[str, ...]:
        """One for itself, or one for each proxy in it."""


Item = TypeVar("Item", bound=Scoped)
T = TypeVar("T")
Over = Callable[[Inputs], Iterable[Item]]


@dataclass(frozen=True)
class Together:
    """Several proxies that a check compares, or none: a check of the whole job."""

    scopes: tuple[str, ...]
    proxies: tuple[OpenedProxy, ...] = ()


def each_folder(inputs: Inputs) -> Iterable[ProxyFolder]:
    """Every proxy that was named, whether it can be read or not."""
    return inputs.folders


def each_proxy(inputs: Inputs) -> Iterable[OpenedProxy]:
    """Every proxy that can be read."""
    return inputs.proxies


def grouped(proxies: Iterable[OpenedProxy], kind: Callable[[OpenedProxy], Hashable]) -> list[Together]:
    """Proxies of one kind together, in the order of the first of each."""
    kinds: dict[Hashable, list[OpenedProxy]] = {}
    for proxy in proxies:
        kinds.setdefault(kind(proxy), []).append(proxy)
    return [Together(tuple(proxy.scope for proxy in group), tuple(group)) for group in kinds.values()]


def once(scope: str) -> Callable[[Inputs], Iterable[Together]]:
    """One check of all proxies together."""
    return lambda inputs: [Together((scope,), inputs.proxies)]


@dataclass(frozen=True)
class AuditCheck:
    """A check that knows what it looks at; `rules.py` finds it in its module.

    Args:
        rule: whose check is "not-run" where an input is missing.
        function: yields what it finds in one item, given the inputs, the item, and its need if it has one.
        over: the items that it looks at, one after the other.
        more: ends the reason why it did not run without its input.
        problem: what could not be done where something cannot be read.
        failed: why it is "not-run" in that case; left out where another check of the rule remains.
    """

    rule: Rule
    function: Callable[..., Iterator[Entry]]
    over: Callable[[Inputs], Iterable[Any]]
    need: Need[Any] | None
    more: str = ""
    problem: str = ""
    failed: str = ""

    def run(self, inputs: Inputs, collector: Collector) -> None:
        """Look at all items."""
        given = [] if self.need is None else [self.need.find(inputs)]
        for item in self.over(inputs):
            if self.need is not None and given == [None]:
                collector.add(self.rule.lacks(scope, self.need, more=self.more) for scope in item.scopes)
            else:
                self._apply(collector, item.scopes, inputs, item, *given)

    def _apply(self, collector: Collector, scopes: tuple[str, ...], *arguments: Any) -> None:
        if not collector.attempt(lambda: collector.add(self.function(*arguments)), *scopes, problem=self.problem):
            collector.add(self.rule.not_run(scope, self.failed) for scope in scopes if self.failed)


@overload
def check(
    rule: Rule, over: Over[Item], /, **words: Any
) -> Callable[[Callable[[Inputs, Item], Iterator[Entry]]], AuditCheck]: ...


@overload
def check(
    rule: Rule, over: Over[Item], need: Need[T], /, **words: Any
) -> Callable[[Callable[[Inputs, Item, T], Iterator[Entry]]], AuditCheck]: ...


def check(
    rule: Rule, over: Over[Any], need: Need[Any] | None = None, /, **words: Any
) -> Callable[[Callable[..., Iterator[Entry]]], AuditCheck]:
    """Declare a check: a decorator whose arguments are those of `AuditCheck`."""
    return lambda function: AuditCheck(rule, function, over, need, **words)


def run_checks(checks: Sequence[AuditCheck], inputs: Inputs, collector: Collector) -> None:
    """Run checks in their order."""
    for one in checks:
        one.run(inputs, collector)
