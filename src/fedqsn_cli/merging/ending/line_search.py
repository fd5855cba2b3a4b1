"""Search for the best number on a line: a coarse grid, then halves of the gaps around the best.

Nothing is random and nothing is fitted: equal losses give equal values, and every value is a short binary fraction, so
that it can be given as a number in the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedqsn_cli.errors import GateFailed, InputError
from fedqsn_cli.progress import Progress

BLENDS = tuple(i / 8 for i in range(9))
STEPS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
REFINEMENTS = 3

Option = Literal["--blend", "--server-lr"]


@dataclass(frozen=True, slots=True)
class Point:
    """The model at one value, on the owner's development data; infinite loss where its outputs are not numbers."""

    value: float
    loss: float
    accuracy: float | None
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class Search:
    """The values that were tried and the one that was chosen.

    Args:
        option: the option that was auto.
        examples: number of examples that the losses were measured on.
        chosen: the value with the lowest loss. curve: all values that were tried, in ascending order.
    """

    option: Option
    examples: int
    chosen: float
    curve: tuple[Point, ...]

    def at(self, value: float) -> Point:
        """The point of a value that was tried."""
        return next(point for point in self.curve if point.value == value)

    @property
    def metric(self) -> Literal["accuracy", "perplexity"]:
        """The field of its points that is shown beside the loss."""
        return "accuracy" if self.at(self.chosen).accuracy is not None else "perplexity"


Measure = Callable[[float], Point]


def explore(measure: Measure, grid: Sequence[float], progress: Progress) -> tuple[Point, ...]:
    """Measure the grid, then `REFINEMENTS` more values around the best one so far; all of them by value."""
    progress.start("choosing", len(grid) + REFINEMENTS, "models")
    points = []
    for value in grid:
        points.append(measure(value))
        progress.advance(1, best=best(points).loss)
    for _ in range(REFINEMENTS):
        points.append(measure(_next_value(sorted(points, key=_value))))
        progress.advance(1, best=best(points).loss)
    progress.finish()
    return tuple(sorted(points, key=_value))


def best(points: Sequence[Point]) -> Point:
    """The lowest loss; of equal ones the value nearest to 1, the default."""
    return min(points, key=lambda point: (point.loss, abs(point.value - 1.0), point.value))


def _value(point: Point) -> float:
    return point.value


def _next_value(ordered: Sequence[Point]) -> float:
    """The middle of the wider gap beside the best point; of equal gaps the one on the better neighbour's side."""
    lowest = ordered.index(best(ordered))
    gaps = [(ordered[i], ordered[i + 1]) for i in (lowest - 1, lowest) if 0 <= i < len(ordered) - 1]
    low, high = min(gaps, key=lambda gap: (gap[0].value - gap[1].value, max(gap[0].loss, gap[1].loss)))
    return (low.value + high.value) / 2


def best_blend(measure: Measure, examples: int, progress: Progress) -> Search:
    """λ of a restore with the lowest loss.

    Raises:
        InputError: the model's loss is not a number at any λ.
    """
    curve = explore(measure, BLENDS, progress)
    return Search("--blend", examples, _with_number(best(curve)).value, curve)


def best_step(measure: Measure, examples: int, progress: Progress, *, allow_worse: bool) -> Search:
    """η of a merge with the lowest loss.

    Args:
        allow_worse: take the best η even where it makes the model worse.

    Raises:
        GateFailed: every step makes the model worse than it is now.
        InputError: the model's loss is not a number after any step.
    """
    curve = explore(measure, STEPS, progress)
    current = next(point for point in curve if point.value == 0)
    chosen = _with_number(best([point for point in curve if point.value > 0]))
    if chosen.loss > current.loss and not allow_worse:
        raise GateFailed(
            f"the updates make the model worse on the development data: its loss is {current.loss:.6g} now, and "
            f"{chosen.loss:.6g} at the best step, {chosen.value:g}",
            where="--server-lr auto",
            hint="--allow-worse takes that step; else give --server-lr a number, or more --eval-data",
        )
    return Search("--server-lr", examples, chosen.value, curve)


def _with_number(point: Point) -> Point:
    if point.loss == float("inf"):
        problem = "the model's loss is not a number at any value that was tried"
        raise InputError(problem, hint="its weights may be damaged")
    return point
