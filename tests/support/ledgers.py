"""Releases without proxies: all that exposure looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Line:
    """What decides one client's mask in one round."""

    client: str
    round: int
    schedule: Literal["fresh", "sticky"]
    p2: float
