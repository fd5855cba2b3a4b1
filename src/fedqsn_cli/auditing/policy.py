"""The policy that an audit is held against: policy.toml, read strictly.

Everything in it is optional; what a policy does not limit is measured and reported only. An unknown table or key is an
error, because a limit with a typing mistake in its name would never be applied.
"""

from __future__ import annotations

import datetime
import difflib
import fnmatch
import hashlib
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedqsn_cli.auditing.findings import Finding
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.errors import FormatError, InputError

SCOPES: dict[str, tuple[str, ...]] = {
    "invariants": ("FQ001", "FQ002", "FQ003", "FQ004", "FQ005", "FQ006", "FQ007", "FQ010"),
    "merge": ("FQ008",),
    "exposure": ("FQ101", "FQ102", "FQ103"),
    "recovery": ("FQ201", "FQ202", "FQ203"),
    "function": ("FQ301",),
    "regression": ("FQ205",),
}
"""What a policy can require as a whole; single rules can be named too."""

RANGES: dict[str, tuple[float, float]] = {
    "exact_share": (0.0, 1.0),
    "log10_nmse": (-16.0, 2.0),
    "cosine": (-1.0, 1.0),
    "delta_recovered": (-math.inf, 1.0),
    "rho": (-math.inf, math.inf),
    "gain": (-math.inf, math.inf),
}
FUNCTION = frozenset({"rho", "gain"})  # of whole models, not of single tensors
WORSENINGS = (*(name for name in RANGES if name != "gain"), "exposure", "clear_share")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that may be recovered; `log10_nmse` is the least error that must remain. None: no limit."""

    exact_share: float | None = None
    log10_nmse: float | None = None
    cosine: float | None = None
    delta_recovered: float | None = None
    rho: float | None = None
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Waiver:
    """Somebody's decision to live with one finding until a date, that day included.

    Args:
        tensor, scope: globs. Hard and incomplete findings cannot be waived.
    """

    rule: str
    tensor: str
    scope: str
    reason: str
    owner: str
    expires: datetime.date

    def covers(self, finding: Finding) -> bool:
        """Is it about this finding, whatever the date?"""
        about = finding.rule == self.rule and fnmatch.fnmatchcase(finding.scope, self.scope)
        return about and fnmatch.fnmatchcase(finding.tensor or "", self.tensor)


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy.

    Args:
        require: ids of the rules that must have been checked.
        colluders: clients that work together. rounds: how many proxies one client may get in the end.
        public_examples: how many public examples an attacker fine-tunes with; None for the audit's own choice.
        proxy, coalition, tensor: limits for one proxy, several, and any masked tensor in one of them.
        clear: most of all parameters that may be sent neither masked nor quantized.
        client_budget, coalition_budget: most of all parameters that one client, or `colluders` of them, may see.
        regression: measure -> how much worse than the baseline it may be.
        digest: SHA-256 of the file; None for the policy without a file.
    """

    require: frozenset[str] = frozenset()
    colluders: int = 3
    rounds: int | None = None
    public_examples: tuple[int, ...] | None = None
    proxy: Limits = Limits()
    coalition: Limits = Limits()
    tensor: Limits = Limits()
    clear: float | None = None
    client_budget: float | None = None
    coalition_budget: float | None = None
    regression: Mapping[str, float] = field(default_factory=dict)
    waivers: tuple[Waiver, ...] = ()
    digest: str | None = None

    @property
    def required(self) -> frozenset[str]:
        """Rules that must have been checked: those named, and those that a limit is set for."""
        return self.require | {rule for rule, limited in self._limited().items() if limited}

    def _limited(self) -> dict[str, bool]:
        weights = (self.proxy, self.coalition, self.tensor)
        return {
            "FQ101": self.client_budget is not None,
            "FQ102": self.coalition_budget is not None,
            "FQ103": self.clear is not None,
            "FQ201": any(limits.exact_share is not None for limits in weights),
            "FQ202": any(limits.log10_nmse is not None for limits in weights),
            "FQ203": any(limits.cosine is not None for limits in weights),
            "FQ204": any(limits.delta_recovered is not None for limits in weights),
            "FQ301": any(limits.rho is not None for limits in (self.proxy, self.coalition)),
            "FQ302": any(limits.gain is not None for limits in (self.proxy, self.coalition)),
        }

    def summary(self) -> dict[str, Any]:
        """The policy as plain values, for reports."""
        tables = {"proxy": self.proxy, "coalition": self.coalition, "tensor": self.tensor}
        limits = {
            name: {key: value for key in RANGES if (value := getattr(table, key)) is not None}
            for name, table in tables.items()
        }
        return {
            "sha256": self.digest,
            "require": sorted(self.required),
            "threat": {
                "colluders": self.colluders,
                "rounds": self.rounds,
                "public_examples": self.public_examples and list(self.public_examples),
            },
            "limits": {**limits, "clear": self.clear},
            "budget": {"client": self.client_budget, "coalition": self.coalition_budget},
            "regression": dict(self.regression),
            "waivers": [
                {
                    "rule": one.rule,
                    "tensor": one.tensor,
                    "scope": one.scope,
                    "reason": one.reason,
                    "owner": one.owner,
                    "expires": one.expires.isoformat(),
                }
                for one in self.waivers
            ],
        }


