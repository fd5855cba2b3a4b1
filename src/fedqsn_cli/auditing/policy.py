"""The policy that an audit is held against: policy.toml as values, and what each of its keys may be.

Everything in it is optional; what a policy does not limit is measured and reported only. An unknown table or key is an
error, because a limit with a typo in its name would never be applied.
"""

from __future__ import annotations

import datetime
import fnmatch
import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from fedqsn_cli.auditing.findings import Finding


def _wrong(what: str) -> PydanticCustomError:
    return PydanticCustomError("policy", "{what}", {"what": what})


def _between(least: float, most: float) -> BeforeValidator:
    """A finite number in a range."""
    both = math.isfinite(least) and math.isfinite(most)
    within = f"from {least:g} to {most:g}" if both else "of any size" if math.isinf(least) else f"of {least:g} or more"
    within = f"of {most:g} or less" if math.isinf(least) and math.isfinite(most) else within

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise _wrong(f"must be a number {within}, not {value!r}")
        if not math.isfinite(value):
            raise _wrong("must be a finite number")
        return float(value)

    return BeforeValidator(check)


def _that(accepts: Callable[[Any], object], wanted: str, convert: Callable[[Any], Any] = lambda value: value) -> Any:
    """A value of the kind that is wanted; the text may name what was given instead as {!r}."""

    def check(value: object) -> Any:
        if not accepts(value):
            raise _wrong(f"must be {wanted.format(value)}")
        return convert(value)

    return BeforeValidator(check)


_WHOLE = _that(lambda value: type(value) is int and value >= 1, "a whole number, 1 or more, not {!r}")
_COUNTS = _that(
    lambda values: isinstance(values, list) and values and all(type(value) is int and value > 0 for value in values),
    "a list of positive whole numbers such as [100, 1000]",
    lambda values: tuple(sorted(set(values))),
)
_TEXTS = _that(
    lambda values: isinstance(values, list | tuple) and all(isinstance(value, str) for value in values),
    'a list of texts such as ["invariants", "recovery"]',
    tuple,
)
_DATE = _that(
    lambda value: isinstance(value, datetime.date) and not isinstance(value, datetime.datetime),
    "a date such as 2027-01-31 (without quotation marks)",
)

Share = Annotated[float | None, _between(0.0, 1.0)]
Worsening = Annotated[float | None, _between(0.0, math.inf)]
Whole = Annotated[int | None, _WHOLE]
Text = Annotated[str, _that(lambda value: isinstance(value, str) and value.strip(), "a text that is not empty")]


class Table(BaseModel):
    """A table of the file: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def given(self) -> dict[str, Any]:
        """What the table sets, by key."""
        return {key: value for key, value in self if value is not None}


class Scope(Table):
    """[scope]: parts of an audit, or ids of rules, that must have been checked."""

    require: Annotated[tuple[str, ...], _TEXTS] = ()


class Threat(Table):
    """[threat]: what attackers can do.

    Args:
        colluders: clients that work together. rounds: how many proxies one client may get in the end.
        public_examples: how many public examples an attacker fine-tunes with; None for the audit's own choice.
        public_base: is the model a fine-tune of a public one? None: as --public-base is given.
    """

    colluders: Annotated[int, _WHOLE] = 3
    rounds: Whole = None
    public_examples: Annotated[tuple[int, ...] | None, _COUNTS] = None
    public_base: bool | None = None


class Releases(Table):
    """[release]: what the options of releases may be.

    Args:
        settled: must they follow from those of earlier releases? clients: who may get proxies; None: anybody.
    """

    settled: bool = False
    clients: Annotated[tuple[str, ...] | None, _TEXTS] = None


class WeightLimits(Table):
    """The most that may be recovered of weights; `log10_nmse` is the least error that must remain. None: no limit."""

    exact_share: Share = None
    log10_nmse: Annotated[float | None, _between(-16.0, 2.0)] = None
    cosine: Annotated[float | None, _between(-1.0, 1.0)] = None
    delta_recovered: Annotated[float | None, _between(-math.inf, 1.0)] = None


class Limits(WeightLimits):
    """The most that may be recovered of weights, and of what the model can do."""

    rho: Annotated[float | None, _between(-math.inf, math.inf)] = None
    gain: Annotated[float | None, _between(-math.inf, math.inf)] = None

    def strictest(self, other: Limits) -> Limits:
        """Of each limit the one that allows less."""
        both = {name: [x for x in (value, getattr(other, name)) if x is not None] for name, value in self}
        return Limits(
            **{name: (max if name == "log10_nmse" else min)(values) for name, values in both.items() if values}
        )


class Clear(Table):
    """[limits.clear]: most of all parameters that may be sent neither masked nor quantized."""

    share: Share = None


class AllLimits(Table):
    """[limits]: for one proxy, for several, for any masked tensor in one of them, and for what is not protected."""

    proxy: Limits = Limits()
    coalition: Limits = Limits()
    tensor: WeightLimits = WeightLimits()
    clear: Clear = Clear()

    def of(self, scope: str) -> Limits:
        """Those for "proxy alice" or "coalition of 3". A coalition's limits hold for every proxy in it."""
        return self.coalition if scope.startswith("coalition") else self.proxy.strictest(self.coalition)

    @property
    def of_function(self) -> Limits:
        """Those for the function, which is measured once, of all proxies together: they give what one of them gives."""
        return self.proxy.strictest(self.coalition)

    def any_on(self, measure: str) -> bool:
        """Is there a limit on a measure of weights?"""
        return any(getattr(limits, measure) is not None for limits in (self.proxy, self.coalition, self.tensor))


class Budget(Table):
    """[budget]: most of all parameters that one client, or `colluders` of them together, may see."""

    client: Share = None
    coalition: Share = None


class Regression(Table):
    """[regression]: how much worse than in the baseline a measure may be."""

    exact_share: Worsening = None
    log10_nmse: Worsening = None
    cosine: Worsening = None
    delta_recovered: Worsening = None
    rho: Worsening = None
    exposure: Worsening = None
    clear_share: Worsening = None


class Waiver(Table):
    """[[waiver]]: somebody's decision to live with one finding until a date, that day included.

    Args:
        tensor, scope: globs. Hard and incomplete findings cannot be waived.
    """

    rule: Text
    tensor: Text = "*"
    scope: Text = "*"
    reason: Text
    owner: Text
    expires: Annotated[datetime.date, _DATE]

    def covers(self, finding: Finding) -> bool:
        """Is it about this finding, whatever the date?"""
        about = finding.rule == self.rule and fnmatch.fnmatchcase(finding.scope, self.scope)
        return about and fnmatch.fnmatchcase(finding.tensor or "", self.tensor)


class Policy(Table):
    """A whole policy, table by table as in the file."""

    scope: Scope = Scope()
    threat: Threat = Threat()
    limits: AllLimits = AllLimits()
    budget: Budget = Budget()
    release: Releases = Releases()
    regression: Regression = Regression()
    waiver: tuple[Waiver, ...] = Field(default=(), strict=False)
    _digest: str | None = PrivateAttr(default=None)

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file; None for a policy without one."""
        return self._digest

    def with_digest(self, digest: str | None) -> Policy:
        """The same, from a file with this digest."""
        policy = self.model_copy()
        policy._digest = digest
        return policy
