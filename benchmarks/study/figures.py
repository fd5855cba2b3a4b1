"""From cells to figures: what an attacker gets of the secret, and what a method keeps of FedAvg's gain.

    ρ(n)  = (L_base - L_attack,n) / (L_base - L_owner)          all that he has after n public examples
    ρ'(n) = (L_base,n - L_attack,n) / (L_base,n - L_owner)      what proxies add to what the examples alone teach
    gain  = (L_owner - L_final) / (L_owner - L_fedavg)          on B

L on A for ρ, on B for the gain. L_x,n is the least loss that x has seen with at most n public examples: whoever is
worse off after fine-tuning does not do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from benchmarks.study.settings import CONSOLIDATED_ENDING, LONG_ENDING, NAMED, Cell, weighted

POINT = 0.01  # of accuracy: the owner's skill is damaged if it drops by more
TENTH = 0.1  # of the secret gain, for a language model


class Spread(NamedTuple):
    """A figure over seeds."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Median and range of those that are there."""
        known = [value for value in values if value is not None]
        return cls(median(known), min(known), max(known)) if known else None


@dataclass(frozen=True)
class Row:
    """What one method came to on one task with one seed. Figures that need a cell that is not there are None."""

    task: str
    seed: int
    method: str
    figures: Mapping[str, float | None]
    recovered: Mapping[int, float | None] = field(default_factory=dict)  # ρ
    added: Mapping[int, float | None] = field(default_factory=dict)  # ρ'


Results = Mapping[tuple[str, int, str], Mapping[str, Any]]


def table_of(pairs: Iterable[tuple[Cell, Mapping[str, Any] | None]]) -> Results:
    """Results that are there and did not fail, by task, seed and method."""
    return {
        (cell.task.name, cell.seed, cell.method.name): result
        for cell, result in pairs
        if result is not None and "error" not in result
    }


def rows(results: Results) -> list[Row]:
    """All figures."""
    found = []
    for (task, seed, method), result in results.items():
        if method.endswith(CONSOLIDATED_ENDING):
            plain = method.removesuffix(CONSOLIDATED_ENDING)
            found += [
                _row(results, task, seed, weighted(plain, one["weight"]), _ended(results, task, seed, plain, one))
                for one in result["consolidated"]
            ]
        elif "final" in result:
            found.append(_row(results, task, seed, method, result))
    return found


def _ended(results: Results, task: str, seed: int, plain: str, end: Mapping[str, Any]) -> dict[str, Any]:
    """A job with another ending: what was sent is the same, and what an attacker gets."""
    job = results.get((task, seed, plain), {})
    sent = {key: job[key] for key in ("release", "curve", "weights", "attack") if key in job}
    sent |= {key: job.get(key) for key in ("never_sent", "bytes_down", "bytes_up")}
    return sent | {"final": end} | ({} if NAMED[plain].sends else {"never_sent": 1.0})


def best_so_far(curve: Sequence[Mapping[str, Any]], key: str = "loss") -> dict[int, float]:
    """The figure of the least loss with at most n public examples."""
    found: dict[int, float] = {}
    best: Mapping[str, Any] | None = None
    for point in sorted(curve, key=lambda one: int(one["n"])):
        best = point if best is None or point["loss"] < best["loss"] else best
        if best[key] is not None:
            found[point["n"]] = best[key]
    return found


def curve_of(results: Results, task: str, seed: int, method: str) -> list[Mapping[str, Any]]:
    """The attack curve of a method, with the sizes that were measured apart."""
    short = results.get((task, seed, method), {}).get("curve", [])
    return [*short, *_more_sizes(results, task, seed, method)]


def _more_sizes(results: Results, task: str, seed: int, method: str) -> list[Mapping[str, Any]]:
    long = results.get((task, seed, method + LONG_ENDING), {}).get("curve", [])
    return [point for point in long if point["n"] > 0]


