"""The search for the best number: the grid, the halves around the best, ties, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import GateFailed, InputError
from fedqsn_cli.merging.ending.line_search import BLENDS, STEPS, Point, best, best_blend, best_step, explore
from fedqsn_cli.progress import Silent


def along(curve: Callable[[float], float]) -> Callable[[float], Point]:
    return lambda value: Point(value, curve(value), None, None)


@given(st.floats(0, 1))
def test_the_best_blend_of_a_parabola_is_found_to_a_sixteenth(bottom: float) -> None:
    search = best_blend(along(lambda x: (x - bottom) ** 2), 7, Silent())
    assert abs(search.chosen - bottom) <= 1 / 16
    assert search.chosen == best(search.curve).value
    assert len(search.curve) == len({point.value for point in search.curve}) == len(BLENDS) + 3
    assert [point.value for point in search.curve] == sorted(point.value for point in search.curve)
    assert (search.option, search.examples) == ("--blend", 7)


@given(st.floats(0.05, 3))
def test_the_best_step_of_a_parabola_is_found(bottom: float) -> None:
    search = best_step(along(lambda x: (x - bottom) ** 2), 7, Silent(), allow_worse=False)
    assert abs(search.chosen - bottom) <= (0.125 if bottom < 1 else 0.25)
    assert search.chosen > 0


@given(st.lists(st.floats(0, 9), min_size=20, max_size=20))
def test_the_lowest_of_any_losses_is_chosen_and_no_value_is_measured_twice(losses: list[float]) -> None:
    asked: list[float] = []

    def measure(value: float) -> Point:
        asked.append(value)
        return Point(value, losses[len(asked)], None, None)

    curve = explore(measure, STEPS, Silent())
    assert best(curve).loss == min(point.loss for point in curve)
    assert len(asked) == len(set(asked)) == len(STEPS) + 3
    assert all(value * 64 % 1 == 0 for value in asked)  # short binary fractions


def test_among_equal_losses_the_default_is_chosen() -> None:
    assert best_blend(along(lambda _: 1.0), 1, Silent()).chosen == 1
    assert best_step(along(lambda _: 1.0), 1, Silent(), allow_worse=False).chosen == 1


def test_a_step_that_only_hurts_is_searched_for_close_to_0_and_refused() -> None:
    with pytest.raises(GateFailed, match=r"loss is 2 now, and 2\.03125 at the best step, 0\.03125") as refused:
        best_step(along(lambda x: 2 + x), 1, Silent(), allow_worse=False)
    assert refused.value.exit_code == 1
    assert "--allow-worse" in str(refused.value)
    assert best_step(along(lambda x: 2 + x), 1, Silent(), allow_worse=True).chosen == 0.03125


def test_losses_that_are_not_numbers_are_worse_than_any_loss() -> None:
    search = best_step(along(lambda x: math.inf if x > 0.7 else 2 - x), 1, Silent(), allow_worse=False)
    assert search.chosen == 0.625
    with pytest.raises(InputError, match="not a number"):
        best_blend(along(lambda _: math.inf), 1, Silent())
    with pytest.raises(InputError, match="not a number"):
        best_step(along(lambda x: math.inf if x else 1.0), 1, Silent(), allow_worse=True)
