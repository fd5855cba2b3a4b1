"""Options that several commands have, in the groups in which functions need them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options
from fedqsn_cli.planning.tensor_plan import MaskAxis, Where

CLIENT, COMPUTING, DATA, GATE, JOB, LIMITS = "Client mask", "Computing", "Data", "Gate", "Job", "Limits"
MASKING, MERGING, OUTPUT, OWNER, PLAN = "Masking", "Merging", "Output", "What only the owner has", "Plan"
QUANTIZATION, RESTORING, SEARCHING, TRAINING = "Quantization", "Restoring", "Searching (auto)", "Training"
SIGNATURES = "Signatures"

Fill = Literal["zero", "base"]
Format = Literal["nf4", "fp4", "int8", "nf3", "nf2", "none"]
Layout = Literal["bnb", "dense"]
OptimizerName = Literal["adamw", "adamw-8bit", "sgd"]
Precision = Literal["auto", "fp32", "bf16", "bf16-weights"]
Preset = Literal["paper", "strong", "base-only"]
Schedule = Literal["fresh", "sticky"]
Train = Literal["visible", "all"]
UpdateFormat = Literal["fp32", "bf16", "fp16", "int8", "nf4"]

KEY, LEDGER = "FEDQSN_KEY", "FEDQSN_LEDGER"


def check_layers(value: str, flag: str) -> str:
    """A list of layers."""
    from fedqsn_cli.planning.placement import parse_layers

    return validate.named(parse_layers, value, flag)


def check_schedule(value: str, flag: str) -> str:
    """A list of layers and their ratios."""
    from fedqsn_cli.planning.placement import parse_schedule

    return validate.named(parse_schedule, value, flag)


def device_option(panel: str) -> Option:
    """Where to compute."""
    return Option("auto, cpu, cuda or cuda:N.", panel, metavar="DEVICE")


def max_length_option(panel: str) -> Option:
    """Where to cut texts."""
    return Option("Cut texts to this many tokens.", panel, check=validate.at_least_one)


def batch_size_option(panel: str) -> Option:
    """How many examples go through the model at once."""
    return Option("Examples in a batch.", panel, check=validate.at_least_one)


def check_interval(value: str, flag: str) -> str:
    """A number of steps, or a time."""
    validate.interval(value, flag)
    return value


def save_every_option() -> Option:
    """How often the state of a training is saved."""
    text = "Save the state after this many steps, or this time such as 10m; the same command then goes on from it."
    return Option(text, TRAINING, metavar="N", check=check_interval)


def schedule_option(panel: str) -> Option:
    """How a client's mask changes from round to round."""
    return Option("Hide other neurons in every round, or always the same.", panel, shown="the preset's, else fresh")


def format_option(shown: str = "") -> Option:
    """How quantized numbers are stored."""
    return Option("Number format of the weights; none keeps them as they are.", QUANTIZATION, shown=shown)


def block_size_option(shown: str = "") -> Option:
    """How many numbers share a scale."""
    text = "Weights that share one scale: a power of two, 32 to 4096."
    return Option(text, QUANTIZATION, shown=shown, check=validate.block_size)


LAYOUT = Option(
    "Packed as bitsandbytes stores it, or ordinary tensors with rounded values.",
    QUANTIZATION,
    shown="bnb if the format has it",
)
DOUBLE_QUANT = Option("Quantize the scales too (nf4 and fp4 in layout bnb).", QUANTIZATION)


OUT = Option("Folder to write.", OUTPUT, metavar="DIR", check=validate.here)
FORCE = Option("Replace what is at --out, if fedqsn wrote it and it is of the same kind.", OUTPUT)
SIGN = Option("Sign the output with this private key, from 'fedqsn keygen'.", SIGNATURES, metavar="PRIVATE")
TRAINED_BASE = Option(
    "The public model of the job, if clients trained it in the holes (--train all).", RESTORING, metavar="BASE"
)
PLAN_FILE = Option("TOML rules for tensors that need other treatment.", MASKING, aliases=("--plan",))
AXIS = Option(
    "What to hide in linear layers: output neurons, input features, or single weights.",
    MASKING,
    shown="the key's, else neuron",
)


USUAL_SHARD_SIZE = "5GB"
USUAL_SHARD_BYTES = validate.size_in_bytes(USUAL_SHARD_SIZE, "--max-shard-size")


@dataclass(frozen=True)
class ModelOutputOptions(Options):
    """Where a model is written, and how."""

    out: Annotated[str | Path, OUT]
    _: KW_ONLY
    max_shard_size: Annotated[
        str, Option("Start another file beyond this size.", OUTPUT, metavar="SIZE", check=validate.size)
    ] = USUAL_SHARD_SIZE
    force: Annotated[bool, FORCE] = False

    @property
    def max_shard_bytes(self) -> int:
        """Largest size of a file in bytes."""
        return validate.size_in_bytes(self.max_shard_size, "--max-shard-size")


@dataclass(frozen=True, kw_only=True)
class KeyOptions(Options):
    """The job that a model is masked for."""

    key: Annotated[str | Path, Option("The job's secret; created if missing.", MASKING, env=KEY)]
    trust_records: Annotated[
        bool,
        Option("Seal a key file or ledger that has no seal as it is: only if nobody else could write it.", MASKING),
    ] = False


