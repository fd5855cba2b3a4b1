"""A limit on what clients may see in the end, applied before a release: `export-proxy --budget`.

What is planned is counted as if it were in the ledger. An export that repeats an earlier one shows nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.errors import GateFailed
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.exposure.history import AnyRelease
from fedqsn_cli.exposure.results import Exposure
from fedqsn_cli.masks.job_key import JobKey

_TOLERANCE = 1e-9
_HINT = "nothing was written; use --schedule sticky, a larger --p1 in a new job, or a larger --budget"


@dataclass(frozen=True, slots=True)
class Planned:
    """A release that has not happened yet."""

    client: str
    round: int
    schedule: Literal["fresh", "sticky"]
    p2: float


@dataclass(frozen=True)
class Budget:
    """What clients may have seen after planned releases.

    Args:
        share: most of all parameters that one of the planned clients may have seen afterwards; None allows all.
        coalition: number of clients that may work together: no coalition of that size may have seen more either.
    """

    job: JobKey
    planned: tuple[Planned, ...]
    share: float | None
    coalition: int | None

    def check(self, past: Sequence[Release]) -> None:
        """Refuse the planned releases if they would show too much.

        Raises:
            GateFailed: the budget would be exceeded, or it cannot be ruled out that a coalition exceeds it.
        """
        if self.share is None:
            return
        releases: list[AnyRelease] = [release for release in past if release.job == self.job.commitment]
        sizes = {self.coalition} if self.coalition else ()
        after = exposure(self.job, [*releases, *self.planned], sizes=sizes)
        _judge_clients(after, {release.client for release in self.planned}, self.share)
        if self.coalition is not None:
            _judge_coalition(after, self.coalition, self.share)


def _judge_clients(after: Exposure, planned: set[str], budget: float) -> None:
    worst = max((client for client in after.clients if client.client in planned), key=lambda client: client.shares[-1])
    if worst.shares[-1] > budget + _TOLERANCE:
        raise GateFailed(
            f"client {worst.client} would have seen {_percent(worst.shares[-1])} of all parameters, "
            f"over the budget of {_percent(budget)}",
            where="--budget",
            hint=_HINT,
        )


def _judge_coalition(after: Exposure, size: int, budget: float) -> None:
    size = min(size, len(after.clients))
    found = next((coalition for coalition in after.coalitions if coalition.size == size), None)
    if found is None or found.at_most <= budget + _TOLERANCE:
        return
    names = ", ".join(found.members[:5]) + (" and others" if size > 5 else "")
    if found.share > budget + _TOLERANCE:
        what = f"{size} clients together ({names}) would have seen {_percent(found.share)} of all parameters"
    else:
        what = f"{size} clients together could have seen up to {_percent(found.at_most)} of all parameters"
    raise GateFailed(f"{what}, over the budget of {_percent(budget)}", where="--budget", hint=_HINT)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
