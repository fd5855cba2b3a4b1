"""What clients and coalitions have seen so far, from the ledger and the key alone.

A parameter is seen when a proxy showed its unit in any round, however coarsely quantized; a parameter without a unit
(norms, most biases) is seen with the first proxy. Shares are of all parameters, hidden ones included.

Every mask is drawn again, release by release. Beyond `MOST_RANKS` only a random part of the units is looked at, chosen
by the key, and the shares become estimates: `Exposure.looked_at` tells how large that part was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.exposure.coalitions import worst_coalitions
from fedqsn_cli.exposure.expected import ExpectedExposure, job_parameters
from fedqsn_cli.exposure.history import AnyRelease, History, sampled
from fedqsn_cli.exposure.replay import replay
from fedqsn_cli.exposure.results import ClientExposure, Exposure
from fedqsn_cli.masks.job_key import JobKey

MOST_RANKS = 600_000_000  # some 5 seconds on two cores
MOST_BYTES = 1 << 26
SIZES = (2, 3, 5, 10)  # coalitions that are looked at, as far as there are so many clients
HEAT_CLIENTS = 64  # those that have seen most


def exposure(
    job: JobKey,
    releases: Sequence[AnyRelease],
    *,
    sizes: Iterable[int] = SIZES,
    most_ranks: int = MOST_RANKS,
    most_bytes: int = MOST_BYTES,
) -> Exposure:
    """What the clients of one job have seen.

    Args:
        releases: of this job, in order.
        sizes: of the coalitions to look for; the coalition of all clients is always among them.
        most_ranks: 64-bit ranks to draw; beyond, shares are estimated from some groups.
        most_bytes: to keep of one group at a time, a byte a client and unit; beyond, some of its units are looked at.
    """
    history = History.of(releases)
    sample = sampled(job, history, most_ranks, most_bytes)
    replayed = replay(job, history, sample)
    clear, total = job.clear_sent, job_parameters(job)
    shares = (clear + replayed.seen) / total if total else replayed.seen
    clients = tuple(
        ClientExposure(name, tuple(releases[i].round for i in lines), tuple(float(shares[i]) for i in lines))
        for name, lines in history.lines.items()
    )
    count = len(clients)
    wanted = sorted({size for size in sizes if 2 <= size <= count} | ({count} if count > 1 else set()))
    mean = ExpectedExposure.of(job, min((release.p2 for release in releases), default=0.0))
    return Exposure(
        clients=clients,
        coalitions=worst_coalitions(
            list(history.lines), replayed.bits, replayed.weights / max(total, 1), clear / max(total, 1), wanted
        ),
        proxies_to_99=mean.proxies_to(0.99) if releases else None,
        clear_share=clear / total if total else 0.0,
        hidden_share=1.0 - mean.visible / total if total else 0.0,
        heat_map=_heat(job, clients, replayed.units),
        analytic=mean.curve(max(map(len, history.lines.values()), default=0)) if releases else (),
        looked_at=sample.share,
    )


def module(group: str) -> str:
    """The module that a group of units belongs to: its name without `.weight`, experts of one stack together."""
    return group.split("#")[0].removesuffix(".weight")


def _heat(
    job: JobKey, clients: Sequence[ClientExposure], units: Mapping[str, NDArray[np.float64]]
) -> tuple[tuple[str, str, float], ...]:
    """(client, module, share of its parameters seen) for the clients that have seen most, in the ledger's order."""
    sizes: dict[str, float] = {}
    seen: dict[str, NDArray[np.float64]] = {}
    for name, shares in units.items():
        size = job.groups[name][1]
        sizes[module(name)] = sizes.get(module(name), 0.0) + size
        seen[module(name)] = seen.get(module(name), np.zeros(len(clients))) + size * shares
    most = sorted(range(len(clients)), key=lambda i: -clients[i].shares[-1])[:HEAT_CLIENTS]
    return tuple(
        (clients[i].client, name, float(seen[name][i] / size))
        for i in sorted(most)
        for name, size in sizes.items()
        if size
    )
