"""The options of `merge` about which updates count, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options
from fedqsn_cli.options.groups import LIMITS, MERGING

Auto = Literal["auto"]
Normalize = Literal["coverage", "clients"]
OnRefused = Literal["skip", "fail"]
Rule = Literal["fedavg", "median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "bulyan"]


def number_or_auto(value: float | str, flag: str) -> float | Auto:
    """A number, or auto."""
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise InputError(f"{value!r} is neither a number nor auto", where=flag) from None


def positive_or_auto(value: float | str, flag: str) -> float | Auto:
    """A number above 0, or auto."""
    number = number_or_auto(value, flag)
    return "auto" if number == "auto" else validate.more_than_zero(number, flag)


@dataclass(frozen=True, kw_only=True)
class AdmissionOptions(Options):
    """Which updates count."""

    max_update_norm: Annotated[
        float,
        Option(
            "Refuse an update whose norm is more than this many times the model's.",
            LIMITS,
            check=validate.more_than_zero,
        ),
    ] = 10.0
    max_unit_norm: Annotated[
        float | None,
        Option(
            "Refuse an update that moves a tensor or a neuron by more than this many times the size of its weights.",
            LIMITS,
            shown="10, or --max-update-norm if that is more",
            check=validate.more_than_zero,
        ),
    ] = None
    max_examples: Annotated[
        int | None,
        Option(
            "Refuse an update that claims more examples.",
            LIMITS,
            shown="10 times the median of three or more updates",
            check=validate.at_least_one,
        ),
    ] = None
    min_clients: Annotated[
        int, Option("Refuse a round that fewer updates are merged in.", LIMITS, check=validate.at_least_one)
    ] = 1
    on_refused: Annotated[
        OnRefused, Option("End the merge at an update that is refused, or name it and go on.", LIMITS)
    ] = "fail"

    @property
    def unit_limit(self) -> float:
        """`max_unit_norm`, or its default."""
        return max(10.0, self.max_update_norm) if self.max_unit_norm is None else self.max_unit_norm


@dataclass(frozen=True, kw_only=True)
class RuleOptions(Options):
    """How updates are put together."""

    normalize: Annotated[Normalize, Option("Average a neuron over the clients that saw it, or over all.", MERGING)] = (
        "coverage"
    )
    rule: Annotated[
        Rule,
        Option("How updates become one step: their weighted average, or a rule that withstands attackers.", MERGING),
    ] = "fedavg"
    byzantine: Annotated[
        int | None,
        Option(
            "How many of the clients may be attackers; every rule but fedavg needs to know.",
            MERGING,
            check=validate.not_negative,
        ),
    ] = None
    clip_norm: Annotated[
        float | Auto | None,
        Option(
            "Scale updates with a larger norm down to this one; auto takes the median of the norms.",
            MERGING,
            metavar="C|auto",
            check=positive_or_auto,
        ),
    ] = None

    def check_rule(self) -> None:
        """Refuse options that do not go with the rule. Raises InputError."""
        if self.rule == "fedavg" and self.byzantine is not None:
            raise InputError("fedavg withstands no attacker", where="--byzantine", hint="choose another --rule")
        if self.rule != "fedavg" and self.byzantine is None:
            raise InputError(f"{self.rule} needs to know how many attackers there may be", where="--byzantine")
        if self.rule != "fedavg" and self.normalize == "clients":
            what = f"{self.rule} looks at the clients that saw a neuron only"
            raise InputError(what, where="--normalize", hint="leave it out")

    def check_no_rule(self) -> None:
        """Refuse everything about updates where there are none. Raises InputError."""
        if self.rule != "fedavg" or self.byzantine is not None or self.clip_norm is not None:
            flag = "--clip-norm" if self.clip_norm is not None else "--rule"
            raise InputError("a restore takes no updates", where=flag, hint="merge them first")
