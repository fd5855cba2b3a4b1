"""An audit in words, for people and for programs. What is printed never changes the exit code.

wording.py      names and values that several formats share
headline.py     what an attacker can do, or that nothing is known about it
sections.py     the report as a list of sections
text.py         the sections for the terminal
markdown.py     the sections for a step's summary
json.py         everything; what --baseline reads
sarif.py        code scanning (SARIF 2.1.0)
junit.py        test reports, one case a rule and scope
github.py       annotations of a workflow
html.py         a page for people who decide (--report; report.html.j2)
html_plots.py   its plots
"""

from __future__ import annotations

from importlib import import_module

from fedqsn_cli.auditing.findings import Audit

FORMATS = ("text", "json", "sarif", "junit", "github", "markdown")
"""What `--format` may be, a module each. A test holds the choices of the command against it."""


def render(audit: Audit, format_name: str) -> str:
    """The audit in one format, a whole document that ends with a line feed."""
    module = import_module(f"fedqsn_cli.auditing.report.{format_name}")
    return str(module.render(audit))
