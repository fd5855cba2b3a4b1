"""Options of a client who trains low-rank adapters (LoRA, arXiv 2106.09685) in place of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.declare import Option, Options

ADAPTERS = "Adapters (LoRA)"
ALL_LINEAR = "all-linear"

Method = Literal["full", "lora"]


def _share(value: float, flag: str) -> float:
    """A probability below 1."""
    return validate.ratio(value, flag)


def _names(value: Sequence[str], flag: str) -> tuple[str, ...]:
    """Names of modules, none of them empty."""
    names = (value,) if isinstance(value, str) else tuple(value)
    return tuple(validate.not_empty(name, flag) for name in names)


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """What is trained of a proxy: its visible weights, or adapters; names and defaults are those of peft.

    Raises:
        InputError: an option of adapters is given, but not the method.
    """

    method: Annotated[
        Method, Option("Train the visible weights, or low-rank adapters on the proxy as it is stored.", ADAPTERS)
    ] = "full"
    lora_r: Annotated[int | None, Option("Rank of the adapters.", ADAPTERS, shown="8", check=validate.at_least_one)] = (
        None
    )
    lora_alpha: Annotated[
        float | None,
        Option("Scale of the adapters, divided by the rank.", ADAPTERS, shown="8", check=validate.more_than_zero),
    ] = None
    lora_dropout: Annotated[
        float | None, Option("Dropout before the adapters.", ADAPTERS, metavar="RATIO", shown="0", check=_share)
    ] = None
    target_modules: Annotated[
        Sequence[str],
        Option(
            "A linear layer to adapt, or the end of its name; give it again for more.",
            ADAPTERS,
            metavar="NAME",
            shown=ALL_LINEAR,
            check=_names,
        ),
    ] = ()
    modules_to_save: Annotated[
        Sequence[str],
        Option(
            "A module to train in full beside the adapters, such as lm_head; give it again for more.",
            ADAPTERS,
            metavar="NAME",
            shown="a classifier's head",
            check=_names,
        ),
    ] = ()
    use_rslora: Annotated[bool, Option("Divide --lora-alpha by the square root of the rank.", ADAPTERS)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "lora":
            return
        for flag, value in (
            ("--lora-r", self.lora_r),
            ("--lora-alpha", self.lora_alpha),
            ("--lora-dropout", self.lora_dropout),
            ("--target-modules", self.target_modules or None),
            ("--modules-to-save", self.modules_to_save or None),
            ("--use-rslora", self.use_rslora or None),
        ):
            if value is not None:
                raise InputError("is for adapters", where=flag, hint="add --method lora")

    def check_format(self, update_format: str) -> None:
        """Refuse a number format that factors of adapters are not sent in. Raises InputError."""
        if self.method == "lora" and update_format in ("int8", "nf4"):
            what = f"adapters are not sent as {update_format}"
            raise InputError(what, where="--update-format", hint="use fp32, bf16 or fp16")

    @property
    def rank(self) -> int:
        """r: how many columns B has, and rows A."""
        return 8 if self.lora_r is None else self.lora_r

    @property
    def alpha(self) -> float:
        """α: an adapter adds α / r · B A, or α / √r · B A with `use_rslora`."""
        return 8 if self.lora_alpha is None else self.lora_alpha
