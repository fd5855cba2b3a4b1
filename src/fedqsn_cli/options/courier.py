"""The options of the courier."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Annotated

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options, options_of
from fedqsn_cli.options.groups import (
    DATA,
    GATE,
    JOB,
    LEDGER,
    OUT,
    OUTPUT,
    SIGNATURES,
    TRAINING,
    UpdateFormat,
    batch_size_option,
    device_option,
    max_length_option,
)
from fedqsn_cli.options.lora import LoraOptions

COURIER = "Courier"


def _address(value: str, flag: str) -> str:
    """HOST:PORT."""
    host, _, port = value.rpartition(":")
    if host:
        validate.host(host, flag)
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{value!r} is not an address", where=flag, hint="give HOST:PORT, such as fl.example.org:443")
    return value


def _time(value: str, flag: str) -> str:
    """A time such as 6h."""
    with suppress(InputError):
        if validate.interval(value, flag)[1] is not None:
            return value
    raise InputError(f"{value!r} is not a time", where=flag, hint="give a time such as 30m or 6h")


@dataclass(frozen=True, kw_only=True)
class CourierInitOptions(Options):
    """`courier_init`."""

    server: Annotated[str, Option("Address that sites connect to.", COURIER, metavar="HOST:PORT", check=_address)] = (
        "localhost:8102"
    )
    key: Annotated[str | Path, Option("Your public key, from 'fedqsn keygen'.", SIGNATURES, metavar="PUBLIC")]
    project: Annotated[
        str, Option("Name of the project, in all certificates.", COURIER, metavar="NAME", check=validate.project)
    ] = "fedqsn"
    local: Annotated[
        Sequence[str] | None,
        Option(
            "Make a site of this client on this machine, too; may be repeated.",
            COURIER,
            metavar="CLIENT",
            check=validate.sites,
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.not_the_host(self.local or (), self.address[0], "--local")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.server.rpartition(":")
        return host, int(port)


@dataclass(frozen=True)
class CourierJoinOptions(Options):
    """`courier_join`."""

    out: Annotated[str | Path, OUT]
    _: KW_ONLY
    name: Annotated[
        str,
        Option(
            "Name of the client, as the owner exports proxies for it.", COURIER, metavar="CLIENT", check=validate.site
        ),
    ]
    data: Annotated[str | Path | None, Option("Training data, written into site.toml.", DATA)] = None
    eval_data: Annotated[str | Path | None, Option("Evaluation data, written into site.toml.", DATA)] = None
    device: Annotated[str, device_option(DATA)] = "auto"
    max_length: Annotated[int, max_length_option(DATA)] = 256
    approval: Annotated[str | Path | None, Option("The owner's answer to the request: finish joining.", COURIER)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (self.approval is None):
            raise InputError("is needed to join", where="--data", hint="give it, or the --approval to finish joining")


@dataclass(frozen=True)
class CourierApproveOptions(Options):
    """`courier_approve`."""

    out: Annotated[str | Path, Option("File to write, for the site.", OUTPUT, check=validate.here)]


@dataclass(frozen=True, kw_only=True)
class CourierServeOptions(Options):
    """`courier_serve`."""

    server_only: Annotated[bool, Option("Leave out the sites on this machine.", COURIER)] = False


@dataclass(frozen=True, kw_only=True)
class CourierStopOptions(Options):
    """`courier_stop`."""


@dataclass(frozen=True, kw_only=True)
class CourierStatusOptions(Options):
    """`courier_status`."""


@dataclass(frozen=True, kw_only=True)
class ProposalOptions(LoraOptions):
    """How the owner would have a site train; a site bounds it.

    Raises:
        InputError: the options of adapters do not go together, or with the format of updates.
    """

    epochs: Annotated[
        float, Option("Passes over the data, at most those of the site.", TRAINING, check=validate.more_than_zero)
    ] = 1.0
    lr: Annotated[float, Option("Largest learning rate.", TRAINING, check=validate.more_than_zero)] = 5e-5
    batch_size: Annotated[int, batch_size_option(TRAINING)] = 16
    update_format: Annotated[UpdateFormat, Option("Number format of the updates.", TRAINING)] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_format(self.update_format)

    def words(self) -> list[str]:
        """As options of `client-train`: those that are not its defaults, and each value within its own word."""
        words = []
        for declared in options_of(ProposalOptions):
            value = getattr(self, declared.name)
            if value is True:
                words.append(declared.flag)
            elif value not in (None, False, ()):
                words += [f"{declared.flag}={one}" for one in (value if isinstance(value, tuple) else (value,))]
        return words


@dataclass(frozen=True)
class CourierPackOptions(ProposalOptions):
    """`courier_pack`."""

    out: Annotated[
        str | Path, Option("Folder to make, for 'fedqsn courier-send'.", OUTPUT, metavar="DIR", check=validate.here)
    ]
    _: KW_ONLY
    key: Annotated[str | Path, Option("Your private key, from 'fedqsn keygen'.", SIGNATURES, metavar="PRIVATE")]
    attestation: Annotated[str | Path, Option("The passed audit of these proxies, from 'fedqsn audit --attest'.", GATE)]
    policy: Annotated[
        str | Path | None, Option("The policy that they must have been held against.", GATE, shown="any")
    ] = None
    ledger: Annotated[str | Path, Option("Record of all releases.", JOB, env=LEDGER)]

    @property
    def proposal(self) -> ProposalOptions:
        """What a site is told."""
        return ProposalOptions(**{field.name: getattr(self, field.name) for field in fields(ProposalOptions)})


@dataclass(frozen=True, kw_only=True)
class CourierSendOptions(Options):
    """`courier_send`."""

    into: Annotated[
        str | Path, Option("Folder for the updates, one for each client.", OUTPUT, metavar="DIR", check=validate.here)
    ]
    key: Annotated[
        str | Path | None,
        Option("Open the updates with your private key; without it, they stay sealed.", SIGNATURES, metavar="PRIVATE"),
    ] = None
    at_least: Annotated[
        int | None,
        Option("End when so many updates have come.", COURIER, shown="all", check=validate.at_least_one),
    ] = None
    deadline: Annotated[
        str, Option("End after this time; too few updates are an error then.", COURIER, metavar="TIME", check=_time)
    ] = "6h"

    @property
    def seconds(self) -> float:
        """Until the deadline."""
        return float(validate.interval(self.deadline, "--deadline")[1] or 0.0)