def without_file(*, proxies: bool, ledger: bool) -> Policy:
    """The policy of an audit that was given none: nothing is limited, but what the inputs are for must be checked."""
    require = {"FQ001", "FQ002", "FQ003", "FQ005", "FQ006", "FQ007", *SCOPES["recovery"]} if proxies else set()
    return Policy(
        require=frozenset(
            require | ({"FQ010"} if proxies and ledger else set()) | (set(SCOPES["exposure"]) if ledger else set())
        )
    )


def load(path: str | Path) -> Policy:
    """Read a policy.

    Raises:
        InputError: there is none. FormatError: it is not TOML, or a value cannot be.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        hint = "write one with 'fedqsn audit --init-policy'"
        raise InputError("there is no policy", where=path, hint=hint) from None
    try:
        document = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not valid TOML ({error})", where=path) from None
    return parse(document, path, hashlib.sha256(data).hexdigest())


def parse(document: dict[str, Any], where: object, digest: str | None = None) -> Policy:
    """A policy from a parsed document. Raises FormatError."""
    top = _Table(document, "", where)
    scope, threat, limits = top.table("scope"), top.table("threat"), top.table("limits")
    clear, budget, worse = limits.table("clear"), top.table("budget"), top.table("regression")
    policy = Policy(
        require=_required(scope),
        colluders=threat.whole("colluders", 1) or Policy().colluders,
        rounds=threat.whole("rounds", 1),
        public_examples=threat.wholes("public_examples"),
        proxy=_limits(limits.table("proxy")),
        coalition=_limits(limits.table("coalition")),
        tensor=_limits(limits.table("tensor"), but=FUNCTION),
        clear=clear.number("share", 0.0, 1.0),
        client_budget=budget.number("client", 0.0, 1.0),
        coalition_budget=budget.number("coalition", 0.0, 1.0),
        regression={name: value for name in WORSENINGS if (value := worse.number(name, 0.0, math.inf)) is not None},
        waivers=tuple(_waiver(one) for one in top.tables("waiver")),
        digest=digest,
    )
    for table in (top, scope, threat, limits, clear, budget, worse):
        table.finish()
    return policy


def _required(scope: _Table) -> frozenset[str]:
    rules: set[str] = set()
    for name in scope.texts("require"):
        if name not in SCOPES and name not in RULES:
            raise scope.wrong("require", f"{name!r} is neither a scope nor a rule", name, [*SCOPES, *RULES])
        rules |= {*SCOPES.get(name, (name,))}
    return frozenset(rules)


def _limits(table: _Table, but: Collection[str] = ()) -> Limits:
    values = {name: table.number(name, *RANGES[name]) for name in RANGES if name not in but}
    table.finish()
    return Limits(**values)


def _waiver(table: _Table) -> Waiver:
    rule = table.text("rule")
    if rule not in RULES:
        raise table.wrong("rule", f"{rule!r} is not a rule", rule, RULES)
    if RULES[rule].severity != "gate":
        why = "a hard invariant" if RULES[rule].severity == "hard" else "an audit that is not complete"
        raise table.wrong("rule", f"{rule} cannot be waived: it is about {why}")
    expires = table.take("expires")
    if not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
        raise table.wrong("expires", "must be a date such as 2027-01-31 (without quotation marks)")
    waiver = Waiver(
        rule, table.text("tensor", "*"), table.text("scope", "*"), table.text("reason"), table.text("owner"), expires
    )
    table.finish()
    return waiver


class _Table:
    """A TOML table that knows its name, and what nobody has asked for yet."""

    def __init__(self, values: Any, name: str, where: object) -> None:
        self.name, self.where = name, where
        if not isinstance(values, dict):
            raise FormatError(f"{name} must be a table, written [{name}]", where=where)
        self.values = values
        self.known: list[str] = []

    def take(self, key: str) -> Any:
        self.known.append(key)
        return self.values.get(key)

    def table(self, key: str) -> _Table:
        values = self.take(key)
        return _Table({} if key not in self.values else values, self._path(key), self.where)

    def tables(self, key: str) -> list[_Table]:
        found = self.take(key)
        found = [] if found is None and key not in self.values else found
        if not isinstance(found, list):
            raise FormatError(f"{self._path(key)} must be a list of tables, each written [[{key}]]", where=self.where)
        return [_Table(one, f"{key} {number}", self.where) for number, one in enumerate(found, start=1)]

    def number(self, key: str, least: float, most: float) -> float | None:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(key, f"must be a number {_between(least, most)}, not {value!r}")
        if not math.isfinite(value):
            raise self.wrong(key, "must be a finite number")
        return float(value)

    def whole(self, key: str, least: int) -> int | None:
        value = self.take(key)
        if value is not None and (type(value) is not int or value < least):
            raise self.wrong(key, f"must be a whole number, {least} or more, not {value!r}")
        return value

    def wholes(self, key: str) -> tuple[int, ...] | None:
        values = self.take(key)
        if values is None:
            return None
        if not isinstance(values, list) or not values or not all(type(value) is int and value > 0 for value in values):
            raise self.wrong(key, "must be a list of positive whole numbers such as [100, 1000]")
        return tuple(sorted(set(values)))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.take(key)
        value = default if value is None else value
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, "is missing" if value is None else "must be a text that is not empty")
        return value

    def texts(self, key: str) -> list[str]:
        values = self.take(key)
        values = [] if values is None else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.wrong(key, 'must be a list of texts such as ["invariants", "recovery"]')
        return values

    def wrong(self, key: str, what: str, given: str = "", choices: Any = ()) -> FormatError:
        near = difflib.get_close_matches(given, choices, n=1)
        return FormatError(
            f"{self._path(key)} {what}", where=self.where, hint=f"did you mean {near[0]}?" if near else None
        )

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self.values:
            if key not in self.known:
                near = difflib.get_close_matches(key, self.known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(self.known)}"
                raise FormatError(f"{self._path(key)} is not part of a policy", where=self.where, hint=hint)

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _between(least: float, most: float) -> str:
    if math.isinf(least) and math.isinf(most):
        return "of any size"
    if math.isinf(most):
        return f"of {least:g} or more"
    return f"of {most:g} or less" if math.isinf(least) else f"from {least:g} to {most:g}"


def template() -> str:
    """A commented policy to start from."""
    return (Path(__file__).parent / "policy.toml").read_text(encoding="utf-8")
