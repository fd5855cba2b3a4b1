"""FQ205: no measure is worse than in an earlier audit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedqsn_cli.auditing.findings import Entry, FunctionRecovery, Recovery
from fedqsn_cli.auditing.inputs import BASELINE
from fedqsn_cli.auditing.limits.measured import PHRASES, LimitCheck, Measured, check_limit
from fedqsn_cli.auditing.limits.recovery import MEASURES
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.registry import Rule
from fedqsn_cli.exposure.results import Exposure

WORSE_THAN_BASELINE = Rule(
    "FQ205",
    "worse-than-baseline",
    "gate",
    what="A measure is worse than in the baseline, by more than the policy allows.",
    why="Leakage that creeps up is seen here before it reaches a limit.",
    fix="See what changed since the baseline; accept it by saving this audit as the new one.",
    scope="regression",
    needs=(BASELINE,),
)


def measures(
    recovery: Sequence[Recovery], function: FunctionRecovery | None, exposure: Exposure | None
) -> dict[str, float]:
    """The worst value of every measure, by a name that stays the same from audit to audit: what baselines hold."""
    worst: dict[str, float] = {}
    for kind in ("proxy", "coalition"):
        peaks = [found.peak for found in recovery if found.scope.startswith(kind)]
        for measure in MEASURES:
            values = [value for peak in peaks if (value := getattr(peak, measure)) is not None]
            if values:
                worst[f"{kind} {measure}"] = min(values) if measure == "log10_nmse" else max(values)
    if function is not None and function.rho is not None:
        worst["rho"] = function.rho
    if exposure is not None:
        worst["clear_share"] = exposure.clear_share
        if exposure.clients:
            worst["client exposure"] = max(client.shares[-1] for client in exposure.clients)
        worst |= {f"coalition of {found.size} exposure": found.share for found in exposure.coalitions}
    return worst


@LimitCheck
def regression(policy: Policy, measured: Measured) -> Iterator[Entry]:
    """Every measure that both audits have."""
    before = measured.baseline
    if before is None:
        return
    now = measures(measured.recovery, measured.function, measured.exposure)
    if not now.keys() & before.keys():
        yield WORSE_THAN_BASELINE.not_run("baseline", "this audit measured nothing that the baseline did")
    for name in sorted(now.keys() & before.keys()):
        measure = next(key for key in PHRASES if name.endswith(key))
        worse = before[name] - now[name] if measure == "log10_nmse" else now[name] - before[name]
        allowed = getattr(policy.regression, measure) or 0.0
        what = f"{name}: {before[name]:.4g} before, {now[name]:.4g} now; worsening"
        yield from check_limit(WORSE_THAN_BASELINE, name, what, worse, allowed)
