"""The options of `merge` about which updates count, and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedqsn_cli import validate
from fedqsn_cli.options.declare import Option, Options
from fedqsn_cli.options.groups import LIMITS

OnRefused = Literal["skip", "fail"]


@dataclass(frozen=True, kw_only=True)
class AdmissionOptions(Options):
    """Which updates count."""

    max_update_norm: Annotated[
        float,
        Option(
            "Refuse an update whose norm is more than this many times the model's.",
            LIMITS,
            check=validate.more_than_zero,
        ),
    ] = 10.0
    max_unit_norm: Annotated[
        float | None,
        Option(
            "Refuse an update that moves a tensor or a neuron by more than this many times the size of its weights.",
            LIMITS,
            shown="10, or --max-update-norm if that is more",
            check=validate.more_than_zero,
        ),
    ] = None
    max_examples: Annotated[
        int | None,
        Option(
            "Refuse an update that claims more examples.",
            LIMITS,
            shown="10 times the median of three or more updates",
            check=validate.at_least_one,
        ),
    ] = None
    min_clients: Annotated[
        int, Option("Refuse a round that fewer updates are merged in.", LIMITS, check=validate.at_least_one)
    ] = 1
    on_refused: Annotated[
        OnRefused, Option("End the merge at an update that is refused, or name it and go on.", LIMITS)
    ] = "fail"

    @property
    def unit_limit(self) -> float:
        """`max_unit_norm`, or its default."""
        return max(10.0, self.max_update_norm) if self.max_unit_norm is None else self.max_unit_norm
