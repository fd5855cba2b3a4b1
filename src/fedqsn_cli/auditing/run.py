"""`audit`: open, check, attack, count what was seen, and hold it all against the policy."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.auditing.attest import write_attestation
from fedqsn_cli.auditing.checks import run_checks
from fedqsn_cli.auditing.completeness import DOES_NOT_BELONG, Collector
from fedqsn_cli.auditing.findings import Audit, FunctionRecovery
from fedqsn_cli.auditing.gate import evaluate_policy
from fedqsn_cli.auditing.inputs import EVAL_DATA, NO_OPTIONS, Inputs, open_inputs
from fedqsn_cli.auditing.limits.function import FUNCTION_RECOVERY
from fedqsn_cli.auditing.limits.measured import Measured
from fedqsn_cli.auditing.outbox import proxies_of_round
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.policy_file import load, summary, without_file
from fedqsn_cli.auditing.report.json import read_measures
from fedqsn_cli.auditing.rules import CHECKS
from fedqsn_cli.auditing.targets import check_targets
from fedqsn_cli.auditing.truth_pass import recover_weights
from fedqsn_cli.crypto.keys import SigningKey, load_signing_key
from fedqsn_cli.errors import InputError
from fedqsn_cli.exposure.expected import ExpectedExposure
from fedqsn_cli.exposure.exposure import SIZES, exposure
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
        InputError: no input at all, the policy or the baseline cannot be used, or a file cannot be written.

    Example:
        >>> audit(["proxies/alice"], truth="global/", key="job.key", ledger="ledger.jsonl").verdict
    """
    proxies = [proxies] if isinstance(proxies, (str, Path)) else list(proxies or ())
    collector = Collector()
    check_targets(attest=options.attest, attack_state=options.attack_state)
    if options.outbox is not None or options.round is not None:
        proxies = proxies_of_round(proxies, options, collector)
    policy = _policy(proxies, options)
    baseline = read_measures(options.baseline) if options.baseline is not None else None
    signer = _signer(proxies, options)
    inputs = open_inputs(proxies, collector, options, progress)
    with threadpool_limits(1, "blas"):  # several threads compute; those that BLAS adds would wait for each other
        if proxies or options.after is not None:
            run_checks(CHECKS, inputs, collector)
        recovered = recover_weights(inputs, collector) if proxies else ()
    measured = Measured(
        recovered,
        _function(inputs, collector, policy) if proxies else None,
        _exposure(inputs, collector, policy),
        _expected(inputs, policy),
        _own(inputs),
        baseline,
    )
    today = datetime.datetime.now(datetime.UTC).date()
    findings, checks = evaluate_policy(policy, measured, collector, today=today)
    result = Audit(
        findings,
        checks,
        measured.recovery,
        measured.function,
        measured.exposure,
        summary(policy),
        _digests(inputs),
        VERSION,
    )
    if signer is not None:
        write_attestation(Path(str(options.attest)), result, inputs, signer)
    return result


def _policy(proxies: Sequence[str | Path], options: AuditOptions) -> Policy:
    if not proxies and (options.ledger is None or options.key is None):
        hint = "give proxies to audit, or --ledger and --key for exposure alone"
        raise InputError("there is nothing to audit", where="PROXY", hint=hint)
    if options.policy is not None:
        return load(options.policy)
    return without_file(proxies=bool(proxies), ledger=options.ledger is not None)


def _signer(proxies: Sequence[str | Path], options: AuditOptions) -> SigningKey | None:
    """The key that signs the attestation, if there is to be one. Raises InputError."""
    if options.attest is None or options.sign is None:
        return None
    if not proxies:
        raise InputError("there is no proxy to attest", where="--attest", hint="name the proxies")
    return load_signing_key(options.sign)


def _function(inputs: Inputs, collector: Collector, policy: Policy) -> FunctionRecovery | None:
    eval_data, public_data = inputs.options.eval_data, inputs.options.public_data
    if eval_data is None:
        collector.add([FUNCTION_RECOVERY.lacks("function", EVAL_DATA)])
        return None
    from fedqsn_cli.auditing.recovery.function import FunctionOptions, recover_function  # needs torch

    sizes, minutes, state = policy.threat.public_examples, inputs.options.attack_minutes, inputs.options.attack_state
    options = FunctionOptions(public_data=public_data, public_examples=sizes, minutes=minutes, state=state)
    return recover_function(inputs, collector, eval_data, options)


def _exposure(inputs: Inputs, collector: Collector, policy: Policy) -> Exposure | None:
    """From ledger and key; releases of other jobs count for nothing here, and must not be of the same model."""
    job, releases = inputs.job, inputs.releases
    if job is None or releases is None:
        return None
    own = _own(inputs)
    models = {release.model_digest for release in own}
    foreign = [release for release in releases if release.job != job.commitment]
    if any(release.model_digest in models for release in foreign):
        message = "the same model was also released under another key; what those proxies show cannot be counted"
        collector.add([DOES_NOT_BELONG.finding("ledger", message)])
    if foreign and not own:
        collector.add([DOES_NOT_BELONG.finding("ledger", "the ledger lists no release of this key's job")])
    return exposure(job, own, sizes={*SIZES, policy.threat.colluders})


def _own(inputs: Inputs) -> list[Release]:
    """The releases of the key's job."""
    return [line for line in inputs.releases or () if inputs.job is not None and line.job == inputs.job.commitment]


def _expected(inputs: Inputs, policy: Policy) -> float | None:
    job, rounds = inputs.job, policy.threat.rounds
    if job is None or rounds is None:
        return None
    ratios = [release.p2 for release in _own(inputs) if release.schedule == "fresh"]
    return ExpectedExposure.of(job, min(ratios)).share(rounds) if ratios else None


def _digests(inputs: Inputs) -> dict[str, str]:
    """What was audited, by content; never by path."""
    options = inputs.options
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
        entries = sorted((name, tensor.dtype, tensor.shape) for name, tensor in inputs.truth.tensors.items())
        digests["truth (names and shapes)"] = hashlib.sha256(repr(entries).encode()).hexdigest()
    return digests
