"""The options of `merge` about which updates count, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options
from fedqsn_cli.options.groups import LIMITS, MERGING
from fedqsn_cli.options.privacy import probability

CENTRAL = "Privacy of the clients"

Auto = Literal["auto"]
Normalize = Literal["coverage", "clients"]
OnRefused = Literal["skip", "fail"]
ServerOptimizerName = Literal["sgd", "momentum", "adam", "yogi", "adagrad"]
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
    staleness_discount: Annotated[
        float | None,
        Option(
            "Take updates of earlier rounds, too: r rounds late, one counts (1 + r)^-A times its examples.",
            MERGING,
            metavar="A",
            check=validate.more_than_zero,
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
        if self.rule != "fedavg" and self.staleness_discount is not None:
            raise InputError(
                f"{self.rule} counts all clients the same", where="--staleness-discount", hint="leave it out"
            )

    def check_no_rule(self) -> None:
        """Refuse everything about updates where there are none. Raises InputError."""
        why = "a restore takes no updates", "merge them first"
        validate.none_given(
            ("--clip-norm", self.clip_norm is not None, *why),  # which noise needs, too
            ("--staleness-discount", self.staleness_discount is not None, *why),
            ("--rule", self.rule != "fedavg" or self.byzantine is not None, *why),
        )


@dataclass(frozen=True, kw_only=True)
class CentralPrivacyOptions(RuleOptions):
    """Central differential privacy: what a merged model may tell about any one client."""

    noise_multiplier: Annotated[
        float | None,
        Option(
            "Add noise of this many times --clip-norm to the sum of the updates; all clients count the same.",
            CENTRAL,
            check=validate.more_than_zero,
        ),
    ] = None
    delta: Annotated[
        float | None, Option("δ of the privacy that is accounted for.", CENTRAL, metavar="X", check=probability)
    ] = None
    epsilon: Annotated[
        float | None,
        Option(
            "Refuse a merge after which all merges of the job together exceed this ε.",
            CENTRAL,
            metavar="X",
            check=validate.more_than_zero,
        ),
    ] = None

    def check_privacy(self) -> None:
        """Refuse noise that would hide nothing, or could not be accounted for. Raises InputError."""
        if self.noise_multiplier is None:
            for flag, given in (("--delta", self.delta), ("--epsilon", self.epsilon)):
                if given is not None:
                    raise InputError("there is no noise", where=flag, hint="give it with --noise-multiplier")
            return
        if not isinstance(self.clip_norm, float):
            hint = "give a number that does not depend on the updates"
            raise InputError("noise needs a fixed limit of what one client can do", where="--clip-norm", hint=hint)
        if self.delta is None:
            raise InputError("is needed to account for the noise", where="--delta", hint="less than 1 / clients")
        if self.rule != "fedavg":
            what = f"noise is made for a sum of updates, not for {self.rule}"
            raise InputError(what, where="--noise-multiplier", hint="leave out --rule")
        if self.staleness_discount is not None:
            raise InputError("with noise all clients count the same", where="--staleness-discount", hint="leave it out")


@dataclass(frozen=True, kw_only=True)
class ServerOptimizerOptions(Options):
    """What becomes of the round's average before it is added."""

    server_optimizer: Annotated[
        ServerOptimizerName,
        Option("How the average moves the model: as it is, or with a memory of earlier rounds.", MERGING),
    ] = "sgd"
    server_beta1: Annotated[
        float, Option("How much of the last rounds' direction is kept.", MERGING, metavar="X", check=validate.ratio)
    ] = 0.9
    server_beta2: Annotated[
        float,
        Option("adam, yogi: how much of earlier squares is kept.", MERGING, metavar="X", check=validate.ratio),
    ] = 0.99
    server_tau: Annotated[
        float,
        Option(
            "adam, yogi, adagrad: steps much smaller than this are not enlarged.",
            MERGING,
            metavar="X",
            check=validate.more_than_zero,
        ),
    ] = 1e-3

    def check_optimizer(self, server_lr: float | Auto) -> None:
        """Refuse options that do not go with the optimizer. Raises InputError."""
        name = self.server_optimizer
        if name != "sgd" and server_lr == "auto":
            raise InputError(f"auto measures single steps, not {name}", where="--server-lr", hint="give a number")
        if name not in {"sgd", "momentum"} and server_lr == 1.0:
            what = f"with {name} a weight moves by up to --server-lr in a round, and 1 is far too much"
            raise InputError(what, where="--server-lr", hint="give a number such as 0.001")
        for flag, given, users in (
            ("--server-beta1", self.server_beta1 != 0.9, {"momentum", "adam", "yogi", "adagrad"}),
            ("--server-beta2", self.server_beta2 != 0.99, {"adam", "yogi"}),
            ("--server-tau", self.server_tau != 1e-3, {"adam", "yogi", "adagrad"}),
        ):
            if given and name not in users:
                raise InputError(f"{name} has no such number", where=flag, hint="choose a --server-optimizer")
