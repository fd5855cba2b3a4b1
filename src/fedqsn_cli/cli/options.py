"""The options that commands share: one declaration, one wording and one check each.

Checks that need no file run before anything else does; the functions behind the commands check again, because they
are called from Python too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import typer

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.groups import Schedule as Schedule
from fedqsn_cli.options.groups import Train as Train

Check = Callable[[Any, str], Any]

MASKING, CLIENT, QUANTIZATION, JOB, OUTPUT = "Masking", "Client mask", "Quantization", "Job", "Output"
DATA, TRAINING, COMPUTING, PLAN = "Data", "Training", "Computing", "Plan"
MERGING, RESTORING, SEARCHING, LIMITS = "Merging", "Restoring", "Searching (auto)", "Limits"


def option(name: str, *more: str, text: str, panel: str, check: Check | None = None, **other: Any) -> Any:
    """A typer option whose value goes through `check(value, name)`, each of them when it may be given many times."""
    callback = _callback(check, name) if check else None
    return typer.Option(name, *more, help=text, rich_help_panel=panel, callback=callback, **other)


def argument(metavar: str, *, text: str) -> Any:
    """A typer argument that must not be empty."""
    return typer.Argument(help=text, metavar=metavar, show_default=False, callback=_callback(not_empty, metavar))


def _callback(check: Check, name: str) -> Callable[[Any], Any]:
    def call(value: Any) -> Any:
        if value is None:
            return None
        try:
            return [check(item, name) for item in value] if isinstance(value, list) else check(value, name)
        except InputError as error:
            raise InputError(error.what, where=error.where or name, hint=error.hint) from None

    return call


def not_empty(value: str, name: str) -> str:
    """A path, reference or word: text, and not the empty string (an unset variable in a script, most often)."""
    if not value:
        raise InputError("is empty", where=name, hint="is a variable in your script unset?")
    if any("\ud800" <= character <= "\udfff" for character in value):  # how Python passes on bytes that are no text
        raise InputError(f"{value!r} is not UTF-8 text", where=name, hint="rename it")
    return value


def not_negative(value: float, name: str) -> float:
    """A finite number, zero allowed."""
    return validate.at_least(0, value, name)


def file(flag: str, *, text: str, panel: str, metavar: str = "FILE") -> Any:
    """An option that names a file, a folder or a hub reference."""
    return option(flag, text=text, panel=panel, metavar=metavar, check=not_empty)


def count(flag: str, *, text: str, panel: str, least: int = 1) -> Any:
    """An option that takes a whole number from `least` up."""
    return option(flag, text=text, panel=panel, metavar="N", check=partial(validate.at_least, least))


def real(flag: str, *, text: str, panel: str, check: Check) -> Any:
    """An option that takes a real number."""
    return option(flag, text=text, panel=panel, metavar="X", check=check)


def real_or_auto(flag: str, *, text: str, panel: str, check: Check) -> Any:
    """An option that takes a real number, or the word auto."""

    def parsed(value: str) -> float | str:
        if value == "auto":
            return value
        try:
            return float(value)
        except ValueError:
            raise InputError(f"{value!r} is neither a number nor auto", where=flag) from None

    def checked(value: float | str, name: str) -> Any:
        return value if value == "auto" else check(value, name)

    return option(flag, text=text, panel=panel, metavar="X|auto", check=checked, parser=parsed)


def ratio(flag: str, *, text: str, panel: str, **other: Any) -> Any:
    """An option that takes a share of units, 0 to below 1."""
    return option(flag, text=text, panel=panel, metavar="RATIO", check=_ratio, **other)


def name(flag: str, *, text: str, panel: str) -> Any:
    """An option that names a client."""
    return option(flag, text=text, panel=panel, metavar="NAME", check=_client)


def device(panel: str) -> Any:
    """The option that chooses where to compute."""
    return option("--device", text="auto, cpu, cuda or cuda:N.", panel=panel, metavar="DEVICE", check=not_empty)


def schedule(panel: str) -> Any:
    """The option that says how a client's mask changes from round to round."""
    text = "Hide other neurons in every round, or always the same."
    return option("--schedule", text=text, panel=panel, show_default="the preset's, else fresh")


def number_format(**other: Any) -> Any:
    """The option that chooses a number format."""
    text = "Number format of the weights; none keeps them as they are."
    return option("--format", text=text, panel=QUANTIZATION, **other)


