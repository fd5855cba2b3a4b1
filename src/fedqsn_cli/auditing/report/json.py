"""The whole audit as one JSON document; `--baseline` reads its measures again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from fedqsn_cli import strictjson
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.limits.regression import measures
from fedqsn_cli.auditing.report.headline import headline
from fedqsn_cli.auditing.report.wording import meaning, unchecked
from fedqsn_cli.checkpoint.files import read_file
from fedqsn_cli.checkpoint.reader import MAX_JSON_BYTES
from fedqsn_cli.errors import FormatError, InputError
from fedqsn_cli.text import plain

FORMAT = "fedqsn-audit/1"


def document(audit: Audit) -> dict[str, object]:
    """What is printed, as plain values; NaN and infinities are null."""
    return {
        "format": FORMAT,
        "version": audit.version,
        "verdict": audit.verdict,
        "exit_code": audit.exit_code,
        "meaning": meaning(audit),
        "headline": dict(headline(audit)),
        "inputs": dict(audit.inputs),
        "policy": plain(dict(audit.policy)),
        "findings": plain(audit.findings),
        "checked": plain(audit.checked),
        "unchecked": [{"rule": check.rule, "scope": check.scope, "why": check.why} for check in unchecked(audit)],
        "measures": plain(measures(audit.recovery, audit.function, audit.exposure)),
        "recovery": plain(audit.recovery),
        "function": plain(audit.function),
        "exposure": plain(audit.exposure),
    }


def render(audit: Audit) -> str:
    """Indented JSON in ASCII."""
    return json.dumps(document(audit), indent=2, allow_nan=False) + "\n"


def read_measures(path: str | Path) -> dict[str, float]:
    """The measures of an earlier audit.

    Raises:
        InputError: there is no such file. FormatError: it is not the JSON of an audit.
    """
    if not os.path.lexists(path):
        raise InputError("no such baseline", where=path, hint="save one with 'fedqsn audit --format json'")
    document = strictjson.loads(read_file(Path(path), MAX_JSON_BYTES), path)
    measured = document.get("measures") if isinstance(document, dict) and document.get("format") == FORMAT else None
    if not isinstance(measured, dict):
        raise FormatError(f"not an audit of format {FORMAT}", where=path, hint="save one with --format json")
    for name, value in measured.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"measure {name!r} is not a number", where=path)
    return {name: float(value) for name, value in measured.items()}
