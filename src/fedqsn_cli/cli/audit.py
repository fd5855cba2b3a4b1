"""`fedqsn audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedqsn_cli import console
from fedqsn_cli.cli.command import argument
from fedqsn_cli.errors import OutputExists

if TYPE_CHECKING:
    from fedqsn_cli.auditing.findings import Audit
    from fedqsn_cli.cli.views import AuditView
    from fedqsn_cli.options import AuditOptions


def audit(
    options: AuditOptions,
    view: AuditView,
    proxies: Annotated[list[str] | None, argument("PROXY...", "Proxies of one round: folders.")] = None,
) -> None:
    """Measure how much of the model leaks, and stop what leaks too much.

    Checks that hidden weights are nowhere in the proxies; counts what clients and coalitions have seen; attacks the
    proxies, and reports the best attack as a lower bound on the leakage. Without proxies, --ledger and --key are enough
    to count what was seen.

    Exit codes: 0 passed; 1 over a limit of the policy; 3 not complete, because an input is missing or cannot be read;
    4 a hard invariant is broken, do not send the proxy. No output holds a weight, a hidden position or the key.

    Examples:

      fedqsn audit proxies/* --truth global/ --key job.key --ledger ledger.jsonl
      fedqsn audit proxy/ --truth global/ --key job.key --ledger ledger.jsonl --public-base hf://owner/base \\
          --policy policy.toml --report report.html --format sarif --output audit.sarif
      fedqsn audit --outbox outbox/ --round 3 --truth global/ --key job.key --ledger ledger.jsonl
      fedqsn audit --ledger ledger.jsonl --key job.key --json
      fedqsn audit --init-policy
    """
    if view.init_policy:
        _write_policy(options.policy, view)
        return
    from fedqsn_cli.auditing.run import audit as run
    from fedqsn_cli.auditing.targets import check_targets

    check_targets(report=view.report, output=view.output)
    with console.progress(view.mode) as progress:
        result = run(proxies, options, progress=progress)
    _print(result, view)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _print(result: Audit, view: AuditView) -> None:
    """Files first: whatever happens to the terminal, they are complete."""
    from fedqsn_cli.auditing.report import render
    from fedqsn_cli.auditing.report.text import parts
    from fedqsn_cli.checkpoint import write_file_atomically

    if view.report is not None:
        write_file_atomically(Path(view.report), render(result, "html").encode())
    if view.output is not None:
        write_file_atomically(Path(view.output), render(result, view.format_name).encode())
    if view.quiet:
        console.show("quiet", None, essential=[result.verdict], parts=[])
    elif view.format_name == "text" or view.output is not None:
        console.show("table", None, essential=[], parts=parts(result))
    else:
        console.text(render(result, view.format_name).rstrip("\n"))


def _write_policy(path: str | Path | None, view: AuditView) -> None:
    from fedqsn_cli.auditing.policy_file import template
    from fedqsn_cli.checkpoint import write_file_atomically
    from fedqsn_cli.cli.views import POLICY_FILE

    path = path or POLICY_FILE
    if Path(path).exists():
        raise OutputExists("a file is already there", where=path, hint="choose another name with --policy")
    write_file_atomically(Path(path), template().encode())
    mode: console.View = "quiet" if view.quiet else "json" if view.format_name == "json" else "table"
    console.show(mode, {"policy": str(path)}, essential=[path], parts=[console.Facts([("policy", path)])])