def block_size(**other: Any) -> Any:
    """The option that sets the size of a block."""
    text = "Weights that share one scale: a power of two, 32 to 4096."
    return option("--block-size", text=text, panel=QUANTIZATION, metavar="N", check=validate.block_size, **other)


def _ratio(value: float, _: str) -> float:

    return validate.ratio(value)


def _layers(value: str, _: str) -> str:
    from fedqsn_cli.planning.placement import parse_layers

    parse_layers(value)
    return value


def _p1_schedule(value: str, _: str) -> str:
    from fedqsn_cli.planning.placement import parse_schedule

    parse_schedule(value)
    return value


def _client(value: str, _: str) -> str:

    return validate.client(value)


def _size(value: str, where: str) -> str:
    validate.size_in_bytes(value, where)
    return value


REFERENCE = "a model folder, one .safetensors file, or hf://owner/name[@revision]"
Format = Literal["nf4", "fp4", "int8", "nf3", "nf2", "none"]

Out = Annotated[str, file("--out", text="Folder to write.", panel=OUTPUT, metavar="DIR")]
Force = Annotated[bool, option("--force", text="Replace what stands at --out, if fedqsn wrote it.", panel=OUTPUT)]
Json = Annotated[bool, option("--json", text="Print one JSON document.", panel=OUTPUT)]
Quiet = Annotated[bool, option("--quiet", "-q", text="Print the path only.", panel=OUTPUT)]
ShardSize = Annotated[
    str,
    option("--max-shard-size", text="Start another file beyond this size.", panel=OUTPUT, metavar="SIZE", check=_size),
]

P1 = Annotated[
    float | None,
    ratio("--p1", text="Share of all neurons to hide from everyone.", panel=MASKING, show_default="the key's"),
]
Axis = Annotated[
    Literal["neuron", "input", "element"] | None,
    option(
        "--axis",
        text="What to hide in linear layers: output neurons, input features, or single weights.",
        panel=MASKING,
        show_default="the key's, else neuron",
    ),
]
Where = Annotated[
    Literal["all", "outputs", "mlp", "attention"] | None,
    option(
        "--where",
        text="What to hide: all matrices; the outputs of attention and MLP, and the embeddings; or all of one kind.",
        panel=MASKING,
        show_default="the key's, else all",
    ),
]
Layers = Annotated[
    str | None,
    option(
        "--layers",
        text="Hide in these layers only, such as embeddings,0-3,5,head.",
        panel=MASKING,
        metavar="LIST",
        check=_layers,
        show_default="the key's, else all",
    ),
]
P1Schedule = Annotated[
    str | None,
    option(
        "--p1-schedule",
        text="Other ratios than --p1, by layer, such as 0-2=0.9,3-5=0.5,embeddings=0.2.",
        panel=MASKING,
        metavar="LIST",
        check=_p1_schedule,
        show_default="the key's, else none",
    ),
]
Preset = Annotated[
    Literal["paper", "strong"] | None,
    option(
        "--preset",
        text="paper: fill zero, where outputs, schedule fresh. strong: fill base, where all, p1 0.5, schedule sticky, "
        "train all. Options that are given win.",
        panel=MASKING,
    ),
]
Plan = Annotated[str | None, file("--plan", text="TOML rules for tensors that need other treatment.", panel=MASKING)]
Rescale = Annotated[
    bool | None,
    option(
        "--rescale/--no-rescale",
        text="Scale what stays visible, to make up for what does not.",
        panel=MASKING,
        show_default="--rescale with fill zero",
    ),
]
Fill = Annotated[
    Literal["zero", "base"] | None,
    option(
        "--fill",
        text="Put zeros where neurons are hidden, or the public base's own neurons.",
        panel=MASKING,
        show_default="the server model's, else zero",
    ),
]
PublicBaseRecord = Annotated[
    str | None,
    file(
        "--public-base",
        text="The public model for --fill base: folder or hf:// reference.",
        panel=MASKING,
        metavar="BASE",
    ),
]

DoubleQuant = Annotated[
    bool, option("--double-quant", text="Quantize the scales too (nf4 and fp4 in layout bnb).", panel=QUANTIZATION)
]
Layout = Annotated[
    Literal["bnb", "dense"] | None,
    option(
        "--layout",
        text="Packed as bitsandbytes stores it, or ordinary tensors with rounded values.",
        panel=QUANTIZATION,
        show_default="bnb if the format has it",
    ),
]

MaxLength = Annotated[int, count("--max-length", text="Cut texts to this many tokens.", panel=DATA)]
