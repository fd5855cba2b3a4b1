"""An audit in words, for people and for programs. What is printed never changes the exit code.

text      a report for the terminal              json      everything; what --baseline reads
markdown  the same for a step's summary          sarif     code scanning (SARIF 2.1.0)
github    annotations of a workflow              junit     test reports, one case a rule and scope
html      a page for people who decide (--report)
"""

from __future__ import annotations

from importlib import import_module

from fedqsn_cli.auditing.findings import Audit

FORMATS = ("text", "json", "sarif", "junit", "github", "markdown")


def render(audit: Audit, form: str) -> str:
    """The audit in one format, a whole document that ends with a line feed."""
    module = import_module(f"fedqsn_cli.auditing.formats.{form}_format")
    return str(module.render(audit))
