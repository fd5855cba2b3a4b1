"""FQ105: do the options of each release follow from those before? Whoever may choose them can send bits with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.auditing.findings import Entry
from fedqsn_cli.auditing.inputs import KEY, RELEASES
from fedqsn_cli.auditing.limits.measured import LimitCheck, Measured
from fedqsn_cli.auditing.policy import Policy
from fedqsn_cli.auditing.registry import Rule

UNSETTLED_OPTIONS = Rule(
    "FQ105",
    "unsettled-options",
    "gate",
    what="Options of a release that do not follow from earlier ones: a round that is not the next, a setting or a p2 "
    "that changed, a p2 of more than three decimals, a second proxy of one round, a client that the policy does not "
    "list.",
    why="A round is sent as it is, and a proxy id depends on the options: who may choose them can put bits of a secret "
    "into both.",
    fix="Find out who asked for these options. Waive the finding if somebody did.",
    scope="exposure",
    needs=(RELEASES, KEY),
    limited=lambda policy: policy.release.settled,
)

_SETTINGS = ("schedule", "rescale", "fill", "train", "quantization", "max_shard_bytes")  # one for all of a job
_DECIMALS = 3


@LimitCheck
def options(policy: Policy, measured: Measured) -> Iterator[Entry]:
    """Every release of the job, in the order of the ledger."""
    if not measured.releases:
        return
    found = list(_surprises(measured.releases, policy.release.clients))
    if policy.release.settled:
        findings = [UNSETTLED_OPTIONS.finding(scope, message) for scope, message in found]
        yield from UNSETTLED_OPTIONS.checked("ledger", "options of all releases were compared", findings)
    else:
        count = f"{len(found)} options of releases do not follow from earlier ones"
        yield from UNSETTLED_OPTIONS.checked("ledger", f"{count}; the policy sets no limit")


def _surprises(releases: Sequence[Release], clients: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """(scope, what does not follow)."""
    latest, ratios, given = 0, dict[str, float](), set[tuple[str, int]]()
    for number, release in enumerate(releases):
        before, p2 = releases[max(0, number - 1)], ratios.get(release.client, release.p2)
        unexpected = {
            "the policy does not list its client": clients is not None and release.client not in clients,
            f"its round is {release.round}, and that of the job {latest}": release.round not in (latest, latest + 1),
            "it is a second proxy of one client in one round": (release.client, release.round) in given,
            f"its p2 is {release.p2}, and was {p2}": p2 != release.p2,
            f"its p2, {release.p2}, has more than {_DECIMALS} decimals": p2 == release.p2 != round(p2, _DECIMALS),
        }
        for name in _SETTINGS:
            what = f"its {name.replace('_', ' ')} is not that of the release before"
            unexpected[what] = getattr(before, name) != getattr(release, name)
        yield from (
            (f"release {release.client} round {release.round}", what) for what, is_so in unexpected.items() if is_so
        )
        latest = max(latest, release.round)
        ratios[release.client] = release.p2
        given.add((release.client, release.round))
