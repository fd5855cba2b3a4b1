"""The masks of a job, tensor by tensor: what the server hides, what it hides from one client, and the scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedqsn_cli.masks.draw import (
    ClientUnitsInOrder,
    client_scope,
    client_units,
    hidden_count,
    hidden_units,
    rescale_factor,
)
from fedqsn_cli.masks.job_key import JobKey
from fedqsn_cli.masks.unit_mask import UnitMask
from fedqsn_cli.planning.tensor_plan import TensorPlan

Bools = NDArray[np.bool_]

_LARGE = 1 << 20  # units; only a group of single weights has more


@dataclass
class ServerMasks:
    """The server mask of a job. The hidden set of a group is drawn once and kept while its tensors are processed."""

    job: JobKey
    _groups: dict[str, Bools] = field(default_factory=dict)
    _last: tuple[TensorPlan | None, UnitMask | None] = (None, None)

    def hidden_units(self, name: str, units: int) -> Bools:
        """H of a group, [units], True where hidden."""
        found = self._groups.get(name)
        if found is None:
            found = hidden_units(self.job.key, name, units, self.job.ratio(name))
            # single weights as units: one such group at a time is enough
            self._groups = {name: found} if units > _LARGE else self._groups | {name: found}
        return found

    def hidden(self, tensor: TensorPlan) -> UnitMask | None:
        """What the server hides of a tensor; None when its ratio is 0, or the plan does not mask it.

        A job that sends nothing hides all of every tensor, norms included.
        """
        if self.job.sends_nothing and tensor.axis is None:
            lead, rows, _ = tensor.view
            return UnitMask("row", tensor.view, np.ones(lead * rows, np.bool_))
        if tensor.axis is None or self.count(tensor) == 0:
            return None
        last, mask = self._last
        if last is not tensor:
            mask = UnitMask.from_groups(
                tensor.axis, tensor.view, [self.hidden_units(name, tensor.units) for name in tensor.groups]
            )
            self._last = tensor, mask
        return mask

    def hidden_on_the_way(self, tensor: TensorPlan) -> UnitMask | None:
        """What is left out of a model, and of its digest, when it is read for a proxy or merged: the hidden units.

        In a job that sends nothing the public base takes the model's place as a whole, and nothing is left out of it.
        """
        return None if self.job.sends_nothing else self.hidden(tensor)

    def hidden_elements(self, tensor: TensorPlan) -> int:
        """How many elements of a tensor the server hides."""
        return math.prod(tensor.shape) if self.job.sends_nothing else tensor.elements(self.count(tensor))

    def count(self, tensor: TensorPlan) -> int:
        """How many units of each of a tensor's groups the server hides; its groups have one ratio."""
        return self.job.hides(tensor.groups[0], tensor.units) if tensor.masked else 0


@dataclass
class ClientMasks:
    """The masks of one client in one round, on top of the server's.

    Args:
        server: the server masks of the job.
        client, round: whose proxy; `round` counts only in schedule fresh.
        p2: ratio hidden from this client.
        schedule: fresh (another mask every round) or sticky (the same mask in all rounds).
        rescale: whether the visible part is scaled by n / |V|.
    """

    server: ServerMasks
    client: str
    round: int
    p2: float
    schedule: Literal["fresh", "sticky"]
    rescale: bool
    _last: tuple[TensorPlan | None, np.float32] = (None, np.float32(1))  # the factor that was asked for before

    def client_hidden_units(self, name: str, units: int) -> Bools:
        """C of a group, [units], True where hidden from the client only."""
        hidden = self.server.hidden_units(name, units)
        return client_units(self.server.job.key, name, hidden, self.p2, self._scope)

    @property
    def _scope(self) -> tuple[str, ...]:
        return client_scope(self.client, None if self.schedule == "sticky" else self.round)

    def visible_group(self, name: str, units: int) -> Bools:
        """V of a group, [units], True where the client sees the unit."""
        visible: Bools = ~(self.server.hidden_units(name, units) | self.client_hidden_units(name, units))
        return visible

    def hidden(self, tensor: TensorPlan) -> UnitMask | None:
        """What is hidden of a tensor from this client only (C); None when nothing is."""
        if not tensor.masked or tensor.axis is None or self._counts(tensor)[1] == 0:
            return None
        return UnitMask.from_groups(
            tensor.axis, tensor.view, [self.client_hidden_units(name, tensor.units) for name in tensor.groups]
        )

    def visible(self, tensor: TensorPlan) -> UnitMask | None:
        """What the client sees of a tensor (V); None when the plan does not mask it."""
        if not tensor.masked or tensor.axis is None:
            return None
        return UnitMask.from_groups(
            tensor.axis, tensor.view, [self.visible_group(name, tensor.units) for name in tensor.groups]
        )

    def visible_in_order(self, tensor: TensorPlan) -> VisibleInOrder:
        """V of a tensor whose units are single weights, from the first to the last."""
        key = self.server.job.key
        groups = (
            ClientUnitsInOrder(key, name, self.server.hidden_units(name, tensor.units), self.p2, self._scope)
            for name in tensor.groups
        )
        return VisibleInOrder(tensor.units, groups)

    def visible_count(self, tensor: TensorPlan) -> int:
        """|V|: how many units of each group of a tensor the client sees."""
        return tensor.units - sum(self._counts(tensor))

    def hidden_elements(self, tensor: TensorPlan) -> int:
        """How many elements of a tensor are hidden from this client only."""
        return tensor.elements(self._counts(tensor)[1])

    def factor(self, tensor: TensorPlan) -> np.float32:
        """The scale s of a tensor in this client's proxy: n / |V|, or 1."""
        if not self.rescale or not tensor.masked:
            return np.float32(1)
        last, factor = self._last  # read and written as one, because threads ask, too
        if last is not tensor:
            factor = rescale_factor(tensor.units, *self._counts(tensor))
            self._last = tensor, factor
        return factor

    def _counts(self, tensor: TensorPlan) -> tuple[int, int]:
        by_server = self.server.count(tensor)
        return by_server, hidden_count(tensor.units - by_server, self.p2)


class VisibleInOrder:
    """The weights of a tensor that a client sees, asked for from the first to the last, so that few are in memory.

    Args:
        units: of each group. groups: one after the other, drawn when they begin.
    """

    def __init__(self, units: int, groups: Iterator[ClientUnitsInOrder]) -> None:
        self._units, self._groups = units, groups
        self._left = 0  # of the current group
        self.seen = 0
        """How many of all that were asked for it sees."""

    def take(self, count: int) -> Bools:
        """Flags of the next `count` weights."""
        parts = []
        while count:
            if not self._left:
                self._group, self._left = next(self._groups), self._units
            taken = min(count, self._left)
            parts.append(self._group.visible(taken))
            self._left, count = self._left - taken, count - taken
        flags = np.concatenate(parts) if parts else np.zeros(0, np.bool_)
        self.seen += int(np.count_nonzero(flags))
        return flags
