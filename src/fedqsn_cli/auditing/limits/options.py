"""FQ105: do the options of each release follow from those before? Whoever may choose them can send bits with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass
class _History:
    """What a job's releases were so far."""

    latest: int = 0
    last: Release | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    given: set[tuple[str, int]] = field(default_factory=set)

    def surprises(self, release: Release) -> Iterator[str]:
        """What of the next release does not follow, in words."""
        if not self.latest <= release.round <= self.latest + 1:
            yield f"its round is {release.round}, and that of the job {self.latest}"
        if (release.client, release.round) in self.given:
            yield "it is a second proxy of one client in one round"
        before = self.ratios.get(release.client, release.p2)
        if before != release.p2:
            yield f"its p2 is {release.p2}, and was {before}"
        elif round(release.p2, _DECIMALS) != release.p2:
            yield f"its p2, {release.p2}, has more than {_DECIMALS} decimals"
        for name in _SETTINGS if self.last is not None else ():
            if getattr(self.last, name) != getattr(release, name):
                yield f"its {name.replace('_', ' ')} is not that of the release before"

    def add(self, release: Release) -> None:
        """Go on to the next."""
        self.latest = max(self.latest, release.round)
        self.last = release
        self.ratios[release.client] = release.p2
        self.given.add((release.client, release.round))


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
    history = _History()
    for release in releases:
        scope = f"release {release.client} round {release.round}"
        if clients is not None and release.client not in clients:
            yield scope, "the policy does not list its client"
        yield from ((scope, message) for message in history.surprises(release))
        history.add(release)
