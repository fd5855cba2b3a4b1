"""The options of `merge`, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.options.aggregation import (
    AdmissionOptions,
    Auto,
    CentralPrivacyOptions,
    ServerOptimizerOptions,
    number_or_auto,
    positive_or_auto,
)
from fedqsn_cli.options.declare import Option
from fedqsn_cli.options.groups import (
    JOB,
    KEY,
    LEDGER,
    MERGING,
    OUTPUT,
    RESTORING,
    SEARCHING,
    SIGNATURES,
    TRAINED_BASE,
    USUAL_SHARD_SIZE,
    ModelOutputOptions,
    batch_size_option,
    device_option,
    max_length_option,
)


def _share(value: float, flag: str) -> float:
    """A number above 0, up to 1."""
    return validate.up_to_one(validate.more_than_zero(value, flag), flag)


def _blend_or_auto(value: float | str, flag: str) -> float | Auto:
    number = number_or_auto(value, flag)
    return "auto" if number == "auto" else validate.up_to_one(number, flag)


@dataclass(frozen=True, kw_only=True)
class MergeOptions(AdmissionOptions, ServerOptimizerOptions, CentralPrivacyOptions, ModelOutputOptions):
    """`merge`: of updates, or, with `restore`, of a trained server model and the global one."""

    key: Annotated[str | Path, Option("The job's secret.", JOB, env=KEY)]
    ledger: Annotated[
        str | Path | None, Option("Record of all releases; needed to merge updates.", JOB, env=LEDGER)
    ] = None
    server_lr: Annotated[
        float | Auto,
        Option(
            "Step size: 1 takes the average as it is; auto looks for the best.",
            MERGING,
            metavar="X|auto",
            check=positive_or_auto,
        ),
    ] = 1.0
    allow_worse: Annotated[bool, Option("With auto: take the best step even if the model gets worse.", MERGING)] = False
    control: Annotated[
        str | Path | None,
        Option(
            "An update of your own, trained on your own data; what it did is taken off the clients' updates.",
            MERGING,
            metavar="UPDATE",
        ),
    ] = None
    control_weight: Annotated[float, Option("How much of the control is taken off.", MERGING, check=_share)] = 1.0
    partial: Annotated[
        bool, Option("Write the exact sum of these updates, to be merged on, in place of a model.", MERGING)
    ] = False
    restore: Annotated[
        str | Path | None,
        Option(
            "Put this trained server model's visible neurons into CHECKPOINT.",
            RESTORING,
            metavar="SERVER",
        ),
    ] = None
    public_base: Annotated[str | Path | None, TRAINED_BASE] = None
    blend: Annotated[
        float | Auto,
        Option(
            "How far hidden neurons come back: 1 in full, 0 not at all; auto looks for the best.",
            RESTORING,
            metavar="X|auto",
            check=_blend_or_auto,
        ),
    ] = 1.0
    eval_data: Annotated[
        str | Path | None, Option("Your development data, for auto: JSONL, CSV or Parquet.", SEARCHING)
    ] = None
    max_length: Annotated[int, max_length_option(SEARCHING)] = 256
    batch_size: Annotated[int, batch_size_option(SEARCHING)] = 32
    device: Annotated[str, device_option(SEARCHING)] = "auto"
    keep_adapter: Annotated[
        str | Path | None,
        Option(
            "Write the merged step as one adapter (peft) for CHECKPOINT, too; needs updates of adapters only.",
            OUTPUT,
            metavar="DIR",
        ),
    ] = None
    adapter_rank: Annotated[
        int | None,
        Option(
            "Cut that adapter to this rank, by singular values.",
            OUTPUT,
            shown="the sum of the clients' ranks",
            check=validate.at_least_one,
        ),
    ] = None
    report: Annotated[
        str | Path | None, Option("Write a page about the updates and what auto tried: one HTML file.", OUTPUT)
    ] = None

    verify_key: Annotated[
        str | Path | None,
        Option(
            "Refuse an update that its client did not sign; {client} in it stands for the client's name.",
            SIGNATURES,
            metavar="PUBLIC",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify_key is not None:
            validate.for_each_client(str(self.verify_key), "--verify-key", several=False)
        if self.restore is not None:
            self._check_restore()
        else:
            self._check_merge()
        if self.partial:
            self._check_partial()
        self._check_search()
        self._check_adapter()

    @property
    def searches(self) -> bool:
        """Whether there is a number to look for."""
        return "auto" in {self.server_lr, self.blend}

    def required_ledger(self) -> Path:
        """The ledger of the updates. Raises InputError: it was not given."""
        if self.ledger is None:
            hint = f"give --ledger, or set {LEDGER}"
            raise InputError("merging updates needs the ledger of their releases", where="--ledger", hint=hint)
        return Path(self.ledger)

    def verify_key_of(self, client: str) -> Path | None:
        """The public key of a client; None where updates need no signature."""
        return None if self.verify_key is None else Path(str(self.verify_key).replace(validate.CLIENT, client))

    def _check_partial(self) -> None:
        """Refuse what is only decided when all updates are there. Raises InputError."""
        last, themselves = "give it in the merge of the partial sums", "merge the updates themselves"
        validate.none_given(
            (
                "--partial",
                self.rule != "fedavg",
                f"{self.rule} needs all updates at once",
                "merge the updates themselves",
            ),
            ("--restore", self.restore is not None, "a restore takes no updates", "leave out --partial"),
            ("--clip-norm", self.clip_norm == "auto", "the median of all norms is not known yet", "give a number"),
            ("--noise-multiplier", self.noise_multiplier is not None, "noise needs all updates at once", "merge them"),
            ("--normalize", self.normalize != "coverage", "a sum is not divided yet", last),
            ("--staleness-discount", self.staleness_discount is not None, "a sum is of one round", last),
            ("--server-lr", self.server_lr != 1.0, "a sum takes no step", last),
            ("--server-optimizer", self.server_optimizer != "sgd", "a sum takes no step", last),
            ("--control", self.control is not None, "nothing is taken off a sum", last),
            ("--keep-adapter", self.keep_adapter is not None, "a sum takes no step", themselves),
            ("--report", self.report is not None, "a sum has no page", last),
            ("--max-shard-size", self.max_shard_size != USUAL_SHARD_SIZE, "a sum is one file", "leave it out"),
        )

    def _check_restore(self) -> None:
        updates, step = "a restore takes no updates", "a restore takes no step"
        validate.none_given(("--verify-key", self.verify_key is not None, updates, "give it when you merge them"))
        self.check_no_rule()
        validate.none_given(
            ("--server-optimizer", self.server_optimizer != "sgd", step, "leave it out"),
            ("--noise-multiplier", self.noise_multiplier is not None, updates, "leave it out"),
            ("--server-lr", self.server_lr == "auto", step, "did you mean --blend auto?"),
            ("--control", self.control is not None, f"{updates}, nor a control", "merge them first"),
        )

    def _check_merge(self) -> None:
        self.required_ledger()
        self.check_rule()
        self.check_privacy()
        if self.noise_multiplier is not None and self.on_refused == "skip":
            what = "with noise, how many updates count must not depend on what is in them"
            raise InputError(what, where="--on-refused", hint="leave it out, and name the updates to merge")
        self.check_optimizer(self.server_lr)
        restore, weighs = "use it with --restore", self.control is None and self.control_weight != 1.0
        validate.none_given(
            ("--blend", self.blend != 1.0, "only a restore blends", restore),
            ("--public-base", self.public_base is not None, "only a restore takes a public base", restore),
            ("--control-weight", weighs, "there is no control update", "give it with --control"),
        )

    def _check_adapter(self) -> None:
        flag = "--keep-adapter"
        if self.keep_adapter is None:
            validate.none_given(
                ("--adapter-rank", self.adapter_rank is not None, "no adapter is written", f"give it with {flag}")
            )
            return
        weighs, late = self.rule == "fedavg" and self.clip_norm is None, self.staleness_discount is not None
        other, optimizer = "leave out --rule and --clip-norm", self.server_optimizer
        validate.none_given(
            (flag, self.restore is not None, "a restore is not a step", "use it when updates are merged"),
            (flag, not weighs, "only a weighted average is an adapter", other),
            (flag, late, "an adapter is made of the updates of one round", "leave out --staleness-discount"),
            (flag, optimizer != "sgd", f"a step of {optimizer} is not an adapter", "leave out --server-optimizer"),
            (flag, self.control is not None, "a control cannot be part of an adapter", "leave out --control"),
        )

    def _check_search(self) -> None:
        option = "--blend auto" if self.restore is not None else "--server-lr auto"
        if self.searches and self.eval_data is None:
            raise InputError(f"{option} needs development data", where="--eval-data", hint="give a file of your own")
        report = self.report if self.restore is not None else None
        for flag, given in (("--eval-data", self.eval_data), ("--report", report)):
            if given is not None and not self.searches:
                raise InputError("there is nothing to search for", where=flag, hint=f"give it with {option}")
        if self.allow_worse and self.server_lr != "auto":
            raise InputError("a given step is taken anyway", where="--allow-worse", hint="use it with --server-lr auto")
