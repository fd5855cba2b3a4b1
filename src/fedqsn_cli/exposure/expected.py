"""What fresh proxies show on average, by arithmetic alone: no mask is drawn.

Of a group with V server-visible units, of which each proxy hides a share q, K proxies show V (1 - q^K).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.masks.draw import hidden_count
from fedqsn_cli.masks.job_key import JobKey

LONGEST = 100  # proxies, of the curve
FOREVER = 100_000  # proxies; what is not seen by then counts as never seen


def job_parameters(job: JobKey) -> int:
    """All parameters of the job's model."""
    return job.clear + sum(size for _, size in job.groups.values())


@dataclass(frozen=True)
class ExpectedExposure:
    """What fresh proxies show on average.

    Args:
        sizes: server-visible parameters of each group. hidden: share of them that one proxy hides.
        visible: server-visible parameters, and those in no group that proxies show, together.
    """

    sizes: NDArray[np.float64]
    hidden: NDArray[np.float64]
    clear: int
    visible: float
    total: int

    @classmethod
    def of(cls, job: JobKey, p2: float) -> ExpectedExposure:
        """For a job whose proxies hide the share `p2` from their client."""
        sizes, hidden = [], []
        for name, (units, size) in job.groups.items():
            left = units - job.hides(name, units)
            sizes.append(size * left / units if units else 0.0)
            hidden.append(hidden_count(left, p2) / left if left else 0.0)
        return cls(np.array(sizes), np.array(hidden), job.clear_sent, job.clear_sent + sum(sizes), job_parameters(job))

    def share(self, proxies: int) -> float:
        """Of all parameters, after so many proxies."""
        seen = self.clear + float((self.sizes * (1.0 - self.hidden**proxies)).sum())
        return seen / self.total if self.total else 0.0

    def curve(self, longest: int) -> tuple[float, ...]:
        """The share after 1, 2, ... proxies, ten at least."""
        return tuple(self.share(proxies) for proxies in range(1, min(max(longest, 10), LONGEST) + 1))

    def proxies_to(self, part: float) -> int | None:
        """Proxies until this part of the server-visible parameters is seen, None if that takes too many."""
        least, most = 1, FOREVER
        if self.share(most) * self.total < part * self.visible:
            return None
        while least < most:
            middle = (least + most) // 2
            enough = self.share(middle) * self.total >= part * self.visible
            least, most = (least, middle) if enough else (middle + 1, most)
        return least