@dataclass(frozen=True, kw_only=True)
class HidingOptions(Options):
    """What the server mask hides; None takes the key's."""

    p1: Annotated[
        float | None,
        Option(
            "Share of all neurons to hide from everyone; 1 sends nothing of the model (with --fill base, --train all).",
            MASKING,
            metavar="RATIO",
            shown="the key's",
            check=validate.up_to_one,
        ),
    ] = None
    axis: Annotated[MaskAxis | None, AXIS] = None
    where: Annotated[
        Where | None,
        Option(
            "What to hide: all matrices; the outputs of attention and MLP, and the embeddings; or all of one kind.",
            MASKING,
            shown="the key's, else all",
        ),
    ] = None
    layers: Annotated[
        str | None,
        Option(
            "Hide in these layers only, such as embeddings,0-3,5,head.",
            MASKING,
            metavar="LIST",
            shown="the key's, else all",
            check=check_layers,
        ),
    ] = None
    p1_schedule: Annotated[
        str | None,
        Option(
            "Other ratios than --p1, by layer, such as 0-2=0.9,3-5=0.5,embeddings=0.2.",
            MASKING,
            metavar="LIST",
            shown="the key's, else none",
            check=check_schedule,
        ),
    ] = None
    preset: Annotated[
        Preset | None,
        Option(
            "paper: fill zero, where outputs, schedule fresh. strong: fill base, where all, p1 0.5, schedule sticky, "
            "train all. base-only: as strong with p1 1, nothing of the model is sent. Options that are given win.",
            MASKING,
        ),
    ] = None
    plan_file: Annotated[str | Path | None, PLAN_FILE] = None


@dataclass(frozen=True, kw_only=True)
class FillOptions(Options):
    """What is put where units are hidden, and what becomes of the others; None takes the model's."""

    rescale: Annotated[
        bool | None,
        Option(
            "Scale what stays visible, to make up for what does not.",
            MASKING,
            flag="--rescale/--no-rescale",
            shown="--rescale with fill zero",
        ),
    ] = None
    fill: Annotated[
        Fill | None,
        Option(
            "Put zeros where neurons are hidden, or the public base's own neurons.",
            MASKING,
            shown="the server model's, else zero",
        ),
    ] = None
    public_base: Annotated[
        str | Path | None,
        Option("The public model for --fill base: folder or hf:// reference.", MASKING, metavar="BASE"),
    ] = None


PRESETS: dict[Preset, dict[str, str | float]] = {
    "paper": {"fill": "zero", "where": "outputs", "schedule": "fresh"},
    "strong": {"fill": "base", "where": "all", "p1": 0.5, "schedule": "sticky", "train": "all"},
    "base-only": {"fill": "base", "where": "all", "p1": 1.0, "schedule": "sticky", "train": "all"},
}


@dataclass(frozen=True, kw_only=True)
class MaskingOptions(FillOptions, HidingOptions, KeyOptions):
    """How a model is masked. What is not given is filled in from the preset.

    Raises:
        InputError: the preset needs a public base, and there is none.
    """

    allow_untrainable: Annotated[
        bool,
        Option(
            "Accept a model though no client could train its proxies, for lack of a tokenizer for instance.",
            MASKING,
            env="FEDQSN_ALLOW_UNTRAINABLE",
        ),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is None:
            return
        for name, value in PRESETS[self.preset].items():
            nothing_to_train = name == "train" and self.fill == "zero"
            if getattr(self, name, value) is None and not nothing_to_train:
                object.__setattr__(self, name, value)
        if self.fill == "base" and self.public_base is None:
            fills = f"preset {self.preset} fills the holes with a public model's neurons"
            hint = f"{fills}; give --public-base, or --fill zero"
            raise InputError("--fill base needs the public base", where="--public-base", hint=hint)


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(Options):
    """How weights are quantized; None takes the model's."""

    format: Annotated[Format | None, format_option("the server model's, else nf4")] = None
    block_size: Annotated[int | None, block_size_option("the server model's, else 64")] = None
    double_quant: Annotated[bool | None, DOUBLE_QUANT] = None
    layout: Annotated[Layout | None, LAYOUT] = None


DEFAULT_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """How a model is trained: linear warm-up and decay of the learning rate."""

    epochs: Annotated[float, Option("Passes over the data.", TRAINING, check=validate.more_than_zero)] = 1.0
    max_steps: Annotated[int | None, Option("Stop after this many steps.", TRAINING, check=validate.at_least_one)] = (
        None
    )
    lr: Annotated[float, Option("Largest learning rate.", TRAINING, check=validate.more_than_zero)] = 5e-5
    warmup_ratio: Annotated[
        float, Option("Share of steps to warm up; then it falls to 0.", TRAINING, check=validate.up_to_one)
    ] = 0.1
    weight_decay: Annotated[float, Option("Weight decay of matrices.", TRAINING, check=validate.not_negative)] = 0.01
    max_grad_norm: Annotated[float, Option("Clip gradients to this norm.", TRAINING, check=validate.more_than_zero)] = (
        DEFAULT_GRAD_NORM
    )
    batch_size: Annotated[int, batch_size_option(TRAINING)] = 16
    gradient_accumulation: Annotated[int, Option("Batches in a step.", TRAINING, check=validate.at_least_one)] = 1
    seed: Annotated[
        int, Option("Decides order and dropout, never what is hidden.", TRAINING, check=validate.not_negative)
    ] = 0
    device: Annotated[str, device_option(TRAINING)] = "auto"
    precision: Annotated[
        Precision, Option("Number format of the computation; bf16-weights: of the weights too.", TRAINING)
    ] = "auto"
    optimizer: Annotated[
        OptimizerName, Option("AdamW, AdamW with 8-bit moments (bitsandbytes), or SGD without momentum.", TRAINING)
    ] = "adamw"
    gradient_checkpointing: Annotated[
        bool, Option("Compute activations a second time instead of keeping them: less memory, more time.", TRAINING)
    ] = False
