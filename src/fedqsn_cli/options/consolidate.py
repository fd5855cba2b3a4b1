"""The options of `consolidate`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.aggregation import Auto, positive_or_auto
from fedqsn_cli.options.declare import Option
from fedqsn_cli.options.groups import (
    DATA,
    JOB,
    KEY,
    OUT,
    OUTPUT,
    RESTORING,
    TRAINED_BASE,
    TRAINING,
    ModelOutputOptions,
    OptimizerName,
    RecipeOptions,
    batch_size_option,
    device_option,
    max_length_option,
    save_every_option,
)
from fedqsn_cli.options.lora import ADAPTERS, LoraOptions, Method

MEASURING = "Measuring"


def _two(value: int, flag: str) -> int:
    """A length that leaves something to predict."""
    if value < 2:
        raise InputError(f"{value} is too short", where=flag, hint="give 2 tokens or more")
    return value


@dataclass(frozen=True)
class ConsolidateOptions(LoraOptions, ModelOutputOptions):
    """`consolidate`."""

    FIRST = ("out", "key", "own_data", "transfer_data", "public_base", "blend", "transfer_weight", "steps")

    out: Annotated[str | Path, OUT]
    _: KW_ONLY
    key: Annotated[str | Path, Option("The job's secret.", JOB, env=KEY)]
    own_data: Annotated[
        str | Path | None,
        Option("Your own data, on which the global model is the teacher; it writes texts itself without any.", DATA),
    ] = None
    transfer_data: Annotated[
        str | Path | None,
        Option(
            "Texts on which the server model is the teacher, labels are not needed; it writes them itself without any.",
            DATA,
        ),
    ] = None
    written_examples: Annotated[
        int, Option("How many texts a language model writes itself.", DATA, check=validate.at_least_one)
    ] = 2000
    written_length: Annotated[
        int, Option("How many tokens each of them has, up to --max-length.", DATA, check=_two)
    ] = 64
    max_length: Annotated[int, max_length_option(DATA)] = 256
    public_base: Annotated[str | Path | None, TRAINED_BASE] = None
    blend: Annotated[
        float,
        Option("Start from the restore with this blend.", RESTORING, check=validate.up_to_one),
    ] = 0.9
    transfer_weight: Annotated[
        float | Auto,
        Option(
            "How much the server model counts, next to the global model; auto tries several.",
            TRAINING,
            metavar="X|auto",
            check=positive_or_auto,
        ),
    ] = 0.75
    steps: Annotated[int, Option("Optimizer steps.", TRAINING, check=validate.at_least_one)] = 1000
    lr: Annotated[
        float | Auto,
        Option(
            "Largest learning rate; auto tries up to four for a quarter of the steps, and takes the one that brings "
            "the model closest to both teachers on texts kept out of these trials.",
            TRAINING,
            metavar="X|auto",
            check=positive_or_auto,
        ),
    ] = "auto"
    warmup_ratio: Annotated[
        float, Option("Share of steps to warm up; then it falls to 0.", TRAINING, check=validate.up_to_one)
    ] = 0.1
    max_grad_norm: Annotated[float, Option("Clip gradients to this norm.", TRAINING, check=validate.more_than_zero)] = (
        1.0
    )
    batch_size: Annotated[int, batch_size_option(TRAINING)] = 32
    optimizer: Annotated[
        OptimizerName,
        Option("AdamW, AdamW with 8-bit moments (bitsandbytes), or SGD without momentum.", TRAINING),
    ] = "adamw"
    gradient_checkpointing: Annotated[
        bool, Option("Compute activations a second time instead of keeping them: less memory, more time.", TRAINING)
    ] = False
    seed: Annotated[
        int, Option("Decides order, dropout and the texts that models write.", TRAINING, check=validate.not_negative)
    ] = 0
    method: Annotated[Method, Option("Train all weights, or low-rank adapters on the student in 4 bits.", ADAPTERS)] = (
        "full"
    )
    save_every: Annotated[str | None, save_every_option()] = None
    device: Annotated[str, device_option(TRAINING)] = "auto"
    eval_data: Annotated[
        str | Path | None,
        Option(
            "Data to measure the global model, the restored one and the result on; for auto, examples of what clients "
            "teach.",
            MEASURING,
        ),
    ] = None
    own_eval_data: Annotated[str | Path | None, Option("For auto: examples of your own skill.", MEASURING)] = None
    own_tolerance: Annotated[
        float | None,
        Option(
            "For auto: how much more loss than the global model's is accepted on them, in nats.",
            MEASURING,
            metavar="X",
            shown="0.05",
            check=validate.not_negative,
        ),
    ] = None
    report: Annotated[str | Path | None, Option("Write a page about what auto tried: one HTML file.", OUTPUT)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, needed in (("--eval-data", self.eval_data), ("--own-eval-data", self.own_eval_data)):
            if self.transfer_weight == "auto" and needed is None:
                hint = "give a file of your own"
                raise InputError("--transfer-weight auto needs development data", where=flag, hint=hint)
        for flag, given in (
            ("--own-eval-data", self.own_eval_data),
            ("--own-tolerance", self.own_tolerance),
            ("--report", self.report),
        ):
            if self.transfer_weight != "auto" and given is not None:
                hint = "give it with --transfer-weight auto"
                raise InputError("there is nothing to search for", where=flag, hint=hint)

    @property
    def tolerance(self) -> float:
        """How much loss of the owner's skill is accepted, in nats."""
        return 0.05 if self.own_tolerance is None else self.own_tolerance

    def recipe(self, lr: float, steps: int) -> RecipeOptions:
        """How a student is trained with a learning rate for some steps: in fp32, without weight decay."""
        return RecipeOptions(
            epochs=float(steps),
            max_steps=steps,
            lr=lr,
            warmup_ratio=self.warmup_ratio,
            weight_decay=0.0,
            max_grad_norm=self.max_grad_norm,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            precision="fp32",
            optimizer=self.optimizer,
            gradient_checkpointing=self.gradient_checkpointing,
        )
