"""The options that decide what a command prints; Python has none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedqsn_cli import validate
from fedqsn_cli.console import View
from fedqsn_cli.errors import InputError
from fedqsn_cli.options import Option, Options
from fedqsn_cli.options.groups import GATE, OUTPUT

POLICY_FILE = "policy.toml"


@dataclass(frozen=True, kw_only=True)
class ViewOptions(Options):
    """How a result is shown."""

    json: Annotated[bool, Option("Print one JSON document.", OUTPUT)] = False
    quiet: Annotated[bool, Option("Print the path only.", OUTPUT, short="-q")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json and self.quiet:
            raise InputError("cannot be given together", where="--json, --quiet", hint="choose one")

    @property
    def mode(self) -> View:
        """As the console takes it."""
        return "json" if self.json else "quiet" if self.quiet else "table"


@dataclass(frozen=True, kw_only=True)
class InspectView(ViewOptions):
    """How `inspect` shows what it found."""

    quiet: Annotated[bool, Option("Print the kind of artifact only.", OUTPUT, short="-q")] = False


@dataclass(frozen=True, kw_only=True)
class TrainView(ViewOptions):
    """What `client-train` shows."""

    dry_run: Annotated[
        bool, Option("Print what it would take (memory, steps, bytes, time), and write nothing.", OUTPUT)
    ] = False
    show_examples: Annotated[
        int | None,
        Option(
            "Print this many examples as tokens, and which of them count, and write nothing.",
            OUTPUT,
            metavar="N",
            check=validate.at_least_one,
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dry_run and self.show_examples is not None:
            raise InputError("cannot be given together", where="--dry-run, --show-examples", hint="choose one")


@dataclass(frozen=True, kw_only=True)
class EvaluateView(ViewOptions):
    """How `evaluate` shows what it measured."""

    quiet: Annotated[bool, Option("Print accuracy or perplexity only.", OUTPUT, short="-q")] = False


@dataclass(frozen=True, kw_only=True)
class AuditView(ViewOptions):
    """How `audit` reports."""

    FIRST = ("init_policy", "format", "output", "report")

    init_policy: Annotated[
        bool, Option(f"Write a commented policy to --policy (default {POLICY_FILE}), and stop.", GATE)
    ] = False
    format: Annotated[
        Literal["text", "json", "sarif", "junit", "github", "markdown"],
        Option("Format of what is printed; never changes the exit code.", OUTPUT),
    ] = "text"
    output: Annotated[str | None, Option("Write that to a file, and print text.", OUTPUT)] = None
    report: Annotated[str | None, Option("Write a page for the browser too: one HTML file.", OUTPUT)] = None
    json: Annotated[bool, Option("The same as --format json.", OUTPUT)] = False
    quiet: Annotated[bool, Option("Print the verdict only.", OUTPUT, short="-q")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json and self.format not in {"text", "json"}:
            raise InputError("cannot be given together", where=f"--json, --format {self.format}", hint="choose one")

    @property
    def format_name(self) -> str:
        """The format of the report."""
        return "json" if self.json else self.format
