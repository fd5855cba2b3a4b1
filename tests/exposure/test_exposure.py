"""Exposure from ledger and key alone: exact where it can be, and honest where it is estimated."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.exposure.coalitions import worst_coalitions
from fedqsn_cli.exposure.exposure import MOST_BYTES, MOST_RANKS, exposure
from fedqsn_cli.exposure.history import History, sampled
from fedqsn_cli.exposure.replay import replay
from fedqsn_cli.masks.draw import client_scope, client_units, hidden_units
from fedqsn_cli.masks.job_key import JobKey
from support.audits import KEY, job
from support.ledgers import Line
from support.passes import threads_of
from support.scenario import few

SMALL = JobKey(
    KEY, 0.25, "neuron", "0" * 64, {}, {"a.weight": (40, 4000), "b.weight": (17, 340), "c#0": (130, 1300)}, 100
)


def by_hand(model: JobKey, lines: list[Line]) -> tuple[dict[str, list[float]], dict[str, dict[str, np.ndarray]]]:
    """Shares after each release, and the units seen in the end, with the masks of the exporting commands."""
    total = model.clear + sum(size for _, size in model.groups.values())
    seen: dict[str, dict[str, np.ndarray]] = {}
    shares: dict[str, list[float]] = {}
    for line in lines:
        mine = seen.setdefault(line.client, {name: np.zeros(n, bool) for name, (n, _) in model.groups.items()})
        for name, (n, _) in model.groups.items():
            hidden = hidden_units(model.key, name, n, model.p1)
            scope = client_scope(line.client, None if line.schedule == "sticky" else line.round)
            mine[name] |= ~(hidden | client_units(model.key, name, hidden, line.p2, scope))
        size = sum(mine[name].sum() * size / n for name, (n, size) in model.groups.items())
        shares.setdefault(line.client, []).append((model.clear + size) / total)
    return shares, seen


@st.composite
def histories(draw: st.DrawFn) -> list[Line]:
    lines = st.builds(
        Line,
        st.sampled_from(["ann", "bob", "eve"]),
        st.integers(0, 3),
        st.sampled_from(["fresh", "sticky"]),
        st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    )
    return draw(st.lists(lines, min_size=1, max_size=12))


@few(60)
@given(histories(), st.sampled_from([0.0, 0.25, 0.9]))
def test_every_share_is_that_of_the_masks_themselves(lines: list[Line], p1: float) -> None:
    model = replace(SMALL, p1=p1)
    shares, _ = by_hand(model, lines)
    found = exposure(model, lines)
    assert found.looked_at == 1.0
    assert {client.client: pytest.approx(client.shares) for client in found.clients} == shares
    assert {client.client: len(client.rounds) for client in found.clients} == {k: len(v) for k, v in shares.items()}


@few(20)
@given(histories())
def test_a_coalition_has_seen_what_its_members_have_together(lines: list[Line]) -> None:
    _, seen = by_hand(SMALL, lines)
    total = SMALL.clear + sum(size for _, size in SMALL.groups.values())
    for coalition in exposure(SMALL, lines).coalitions:
        unions = [
            SMALL.clear
            + sum(
                np.any([seen[name][group] for name in members], axis=0).sum() * size / n
                for group, (n, size) in SMALL.groups.items()
            )
            for members in itertools.combinations(seen, coalition.size)
        ]
        assert coalition.share == pytest.approx(max(unions) / total)
        assert (coalition.method, coalition.at_most) == ("exact", coalition.share)


def test_the_heat_map_tells_how_much_of_each_module_a_client_has_seen() -> None:
    lines = [Line("ann", 1, "fresh", 0.5), Line("bob", 1, "fresh", 0.0)]
    _, seen = by_hand(SMALL, lines)
    expected = {(c, g.split("#")[0].removesuffix(".weight")): seen[c][g].mean() for c in seen for g in SMALL.groups}
    assert {(c, m): share for c, m, share in exposure(SMALL, lines).heat_map} == pytest.approx(expected)


def test_sticky_masks_show_nothing_new_and_fresh_ones_end_at_what_the_server_leaves() -> None:
    sticky = exposure(SMALL, [Line("ann", r, "sticky", 0.5) for r in range(30)])
    fresh = exposure(SMALL, [Line("ann", r, "fresh", 0.5) for r in range(30)])
    assert len(set(sticky.clients[0].shares)) == 1
    assert fresh.clients[0].shares[-1] == pytest.approx(1 - fresh.hidden_share)


def test_the_formula_of_the_documentation_is_met_on_average() -> None:
    model = job(layers=2)
    found = exposure(model, [Line(f"c{c}", r, "fresh", 0.3) for c in range(40) for r in range(3)])
    for proxies in (1, 2, 3):
        masked = np.mean([client.shares[proxies - 1] for client in found.clients])
        assert masked == pytest.approx((1 - 0.1) * (1 - 0.3**proxies), abs=4e-3)
        assert found.analytic[proxies - 1] == pytest.approx(masked, abs=4e-3)
    assert found.proxies_to_99 == 4  # 0.3^4 < 0.01 < 0.3^3


@pytest.mark.parametrize(("p2", "count"), [(0.0, 1), (0.02, 2), (0.1, 3), (0.5, 7), (0.9, 44)])
def test_proxies_until_99_percent_of_what_is_sent(p2: float, count: int) -> None:
    assert exposure(job(), [Line("ann", 1, "fresh", p2)]).proxies_to_99 == count


def test_shares_of_hidden_and_clear_parameters_are_exact() -> None:
    found = exposure(SMALL, [])
    total = 100 + 4000 + 340 + 1300
    hidden = 4000 * 10 / 40 + 340 * 4 / 17 + 1300 * 32 / 130
    assert (found.clear_share, found.hidden_share) == (pytest.approx(100 / total), pytest.approx(hidden / total))
    assert (found.clients, found.coalitions, found.proxies_to_99) == ((), (), None)


def test_too_many_units_are_estimated_from_some_and_the_share_is_told() -> None:
    model = job(layers=4)
    lines = [Line(f"c{c}", r, "fresh", 0.5) for c in range(20) for r in range(3)]
    whole = exposure(model, lines)
    for most in (300_000, 20_000):
        some = exposure(model, lines, most_ranks=most)
        assert 0 < some.looked_at < 1
        assert some == exposure(model, lines, most_ranks=most)
        mean = np.mean([c.shares[-1] for c in some.clients])
        assert mean == pytest.approx(np.mean([c.shares[-1] for c in whole.clients]), abs=0.03)


def test_a_group_with_more_units_than_fit_is_looked_at_in_part() -> None:
    model = JobKey(KEY, 0.2, "element", "0" * 64, {}, {"w": (300_000, 300_000)}, 0)
    lines = [Line(f"c{c}", r, "fresh", 0.4) for c in range(5) for r in range(2)]
    whole = exposure(model, lines)
    some = exposure(model, lines, most_bytes=100_000)
    assert some.looked_at == pytest.approx(20_000 / 300_000)
    assert some.clients[0].shares == pytest.approx(whole.clients[0].shares, abs=0.02)


def test_the_number_of_threads_changes_nothing() -> None:
    lines = [Line(f"c{c}", r, "fresh", 0.5) for c in range(19) for r in range(4)]
    found = []
    for count in (1, 3):
        with threads_of(count):
            found.append(exposure(job(layers=1), lines))
    assert found[0] == found[1]


def test_of_a_thousand_clients_and_a_hundred_rounds_few_masks_are_drawn_and_none_is_left_out() -> None:
    """Whoever has seen everything needs no more draws. Seconds are measured by `make bench ARGS="--only exposure"`."""
    lines = [Line(f"c{c}", r, "fresh", 0.1) for r in range(100) for c in range(1000)]
    found = exposure(job(), lines)
    assert (found.looked_at, len(found.clients), len(found.clients[0].shares)) == (1.0, 1000, 100)
    history = History.of(lines)
    units = sum(count for count, _ in job().groups.values())
    drawn = replay(job(), history, sampled(job(), history, MOST_RANKS, MOST_BYTES)).ranks
    assert 2 * 1000 * units < drawn < 4 * 1000 * units  # of 100 rounds


# ------------------------------------------------------------------------------------------------ coalitions


def covers(clients: int, words: int, seed: int, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    flags = rng.random((clients, words * 64)) < share
    return np.packbits(flags, axis=1).view(np.uint64), rng.random(words)


@few(25)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.02, 0.2, 0.9]))
def test_the_bound_holds_and_what_is_called_exact_is(clients: int, words: int, seed: int, share: float) -> None:
    bits, weights = covers(clients, words, seed, share)
    ones = np.array([[weights[w] * bin(int(bits[c, w])).count("1") for w in range(words)] for c in range(clients)])
    assert worst_coalitions(["x"] * clients, bits, weights, 0.0, [clients])[0].share <= ones.sum() + 1e-9
    for size in range(2, clients + 1):
        best = max(
            sum(weights[w] * bin(int(np.bitwise_or.reduce(bits[list(rows), w]))).count("1") for w in range(words))
            for rows in itertools.combinations(range(clients), size)
        )
        (found,) = worst_coalitions([str(c) for c in range(clients)], bits, weights, 0.0, [size])
        assert found.share == pytest.approx(best)
        assert found.at_most >= best - 1e-9


def test_many_coalitions_are_searched_greedily_with_a_bound_and_the_number_tried() -> None:
    bits, weights = covers(30, 4, 3)
    (found,) = worst_coalitions([str(c) for c in range(30)], bits, weights, 0.0, [4], most_tried=10)
    assert found.method in {"greedy", "sampled"}
    assert found.tried > 100
    assert found.share < found.at_most < 1.6 * found.share
    (exact,) = worst_coalitions([str(c) for c in range(30)], bits, weights, 0.0, [4])
    assert exact.method == "exact"
    assert found.share <= exact.share <= found.at_most


def test_exposure_needs_no_training_library() -> None:
    import subprocess
    import sys

    from support.processes import environment

    script = "import sys, fedqsn_cli.exposure.budget; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
