"""The whole audit as one JSON document; `--baseline` reads its measures again."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fedqsn_cli import strictjson
from fedqsn_cli.auditing.findings import Audit
from fedqsn_cli.auditing.limits.regression import measures
from fedqsn_cli.auditing.report.common import unchecked
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
        "inputs": dict(audit.inputs),
        "policy": plain(dict(audit.policy)),
        "findings": plain(audit.findings),
        "checked": [check._asdict() for check in audit.checked],
        "unchecked": [{"rule": one.rule, "scope": one.scope, "why": one.why} for one in unchecked(audit)],
        "measures": plain(measures(audit.recovery, audit.function, audit.exposure)),
        "recovery": [_recovery(one) for one in audit.recovery],
        "function": _function(audit),
        "exposure": plain(audit.exposure),
    }


def _recovery(recovery: object) -> object:
    made = plain(recovery)
    made["attack_table"] = [plain(one._asdict()) for one in recovery.attack_table]  # type: ignore[attr-defined]
    made["best"] = plain(recovery.best._asdict())  # type: ignore[attr-defined]
    return made


def _function(audit: Audit) -> object:
    if audit.function is None:
        return None
    made = plain(audit.function)
    made["scores"] = [plain(one._asdict()) for one in audit.function.scores]
    made["curve"] = [plain(one._asdict()) for one in audit.function.curve]
    return made


def render(audit: Audit) -> str:
    """Indented JSON in ASCII."""
    return json.dumps(document(audit), indent=2, allow_nan=False) + "\n"


def read_measures(path: str | Path) -> dict[str, float]:
    """The measures of an earlier audit.

    Raises:
        InputError: there is no such file. FormatError: it is not the JSON of an audit.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(
            "there is no baseline", where=path, hint="save one with 'fedqsn audit --format json'"
        ) from None
    found = strictjson.loads(data, path)
    held = found.get("measures") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(held, dict):
        raise FormatError(f"not an audit of format {FORMAT}", where=path, hint="save one with --format json")
    for name, value in held.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"measure {name!r} is not a number", where=path)
    return {name: float(value) for name, value in held.items()}
