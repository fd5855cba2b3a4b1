"""The kernels of rules that put values in order, against a sort of each weight's values: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqsn_cli.merging.rules.order_rules import KINDS, PIECE, OrderRule

Doubles = NDArray[np.float64]
ROWS, COLS = 3, PIECE + 37
UNITS = {"row": ((1, 0), ROWS), "column": ((0, 1), COLS), "element": ((COLS, 1), ROWS * COLS), "none": ((0, 0), 1)}


def expected(rule: str, values: list[float], drop: int) -> float:
    """What a rule makes of the values of those who saw a weight."""
    x = sorted(values)
    if len(x) <= 2 * drop:
        return 0.0
    middle = 0.5 * x[(len(x) - 1) // 2] + 0.5 * x[len(x) // 2]
    if rule == "median":
        return middle
    if rule == "trimmed-mean":
        kept = x[drop : len(x) - drop]
    else:
        kept = list(x)
        for _ in range(2 * drop):
            kept.pop(-1 if kept[-1] - middle >= middle - kept[0] else 0)
    return sum(kept) / len(kept)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("clients", [1, 2, 3, 8, 11, 33])
@pytest.mark.parametrize("rule", KINDS)
def test_every_weight_is_what_sorting_its_values_says(rule: str, clients: int, units: str) -> None:
    rng = np.random.default_rng(clients)
    strides, count = UNITS[units]
    seen = (rng.random((clients, count)) > 0.3).astype(np.float64)
    values = np.round(rng.standard_normal((clients, ROWS, COLS)), 1)  # equal ones among them
    for drop in (0, 1, 4):
        out = np.full((ROWS, COLS), np.nan)
        OrderRule(rule, drop).apply(values, seen, strides, out)
        for row, col in [
            (0, 0),
            (1, 5),
            (2, PIECE - 1),
            (2, PIECE),
            (1, COLS - 1),
            *rng.integers((ROWS, COLS), size=(40, 2)),
        ]:
            unit = row * strides[0] + col * strides[1]
            shown = [float(values[k, row, col]) for k in range(clients) if seen[k, unit]]
            assert out[row, col] == expected(rule, shown, drop)
