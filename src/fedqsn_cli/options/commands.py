"""The options of each command; see `groups` for those that several have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options
from fedqsn_cli.options.groups import (
    AXIS,
    CLIENT,
    COMPUTING,
    DATA,
    DEFAULT_GRAD_NORM,
    DOUBLE_QUANT,
    FORCE,
    GATE,
    JOB,
    KEY,
    LAYOUT,
    LEDGER,
    LIMITS,
    MASKING,
    OUT,
    OUTPUT,
    OWNER,
    PLAN,
    PLAN_FILE,
    SIGN,
    SIGNATURES,
    Format,
    Layout,
    MaskingOptions,
    ModelOutputOptions,
    QuantizationOptions,
    RecipeOptions,
    Schedule,
    Train,
    UpdateFormat,
    batch_size_option,
    block_size_option,
    device_option,
    format_option,
    max_length_option,
    save_every_option,
    schedule_option,
)
from fedqsn_cli.options.lora import LoraOptions
from fedqsn_cli.options.privacy import PrivacyOptions
from fedqsn_cli.planning.tensor_plan import MaskAxis


def _minutes(value: float, flag: str) -> float:
    """A time, not negative."""
    if not 0 <= value < float("inf"):
        raise InputError(f"{value} is not a number of minutes", where=flag, hint="0 tries no training at all")
    return value


def _round(value: int, flag: str) -> int:
    """The number of a round, as manifests can hold it."""
    if validate.at_least(0, value, flag) > 2**53:
        raise InputError(f"{value} is not a round", where=flag, hint="count rounds from 1")
    return value


@dataclass(frozen=True, kw_only=True)
class MaskOptions(MaskingOptions, ModelOutputOptions):
    """`mask`."""

    client: Annotated[
        str | None, Option("Mask a server model for this client.", CLIENT, metavar="NAME", check=validate.client)
    ] = None
    round: Annotated[int | None, Option("Number of the round.", CLIENT, check=_round)] = None
    p2: Annotated[
        float | None,
        Option("Share of the visible neurons to hide from the client.", CLIENT, metavar="RATIO", check=validate.ratio),
    ] = None
    schedule: Annotated[Schedule | None, schedule_option(CLIENT)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--round", self.round), ("--p2", self.p2)):
            if self.client is None and value is not None:
                raise InputError("is only used for a client mask", where=flag, hint="name the --client")
            needed = flag == "--p2" or self.schedule != "sticky"
            if self.client is not None and value is None and needed:
                raise InputError("is needed for a client mask", where=flag)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(ModelOutputOptions):
    """`quantize`."""

    format: Annotated[Format, format_option()]
    block_size: Annotated[int, block_size_option()] = 64
    double_quant: Annotated[bool, DOUBLE_QUANT] = False
    layout: Annotated[Layout | None, LAYOUT] = None
    plan_file: Annotated[str | Path | None, PLAN_FILE] = None


@dataclass(frozen=True)
class ExportOptions(QuantizationOptions, MaskingOptions, ModelOutputOptions):
    """`export_proxy`."""

    FIRST = ("out", "push", "client", "round", "key", "ledger", "p2", "p1", "schedule")

    out: Annotated[
        str | Path,
        Option(
            "Folder to write; {client} in it stands for the client's name.",
            OUTPUT,
            metavar="DIR",
            check=validate.here,
        ),
    ]
    _: KW_ONLY
    client: Annotated[
        Sequence[str],
        Option("Name of a client; give it again for more clients.", JOB, metavar="NAME", check=validate.clients),
    ]
    round: Annotated[int, Option("Number of the round.", JOB, check=_round)]
    key: Annotated[str | Path, Option("The job's secret; created if missing.", JOB, env=KEY)]
    ledger: Annotated[str | Path, Option("Record of all releases, added to.", JOB, env=LEDGER)]
    p2: Annotated[
        float,
        Option(
            "Share of the visible neurons to hide from each client.", MASKING, metavar="RATIO", check=validate.ratio
        ),
    ]
    schedule: Annotated[Schedule | None, schedule_option(MASKING)] = None
    train: Annotated[
        Train | None,
        Option(
            "What clients train: visible neurons, or all, those of the public base in the holes too.",
            MASKING,
            shown="the preset's, else visible",
        ),
    ] = None
    budget: Annotated[
        float | None,
        Option(
            "Refuse if a client would then have seen more than this share of all parameters.",
            LIMITS,
            check=validate.up_to_one,
        ),
    ] = None
    coalition: Annotated[
        int | None,
        Option("Refuse if so many clients together would have.", LIMITS, check=validate.at_least_one),
    ] = None
    push: Annotated[
        str | None,
        Option(
            "Upload to this private repository when the proxy is complete; may hold {client} too.",
            OUTPUT,
            metavar="hf://OWNER/NAME",
        ),
    ] = None
    sign: Annotated[str | Path | None, SIGN] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coalition is not None and self.budget is None:
            raise InputError("limits nothing without --budget", where="--coalition")
        for flag, text in (("--out", str(self.out)), ("--push", self.push)):
            if text is not None:
                validate.for_each_client(text, flag, several=len(self.client) > 1)

    @property
    def targets(self) -> list[Path]:
        """The folder of each client."""
        return [Path(str(self.out).replace(validate.CLIENT, name)) for name in self.client]

    @property
    def repositories(self) -> list[str]:
        """The hub repository of each client; none where nothing is pushed."""
        return [self.push.replace(validate.CLIENT, name) for name in self.client] if self.push else []


@dataclass(frozen=True)
class TrainOptions(PrivacyOptions, LoraOptions, RecipeOptions):
    """`client_train`."""

    FIRST = ("out", "data", "eval_data", "max_length", "packing")

    out: Annotated[str | Path, OUT]
    _: KW_ONLY
    data: Annotated[str | Path, Option("Training data: JSONL, CSV or Parquet.", DATA)]
    eval_data: Annotated[str | Path | None, Option("Data to measure the loss on, before and after.", DATA)] = None
    max_length: Annotated[int, max_length_option(DATA)] = 256
    packing: Annotated[
        bool, Option("Put several texts of a language model into one row of --max-length tokens.", DATA)
    ] = False
    update_format: Annotated[UpdateFormat, Option("Number format of the update that is sent back.", OUTPUT)] = "fp32"
    residual: Annotated[
        str | Path | None,
        Option("Keep what the format loses here, and add it in the next round: a private file.", OUTPUT),
    ] = None
    save_every: Annotated[str | None, save_every_option()] = None
    log: Annotated[str | Path | None, Option("Write a JSON line for each step.", OUTPUT)] = None
    tensorboard: Annotated[
        str | Path | None, Option("Write loss, learning rate and speed for TensorBoard.", OUTPUT, metavar="DIR")
    ] = None
    force: Annotated[bool, FORCE] = False
    sign: Annotated[str | Path | None, SIGN] = None
    verify_key: Annotated[
        str | Path | None,
        Option("Refuse a proxy that the owner of this public key did not sign.", SIGNATURES, metavar="PUBLIC"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual is not None and self.update_format == "fp32":
            raise InputError("fp32 loses nothing", where="--residual", hint="give another --update-format")
        if self.dp_epsilon is not None:
            self._check_private()
        if self.method == "lora":
            self._check_lora()

    def _check_lora(self) -> None:
        """Refuse what works on U, which adapters are only the factors of. Raises InputError."""
        full_only = {"--residual": self.residual, "--clip-norm": self.clip_norm}
        for flag, value in full_only.items():
            if value is not None:
                raise InputError("works on weights, not on the factors of adapters", where=flag, hint="leave it out")
        self.check_format(self.update_format)
        if self.precision == "bf16-weights":
            raise InputError(
                "adapters are trained in fp32, and the proxy keeps its number format",
                where="--precision",
                hint="use auto, fp32 or bf16",
            )

    def _check_private(self) -> None:
        """Refuse what private training does not do, and would otherwise leave out silently. Raises InputError."""
        if self.precision not in ("auto", "fp32"):
            raise InputError("is computed in fp32 only", where="--dp-epsilon", hint="give --precision fp32")
        if self.max_grad_norm != DEFAULT_GRAD_NORM:
            raise InputError("every example is clipped by itself", where="--max-grad-norm", hint="give --dp-clip only")
        others = {
            "--packing": self.packing,
            "--gradient-checkpointing": self.gradient_checkpointing,
            "--save-every": self.save_every,
            "--log": self.log,
            "--tensorboard": self.tensorboard,
        }
        for flag, value in others.items():
            if value:
                raise InputError("does not go with --dp-epsilon", where=flag, hint="leave one of them out")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """`inspect`."""

    show_plan: Annotated[
        bool,
        Option("Show, for every tensor, its units and what is done to it.", PLAN, aliases=("--plan",)),
    ] = False
    plan_file: Annotated[str | Path | None, Option("Plan with these TOML rules.", PLAN, aliases=("--overrides",))] = (
        None
    )
    public_base: Annotated[
        str | Path | None,
        Option(
            "Show what of this public model would fill each masked tensor (--fill base).",
            PLAN,
            metavar="BASE",
        ),
    ] = None
    axis: Annotated[MaskAxis | None, AXIS] = None


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """`evaluate`."""

    data: Annotated[str | Path, Option("Evaluation data: JSONL, CSV or Parquet.", DATA)]
    max_length: Annotated[int, max_length_option(DATA)] = 256
    generate: Annotated[
        bool, Option("Let a language model answer the prompts too: BLEU, ROUGE and exact matches.", COMPUTING)
    ] = False
    max_new_tokens: Annotated[
        int | None,
        Option("Longest answer in tokens, for --generate.", COMPUTING, shown="64", check=validate.at_least_one),
    ] = None
    batch_size: Annotated[int, batch_size_option(COMPUTING)] = 32
    device: Annotated[str, device_option(COMPUTING)] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None and not self.generate:
            raise InputError("nothing is generated", where="--max-new-tokens", hint="add --generate")

    @property
    def answer_tokens(self) -> int:
        """Longest answer in tokens."""
        return 64 if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Options):
    """`audit`."""

    outbox: Annotated[
        str | Path | None,
        Option("Audit the proxies of --round in this folder, by the ledger, instead of PROXY...", OWNER, metavar="DIR"),
    ] = None
    round: Annotated[int | None, Option("Number of the round, for --outbox.", OWNER, check=_round)] = None
    truth: Annotated[
        str | Path | None,
        Option("The global model that they were exported from.", OWNER, metavar="GLOBAL"),
    ] = None
    key: Annotated[str | Path | None, Option("The job's secret.", OWNER, env=KEY)] = None
    ledger: Annotated[str | Path | None, Option("Record of all releases.", OWNER, env=LEDGER)] = None
    after: Annotated[
        str | Path | None,
        Option("The global model after the merge.", OWNER, metavar="NEXT"),
    ] = None
    server: Annotated[
        str | Path | None,
        Option(
            "The server model they were exported from, if clients train its holes (--train all).",
            OWNER,
            metavar="SERVER",
        ),
    ] = None
    public_base: Annotated[
        str | Path | None,
        Option(
            "The public model that the owner's was fine-tuned from: attackers have it.",
            DATA,
            metavar="PUBLIC",
            aliases=("--base",),
        ),
    ] = None
    eval_data: Annotated[str | Path | None, Option("Examples to measure the recovered function on.", DATA)] = None
    public_data: Annotated[str | Path | None, Option("Examples that an attacker fine-tunes the proxy with.", DATA)] = (
        None
    )
    earlier: Annotated[
        Sequence[str | Path] | None,
        Option("A proxy of an earlier round that attackers have too; give it again for more.", DATA, metavar="DIR"),
    ] = None
    attack_minutes: Annotated[
        float | None,
        Option("Begin no more attacks on the function after so many; tells what was left out.", DATA, check=_minutes),
    ] = None
    attack_state: Annotated[
        str | Path | None,
        Option("Keep the results of attacks on the function in this file; a later run goes on from it.", DATA),
    ] = None
    policy: Annotated[str | Path | None, Option("Limits, in TOML: what may leak, and what must be checked.", GATE)] = (
        None
    )
    baseline: Annotated[str | Path | None, Option("An earlier audit (JSON): nothing may be worse than then.", GATE)] = (
        None
    )
    verify_key: Annotated[
        str | Path | None,
        Option(
            "Public key that the proxies must be signed with.", SIGNATURES, metavar="PUBLIC", shown="that of --sign"
        ),
    ] = None
    attest: Annotated[str | Path | None, Option("Write the verdict as a signed attestation.", SIGNATURES)] = None
    sign: Annotated[
        str | Path | None, Option("Your private key: signs the attestation.", SIGNATURES, metavar="PRIVATE")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value, why in (("--sign", self.sign, "name the key"), ("--policy", self.policy, "name the limits")):
            if self.attest is not None and value is None:
                raise InputError(f"needs {flag}", where="--attest", hint=why)
