"""What was computed of who has seen what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ClientExposure:
    """What one client has seen: share of all parameters after each of its releases, in the order of the ledger."""

    client: str
    rounds: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Coalition:
    """The coalition of `size` clients that has seen most.

    Args:
        share: of all parameters. method: how it was looked for. tried: coalitions that were looked at.
        at_most: what no coalition of this size exceeds.
    """

    size: int
    members: tuple[str, ...]
    share: float
    method: Literal["exact", "greedy", "sampled"]
    tried: int
    at_most: float = 1.0


@dataclass(frozen=True, slots=True)
class Exposure:
    """What clients and coalitions have seen by the ledger, as shares of all parameters (0 to 1).

    Args:
        proxies_to_99: fresh proxies until 99 % of the server model is seen; None when that never happens.
        clear_share: shipped in the clear. hidden_share: hidden by the server mask.
        heat_map: (client, module, share of the module's parameters seen).
        analytic: for 1, 2, ... fresh proxies the expected share (1 - p1)(1 - p2^K).
        looked_at: share of all units that was drawn again; below 1 the shares are estimates.
    """

    clients: tuple[ClientExposure, ...]
    coalitions: tuple[Coalition, ...]
    proxies_to_99: int | None
    clear_share: float
    hidden_share: float
    heat_map: tuple[tuple[str, str, float], ...]
    analytic: tuple[float, ...] = ()
    looked_at: float = 1.0
