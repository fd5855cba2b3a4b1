"""`audit`: open, check, attack, count what was seen, and hold it all against the policy."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing import gate
from fedqsn_cli.auditing.findings import Audit, FunctionRecovery, Recovery
from fedqsn_cli.auditing.inputs import NO_OPTIONS, Inputs, Report, open_inputs
from fedqsn_cli.auditing.invariants.check import check_invariants
from fedqsn_cli.auditing.policy import Policy, load, without_file
from fedqsn_cli.auditing.report.json import read_measures
from fedqsn_cli.auditing.rules import finding
from fedqsn_cli.errors import InputError
from fedqsn_cli.exposure.exposure import SIZES, expected, exposure
from fedqsn_cli.exposure.results import Exposure
from fedqsn_cli.options import AuditOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.version import VERSION


def audit(
    proxies: str | Path | Sequence[str | Path] | None = None,
    options: AuditOptions = NO_OPTIONS,
    *,
    progress: Progress = SILENT,
) -> Audit:
    """Measure what proxies and a ledger reveal of the owner's model, and hold it against a policy.

    Args:
        proxies: folders of proxies, of one round when there is a truth. None: exposure only, from ledger and key.
        options: see `AuditOptions`. With `server`, `truth` is the global model of the job's begin. Without a policy
            nothing is limited, but invariants and recovery must have been checked.
        progress: told of tensors and steps.

    Returns:
        The audit. Its exit code is 0 passed, 1 over a limit, 3 not complete, 4 a hard invariant is broken; what cannot
        be read or is missing is never a pass.

    Raises:
        InputError: no input at all, or the policy or the baseline cannot be used.

    Example:
        >>> audit(["proxies/alice"], truth="global/", key="job.key", ledger="ledger.jsonl").verdict
    """
    proxies = [proxies] if isinstance(proxies, (str, Path)) else list(proxies or ())
    rules = _policy(proxies, options)
    before = read_measures(options.baseline) if options.baseline is not None else None
    report = Report()
    inputs = open_inputs(proxies, report, options)
    if proxies or options.after is not None:
        check_invariants(inputs, report, progress)
    measured = gate.Measured(
        recovery=_recovery(inputs, report, progress) if proxies else (),
        function=_function(inputs, report, rules, options, progress) if proxies else None,
        exposure=_exposure(inputs, report, rules),
        expected=_expected(inputs, rules),
    )
    today = datetime.datetime.now(datetime.UTC).date()
    findings, checked = gate.apply(rules, measured, report.findings, report.checked, baseline=before, today=today)
    return Audit(
        findings,
        checked,
        measured.recovery,
        measured.function,
        measured.exposure,
        rules.summary(),
        _digests(inputs, options),
        VERSION,
    )


def _policy(proxies: Sequence[str | Path], options: AuditOptions) -> Policy:
    if not proxies and (options.ledger is None or options.key is None):
        hint = "give proxies to audit, or --ledger and --key for exposure alone"
        raise InputError("there is nothing to audit", where="PROXY", hint=hint)
    if options.policy is not None:
        return load(options.policy)
    return without_file(proxies=bool(proxies), ledger=options.ledger is not None)


def _recovery(inputs: Inputs, report: Report, progress: Progress) -> tuple[Recovery, ...]:
    from fedqsn_cli.auditing.recovery.weights import recover_weights

    return recover_weights(inputs, report, progress)


def _function(
    inputs: Inputs, report: Report, rules: Policy, options: AuditOptions, progress: Progress
) -> FunctionRecovery | None:
    if options.eval_data is None:
        report.skip("FQ301", "function", "needs --eval-data")
        return None
    from fedqsn_cli.auditing.recovery.function import recover_function

    return recover_function(inputs, report, options.eval_data, options.public_data, rules.public_examples, progress)


def _exposure(inputs: Inputs, report: Report, rules: Policy) -> Exposure | None:
    """From ledger and key; releases of other jobs count for nothing here, and must not be of the same model."""
    if inputs.job is None or inputs.releases is None:
        return None
    job = inputs.job.commitment
    mine = [release for release in inputs.releases if release.job == job]
    models = {release.model_digest for release in mine}
    foreign = [release for release in inputs.releases if release.job != job]
    if any(release.model_digest in models for release in foreign):
        message = "the same model was also released under another key; what those proxies show cannot be counted"
        report.findings.append(finding("FQ904", "ledger", message))
    if foreign and not mine:
        report.findings.append(finding("FQ904", "ledger", "the ledger lists no release of this key's job"))
    return exposure(inputs.job, mine, sizes={*SIZES, rules.colluders})


def _expected(inputs: Inputs, rules: Policy) -> float | None:
    if inputs.job is None or not inputs.releases or rules.rounds is None:
        return None
    fresh = [one for one in inputs.releases if one.job == inputs.job.commitment and one.schedule == "fresh"]
    return expected(inputs.job, min(one.p2 for one in fresh), rules.rounds) if fresh else None


def _digests(inputs: Inputs, options: AuditOptions) -> dict[str, str]:
    """What was audited, by content; never by path."""
    digests = {proxy.scope: proxy.sha256 for proxy in inputs.proxies}
    if inputs.job is not None:
        digests["job"] = inputs.job.commitment
    if options.ledger is not None and inputs.releases is not None:
        digests["ledger"] = file_digest(Path(options.ledger))
    files = {"eval data": options.eval_data, "public data": options.public_data, "baseline": options.baseline}
    for name, file in files.items():
        if file is not None and Path(file).is_file():
            digests[name] = file_digest(Path(file))
    if inputs.truth is not None:
        entries = sorted((name, one.dtype, one.shape) for name, one in inputs.truth.tensors.items())
        digests["truth (names and shapes)"] = hashlib.sha256(repr(entries).encode()).hexdigest()
    return digests