def _row(results: Results, task: str, seed: int, method: str, result: Mapping[str, Any]) -> Row:
    world = results.get((task, seed, "world"))
    curve = [*result.get("curve", []), *_more_sizes(results, task, seed, method)]
    floor = best_so_far(curve_of(results, task, seed, "floor"))
    attack = best_so_far(curve)
    if "curve" not in result:  # nothing was sent, or nothing was attacked
        attack = floor if result.get("never_sent") == 1.0 else {}
    final, release = result["final"], result.get("release", {"a": {}, "b": {}})
    figures: dict[str, float | None] = {
        "final_a_loss": final["a"]["loss"],
        "final_a": final["a"]["accuracy"],
        "final_b_loss": final["b"]["loss"],
        "final_b": final["b"]["accuracy"],
        "proxy_a_loss": release["a"].get("loss"),
        "proxy_a": release["a"].get("accuracy"),
        "proxy_b_loss": release["b"].get("loss"),
        "proxy_b": release["b"].get("accuracy"),
        "never_sent": result["never_sent"],
        "mb_down": _megabytes(result["bytes_down"]),
        "mb_up": _megabytes(result["bytes_up"]),
        "weights": result.get("weights"),
        "blend": result.get("blend"),
        "seconds": result.get("seconds"),
        "attack_a_64": best_so_far(curve, "accuracy").get(64),
        "attack_a_loss_64": attack.get(64),
    }
    if world is None:
        return Row(task, seed, method, figures)
    owner, base = world["owner"], world["base"]
    whole, start = owner["a"]["loss"], base["a"]["loss"]
    figures |= _utility(final, owner, results.get((task, seed, "fedavg")))
    left = share(start, final["a"]["loss"], whole)
    figures["a_left"] = left
    figures["a_lost"] = None if left is None else (1.0 - left) / TENTH
    if final["a"]["accuracy"] is not None:
        figures["a_lost"] = (owner["a"]["accuracy"] - final["a"]["accuracy"]) / POINT
    # he may leave the proxies alone
    recovered = {n: share(start, min(loss, floor.get(n, loss)), whole) for n, loss in attack.items()}
    added = {n: share(floor[n], loss, whole) for n, loss in attack.items() if n in floor}
    return Row(task, seed, method, figures, recovered, added)


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _utility(
    final: Mapping[str, Any], owner: Mapping[str, Any], fedavg: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """Share of FedAvg's gain on B, and points of B before or behind FedAvg."""
    found: dict[str, float | None] = {"gain": None, "gain_points": None}
    if fedavg is not None:
        found["gain"] = share(owner["b"]["loss"], final["b"]["loss"], fedavg["final"]["b"]["loss"])
        if final["b"]["accuracy"] is not None:
            found["gain_points"] = final["b"]["accuracy"] - fedavg["final"]["b"]["accuracy"]
    return found


def share(start: float, reached: float, whole: float) -> float | None:
    """(start - reached) / (start - whole); None where the whole is no better than the start."""
    return (start - reached) / (start - whole) if start > whole else None


def ended(
    results: Results, task: str, method: str, endings: str, by: str
) -> list[tuple[float, Spread | None, Spread | None]]:
    """Other endings of a job, over all seeds: λ or w, share of FedAvg's gain on B, share of A's secret gain left.

    Args:
        endings: blends or consolidated. by: blend or weight.
    """
    found: dict[float, list[tuple[float | None, float | None]]] = {}
    for (name, seed, made), result in results.items():
        world, fedavg = (results.get((task, seed, other)) for other in ("world", "fedavg"))
        if (name, made) != (task, method) or world is None or fedavg is None:
            continue
        owner, base = world["owner"], world["base"]
        for one in result[endings]:
            gain = share(owner["b"]["loss"], one["b"]["loss"], fedavg["final"]["b"]["loss"])
            left = share(base["a"]["loss"], one["a"]["loss"], owner["a"]["loss"])
            found.setdefault(one[by], []).append((gain, left))
    return [
        (end, Spread.of(gain for gain, _ in pairs), Spread.of(left for _, left in pairs))
        for end, pairs in sorted(found.items())
    ]


def spread(found: Sequence[Row], task: str, method: str, figure: str) -> Spread | None:
    """A figure of a method over all seeds."""
    return Spread.of(row.figures.get(figure) for row in found if (row.task, row.method) == (task, method))


def spread_at(found: Sequence[Row], task: str, method: str, n: int, *, added: bool) -> Spread | None:
    """ρ' or ρ after n public examples, over all seeds."""
    mine = [row for row in found if (row.task, row.method) == (task, method)]
    return Spread.of((row.added if added else row.recovered).get(n) for row in mine)


def keeps_a(found: Sequence[Row], task: str, method: str) -> bool:
    """Is the owner's skill where it was, at the median: within a point, or within a tenth of the secret gain?"""
    lost = spread(found, task, method, "a_lost")
    return lost is not None and lost.middle <= 1.0 + 1e-9
