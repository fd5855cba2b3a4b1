"""SARIF 2.1.0, for code scanning: one result a finding, rules with their help.

Source: OASIS SARIF 2.1.0, sections 3.14 (run), 3.19 (tool component), 3.27 (result), 3.35 (suppression). Sites that
take SARIF accept 25,000 results a run; beyond that the last ones are left out and a notification says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any
from urllib.parse import quote

from fedqsn_cli.auditing.findings import Audit, Finding
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.auditing.report.wording import meaning, ordered
from fedqsn_cli.auditing.rules import RULES
from fedqsn_cli.text import clean

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
MOST_RESULTS = 25_000
LEVELS = {"hard": "error", "gate": "error", "incomplete": "error", "info": "note"}
SECURITY = {"hard": "9.5", "gate": "7.0", "incomplete": "5.0", "info": "1.0"}  # as code-scanning sites rank findings


def document(audit: Audit, most: int = MOST_RESULTS) -> dict[str, Any]:
    """The log as plain values, with so many findings at most."""
    found = ordered(audit)
    rules = list(RULES)
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "fedqsn audit",
                "semanticVersion": audit.version or "0",
                "rules": [_rule(RULES[rule]) for rule in rules],
            }
        },
        "columnKind": "utf16CodeUnits",
        "automationDetails": {"id": "fedqsn-audit/"},
        "invocations": [
            {
                "executionSuccessful": audit.verdict != "incomplete",
                "exitCode": audit.exit_code,
                "exitCodeDescription": meaning(audit),
                "toolExecutionNotifications": _notifications(len(found), most),
            }
        ],
        "results": [_result(finding, rules.index(finding.rule)) for finding in found[:most]],
        "properties": {"verdict": audit.verdict, "headline": dict(headline(audit)), "inputs": dict(audit.inputs)},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def render(audit: Audit) -> str:
    """Indented JSON in ASCII."""
    return json.dumps(document(audit), indent=2, allow_nan=False) + "\n"


def _rule(rule: Rule) -> dict[str, Any]:
    help_text = f"{rule.why}\n\nHow to fix: {rule.fix}"
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.name.replace("-", " ")},
        "fullDescription": {"text": rule.what},
        "help": {"text": help_text, "markdown": f"{rule.why}\n\n**How to fix:** {rule.fix}"},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {"security-severity": SECURITY[rule.severity], "tags": ["security", "model-privacy"]},
    }


def _result(finding: Finding, index: int) -> dict[str, Any]:
    where = clean(finding.scope if finding.tensor is None else f"{finding.scope}/{finding.tensor}")
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": LEVELS[finding.severity],
        "kind": "informational" if finding.severity == "info" else "fail",
        "message": {"text": clean(f"{where}: {finding.message}")},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": _uri(finding.scope)}, "region": {"startLine": 1}},
                "logicalLocations": [{"fullyQualifiedName": where, "kind": "object"}],
            }
        ],
        "partialFingerprints": {"finding/v1": _fingerprint(finding)},
    }
    if finding.severity == "info":
        result["level"] = "none"
    given = {"value": finding.value, "limit": finding.limit}
    figures = {name: value for name, value in given.items() if value is not None and math.isfinite(value)}
    if figures:
        result["properties"] = figures
    return result


def _uri(scope: str) -> str:
    """A file to hang a finding on: code-scanning sites want one for each."""
    name = scope.removeprefix("proxy ").split(" ")[0]
    return f"{quote(name, safe='')}/proxy.json" if scope.startswith("proxy ") else "ledger.jsonl"


def _fingerprint(finding: Finding) -> str:
    """Equal for the same rule, scope and tensor, whatever was measured: so that a site follows it from run to run."""
    return hashlib.sha256("\0".join((finding.rule, finding.scope, finding.tensor or "")).encode()).hexdigest()


def _notifications(found: int, most: int) -> list[dict[str, Any]]:
    if found <= most:
        return []
    text = f"{found - most} of {found} findings are left out; --format json lists all"
    return [{"level": "warning", "message": {"text": text}}]
