"""`fedqsn audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedqsn_cli import console
from fedqsn_cli.cli import options
from fedqsn_cli.errors import InputError, OutputExists

if TYPE_CHECKING:
    from fedqsn_cli.auditing.findings import Audit

TRUTH, DATA, GATE, OUTPUT = "What only the owner has", options.DATA, "Gate", options.OUTPUT

POLICY_FILE = "policy.toml"


def audit(
    proxies: Annotated[list[str] | None, options.argument("PROXY...", text="Proxies of one round: folders.")] = None,
    truth: Annotated[
        str | None,
        options.file("--truth", text="The global model that they were exported from.", panel=TRUTH, metavar="GLOBAL"),
    ] = None,
    key: Annotated[str | None, options.file("--key", text="The job's secret.", panel=TRUTH)] = None,
    ledger: Annotated[str | None, options.file("--ledger", text="Record of all releases.", panel=TRUTH)] = None,
    after: Annotated[
        str | None,
        options.file("--after", text="The global model after the merge.", panel=TRUTH, metavar="NEXT"),
    ] = None,
    server: Annotated[
        str | None,
        options.file(
            "--server",
            text="The server model they were exported from, if clients train its holes (--train all).",
            panel=TRUTH,
            metavar="SERVER",
        ),
    ] = None,
    base: Annotated[
        str | None,
        options.file(
            "--base",
            text="The public model that the owner's was fine-tuned from: attackers have it.",
            panel=DATA,
            metavar="PUBLIC",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        options.file("--eval-data", text="Examples to measure the recovered function on.", panel=DATA),
    ] = None,
    public_data: Annotated[
        str | None,
        options.file("--public-data", text="Examples that an attacker fine-tunes the proxy with.", panel=DATA),
    ] = None,
    policy: Annotated[
        str | None,
        options.file("--policy", text="Limits, in TOML: what may leak, and what must be checked.", panel=GATE),
    ] = None,
    baseline: Annotated[
        str | None,
        options.file("--baseline", text="An earlier audit (JSON): nothing may be worse than then.", panel=GATE),
    ] = None,
    init_policy: Annotated[
        bool,
        options.option(
            "--init-policy", text=f"Write a commented policy to --policy (default {POLICY_FILE}), and stop.", panel=GATE
        ),
    ] = False,
    form: Annotated[
        Literal["text", "json", "sarif", "junit", "github", "markdown"],
        options.option("--format", text="Format of what is printed; never changes the exit code.", panel=OUTPUT),
    ] = "text",
    output: Annotated[
        str | None,
        options.file("--output", text="Write that to a file, and print text.", panel=OUTPUT),
    ] = None,
    report: Annotated[
        str | None,
        options.file("--report", text="Write a page for the browser too: one HTML file.", panel=OUTPUT),
    ] = None,
    as_json: Annotated[bool, options.option("--json", text="The same as --format json.", panel=OUTPUT)] = False,
    quiet: Annotated[bool, options.option("--quiet", "-q", text="Print the verdict only.", panel=OUTPUT)] = False,
) -> None:
    """Tell how much of the model really leaks, and stop what leaks too much.

    Checks that hidden weights are nowhere in the proxies; counts what clients and coalitions have seen; attacks the
    proxies, and reports the best attack as a lower bound on the leakage. Without proxies, --ledger and --key are enough
    to count what was seen.

    Exit codes: 0 passed; 1 over a limit of the policy; 3 not complete, because an input is missing or cannot be read;
    4 a hard invariant is broken, do not send the proxy. No output holds a weight, a hidden position or the key.

    Examples:

      fedqsn audit proxies/* --truth global/ --key job.key --ledger ledger.jsonl
      fedqsn audit proxy/ --truth global/ --key job.key --ledger ledger.jsonl --base hf://owner/base \\
          --policy policy.toml --report report.html --format sarif --output audit.sarif
      fedqsn audit --ledger ledger.jsonl --key job.key --json
      fedqsn audit --init-policy
    """
    how = console.view(as_json, quiet)
    if as_json and form not in {"text", "json"}:
        raise InputError("cannot be given together", where=f"--json, --format {form}", hint="choose one")
    if init_policy:
        _write_policy(policy or POLICY_FILE, quiet)
        return
    from fedqsn_cli import audit as run

    with console.progress(how) as progress:
        result = run(
            proxies or [],
            truth=truth,
            after=after,
            server=server,
            key=key,
            ledger=ledger,
            public_base=base,
            policy=policy,
            eval_data=eval_data,
            public_data=public_data,
            baseline=baseline,
            progress=progress,
        )
    _print(result, "json" if as_json else form, output, report, quiet)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _print(result: Audit, form: str, output: str | None, report: str | None, quiet: bool) -> None:
    """Files first: whatever happens to the terminal, they are there."""
    from fedqsn_cli.auditing.report import render
    from fedqsn_cli.auditing.report.text import parts
    from fedqsn_cli.checkpoint import write_file_atomically

    if report is not None:
        write_file_atomically(Path(report), render(result, "html").encode())
    if output is not None:
        write_file_atomically(Path(output), render(result, form).encode())
    if quiet:
        console.show("quiet", None, essential=[result.verdict], parts=[])
    elif form == "text" or output is not None:
        console.show("table", None, essential=[], parts=parts(result))
    else:
        console.text(render(result, form).rstrip("\n"))


def _write_policy(path: str, quiet: bool) -> None:
    from fedqsn_cli.auditing.policy import template
    from fedqsn_cli.checkpoint import write_file_atomically

    if Path(path).exists():
        raise OutputExists("a file is already there", where=path, hint="choose another name with --policy")
    write_file_atomically(Path(path), template().encode())
    console.show("quiet" if quiet else "table", None, essential=[path], parts=[console.Facts([("policy", path)])])
