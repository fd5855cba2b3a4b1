"""Which units are hidden: exact counts, disjoint sets, no collisions, and the same answer for all time."""

from __future__ import annotations

import hashlib
import hmac
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqsn_cli import validate
from fedqsn_cli.errors import InputError
from fedqsn_cli.masks import draw, shake256
from fedqsn_cli.masks.draw import (
    SERVER,
    client_scope,
    client_units,
    derive,
    hidden_count,
    hidden_units,
    ranks,
    rescale_factor,
    seed,
)

KEY = bytes(range(32))
GROUP = "model.layers.0.self_attn.q_proj.weight"

keys = st.binary(min_size=32, max_size=32)
ratios = st.floats(0, 1, exclude_max=True)
sizes = st.integers(1, 3000)
fields = st.lists(st.text(max_size=5), max_size=4).map(tuple)


def run(program: str) -> str:
    """What a program prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


# ---------------------------------------------------------------- how many


@given(keys, sizes, ratios, ratios)
def test_counts_are_exact_and_the_sets_are_disjoint(key: bytes, n: int, p1: float, p2: float) -> None:
    hidden = hidden_units(key, GROUP, n, p1)
    client = client_units(key, GROUP, hidden, p2, client_scope("bank", 3))
    assert hidden.shape == client.shape == (n,) and hidden.dtype == client.dtype == np.bool_
    assert hidden.sum() == min(round(p1 * n), n - 1)
    visible = n - hidden.sum()
    assert client.sum() == min(round(p2 * visible), visible - 1)
    assert not (hidden & client).any()
    assert not (hidden | client).all()


@given(keys, ratios)
def test_a_group_of_one_unit_is_never_hidden(key: bytes, ratio: float) -> None:
    hidden = hidden_units(key, GROUP, 1, ratio)
    assert not hidden.any() and not client_units(key, GROUP, hidden, ratio, SERVER).any()


@given(keys, sizes)
def test_a_ratio_of_zero_hides_nothing(key: bytes, n: int) -> None:
    assert not hidden_units(key, GROUP, n, 0.0).any()


@pytest.mark.parametrize(
    ("n", "ratio", "count"), [(10, 0.25, 2), (10, 0.35, 4), (4, 0.999, 3), (0, 0.5, 0), (3, 0.1, 0)]
)
def test_counts_round_half_to_even(n: int, ratio: float, count: int) -> None:
    assert hidden_count(n, ratio) == count


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), float("inf"), -float("inf")])
def test_a_ratio_outside_of_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="is not a ratio"):
        hidden_units(KEY, GROUP, 10, ratio)


def test_the_scale_makes_up_for_the_holes() -> None:
    assert rescale_factor(768, 0, 0) == 1
    assert rescale_factor(768, 192, 192) == 2
    assert rescale_factor(3, 1, 0) == np.float32(1.5) and isinstance(rescale_factor(3, 1, 0), np.float32)


# ---------------------------------------------------------------- which


def test_the_server_mask_is_the_same_for_all_time() -> None:
    assert np.flatnonzero(hidden_units(KEY, GROUP, 32, 0.25)).tolist() == [1, 4, 5, 10, 19, 21, 24, 25]


def test_the_client_mask_is_the_same_for_all_time() -> None:
    hidden = hidden_units(KEY, GROUP, 32, 0.25)
    fresh = client_units(KEY, GROUP, hidden, 0.25, client_scope("bank-1", 1))
    sticky = client_units(KEY, GROUP, hidden, 0.25, client_scope("bank-1", None))
    assert np.flatnonzero(fresh).tolist() == [9, 11, 12, 16, 18, 28]
    assert np.flatnonzero(sticky).tolist() == [3, 6, 14, 26, 29, 31]


def test_ranks_are_the_same_for_all_time() -> None:
    assert seed(KEY, SERVER, GROUP).hex() == "5da144095791e4d014babf5bd230d5473e3b0bd7adaad186943c2b7eb6f3565c"
    assert [f"{rank:016x}" for rank in ranks(KEY, SERVER, GROUP, 4)] == [
        "9ac7c6b30a08f65c",
        "0f3a7012bb01f12a",
        "cc707bfdedd18f03",
        "641ed1d2eec4da13",
    ]


def test_ranks_are_hmac_and_shake_of_length_prefixed_fields() -> None:
    message = b"".join(len(f).to_bytes(8, "big") + f for f in (b"fedqsn/v1", b"client", b"a", b"7", GROUP.encode()))
    stream = hashlib.shake_256(hmac.digest(KEY, message, "sha256")).digest(80)
    expected = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, 80, 8)]
    assert ranks(KEY, client_scope("a", 7), GROUP, 10).tolist() == expected


@given(keys, sizes, ratios)
def test_the_hidden_units_are_those_of_lowest_rank(key: bytes, n: int, p1: float) -> None:
    hidden = hidden_units(key, GROUP, n, p1)
    drawn = ranks(key, SERVER, GROUP, n)
    assert not hidden.any() or drawn[hidden].max() <= drawn[~hidden].min()


@given(keys, sizes, ratios, ratios)
def test_a_higher_ratio_hides_what_a_lower_one_hides_and_more(key: bytes, n: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not (hidden_units(key, GROUP, n, low) & ~hidden_units(key, GROUP, n, high)).any()


def test_ties_go_to_the_lowest_index() -> None:
    drawn = np.array([5, 1, 3, 3, 3, 9], np.uint64)
    assert np.flatnonzero(draw._lowest(drawn, 3)).tolist() == [1, 2, 3]


# ---------------------------------------------------------------- separation


@given(keys, fields, fields)
def test_no_two_lists_of_fields_collide(key: bytes, one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (derive(key, one) == derive(key, other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("a",)),
        (("client", "a", "1"), ("client", "a1")),
        (("client", "a", "1", "g"), ("client", "a", "1g")),
        (("",), ()),
    ],
)
def test_fields_that_read_the_same_when_joined_do_not_collide(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert derive(KEY, one) != derive(KEY, other)


def test_every_scope_group_and_key_gives_another_mask() -> None:
    scopes = [SERVER, client_scope("a", 1), client_scope("a", 2), client_scope("a", 11), client_scope("a1", 1)]
    scopes += [
        client_scope("a", None),
        client_scope("a1", None),
        client_scope("server", None),
        client_scope("client", 1),
    ]
    drawn = {
        ranks(key, scope, group, 4).tobytes()
        for key in (KEY, KEY[::-1])
        for scope in scopes
        for group in ("g", "h", "")
    }
    assert len(drawn) == 2 * len(scopes) * 3


@given(keys, st.integers(0, 2**40))
def test_a_fresh_mask_changes_with_the_round_and_a_sticky_one_does_not(key: bytes, number: int) -> None:
    hidden = hidden_units(key, GROUP, 256, 0.25)
    fresh = [client_units(key, GROUP, hidden, 0.5, client_scope("a", number + step)) for step in (0, 1)]
    assert (fresh[0] != fresh[1]).any()
    assert client_scope("a", None) == client_scope("a", None)


@given(keys, st.integers(0, 255))
def test_every_bit_of_the_key_counts(key: bytes, bit: int) -> None:
    flipped = (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")
    assert (ranks(key, SERVER, GROUP, 4) != ranks(flipped, SERVER, GROUP, 4)).all()


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_a_bug(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        derive(bytes(length), ("a",))


# ---------------------------------------------------------------- uniformity


def test_every_unit_is_hidden_equally_often() -> None:
    """Chi-square over 64 units and 2,000 keys: 63 degrees of freedom, so above 130 about once in a million."""
    draws = sum(hidden_units(index.to_bytes(32, "big"), GROUP, 64, 0.25).astype(int) for index in range(2000))
    expected = 2000 * 16 / 64
    assert ((draws - expected) ** 2 / (expected * 0.75)).sum() < 130


def test_the_client_mask_does_not_lean_on_the_server_mask() -> None:
    """Neighbours of hidden units are hidden from the client no more often than others."""
    near = far = near_hidden = far_hidden = 0
    for index in range(500):
        key = index.to_bytes(32, "big")
        hidden = hidden_units(key, GROUP, 128, 0.25)
        client = client_units(key, GROUP, hidden, 0.5, client_scope("a", 1))
        beside = np.roll(hidden, 1) & ~hidden
        apart = ~np.roll(hidden, 1) & ~hidden
        near, near_hidden = near + int(beside.sum()), near_hidden + int(client[beside].sum())
        far, far_hidden = far + int(apart.sum()), far_hidden + int(client[apart].sum())
    assert abs(near_hidden / near - far_hidden / far) < 0.025


def test_pairs_of_units_are_independent() -> None:
    pairs = Counter[tuple[bool, bool]]()
    for index in range(200):
        pairs.update(pairwise(hidden_units(index.to_bytes(32, "big"), GROUP, 512, 0.5).tolist()))
    total = sum(pairs.values())
    assert all(abs(count / total - 0.25) < 0.01 for count in pairs.values()) and len(pairs) == 4


# ---------------------------------------------------------------- large groups


@settings(deadline=None)
@given(keys, st.integers(1, 400), ratios)
def test_the_stream_chooses_what_sorting_would(key: bytes, n: int, ratio: float) -> None:
    allowed = hidden_units(key, "allowed", n, 0.5) | (
        ranks(key, SERVER, "one", n) == ranks(key, SERVER, "one", n).min()
    )
    count = 1 + int(ratio * (int(allowed.sum()) - 1))
    drawn = np.where(allowed, ranks(key, SERVER, GROUP, n).astype(object), 2**64)
    expected = np.zeros(n, np.bool_)
    expected[np.argsort(drawn, kind="stable")[:count]] = True
    chosen = shake256.lowest_ranks(seed(key, SERVER, GROUP), allowed, count)
    assert chosen is not None and (chosen[0] == expected).all()
    stream, run = shake256.RankStream(seed(key, SERVER, GROUP)), 1 + n // 3
    again = [stream.chosen(min(run, n - at), chosen[1]) for at in range(0, n, run)]
    assert (np.concatenate(again) & allowed == expected).all()


@given(keys, st.integers(1, 400), ratios, ratios)
def test_a_clients_units_come_in_order_as_they_are_drawn_at_once(key: bytes, n: int, p1: float, p2: float) -> None:
    hidden, scope = hidden_units(key, GROUP, n, p1), client_scope("a", 1)
    units, run = draw.ClientUnitsInOrder(key, GROUP, hidden, p2, scope), 1 + n // 3
    parts = [units.take(min(run, n - at)) for at in range(0, n, run)]
    assert (np.concatenate(parts) == client_units(key, GROUP, hidden, p2, scope)).all()


def test_units_in_order_of_many_clients_take_no_memory_of_their_own() -> None:
    hidden = hidden_units(KEY, GROUP, 2**18, 0.1)
    tracemalloc.start()
    held = [draw.ClientUnitsInOrder(KEY, GROUP, hidden, 0.2, client_scope(f"c{k}", 1)) for k in range(8)]
    flags = [units.take(1000) for units in held]
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(each.any() for each in flags)
    assert current < hidden.nbytes / 4


def test_units_of_large_groups_are_those_of_lowest_rank() -> None:
    n, scope = draw.STREAM_FROM, client_scope("a", 1)
    server, client = ranks(KEY, SERVER, GROUP, n), ranks(KEY, scope, GROUP, n)
    hidden = hidden_units(KEY, GROUP, n, 0.3)
    assert hidden.sum() == round(0.3 * n) and server[hidden].max() < server[~hidden].min()
    more = client_units(KEY, GROUP, hidden, 0.1, scope)
    shown = ~hidden & ~more
    assert more.sum() == round(0.1 * (n - hidden.sum())) and not (more & hidden).any()
    assert client[more].max() < client[shown].min()


def test_a_missed_window_is_noticed() -> None:
    allowed = np.ones(1000, np.bool_)
    assert shake256.lowest_ranks(KEY, allowed, 500, window=(0.0, 0.0)) is None


def test_a_seed_that_does_not_fit_one_block_is_a_bug() -> None:
    with pytest.raises(ValueError, match="one block"):
        shake256.initial_state(bytes(136))


def test_the_masks_of_many_single_weights_take_little_memory() -> None:
    """16 million units: 128 MiB of ranks would lie in memory if they were drawn at once."""
    program = """
from fedqsn_cli.masks.draw import hidden_units
def peak():  # not ru_maxrss: that one counts the process which started this one, too
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
hidden_units(bytes(32), "warm", 2**20, 0.5)
before = peak()
assert hidden_units(bytes(32), "g", 2**24, 0.5).sum() == 2**23
print(peak() - before)
"""
    done = run(program)
    assert int(done) < 64


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("client", ["a", "Bank-1", "hospital_3.north", "0", "x" * 64])
def test_good_client_ids(client: str) -> None:
    assert validate.client(client) == client


@pytest.mark.parametrize("client", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "ä", "x" * 65, "a\x00", "../a"])
def test_bad_client_ids_are_refused(client: str) -> None:
    with pytest.raises(InputError, match="not a client id"):
        client_scope(client, 1)


def test_a_negative_round_is_refused() -> None:
    with pytest.raises(InputError, match="negative"):
        client_scope("a", -1)


def test_drawing_a_mask_loads_neither_torch_nor_numba() -> None:
    program = """
import sys
from fedqsn_cli.masks.draw import hidden_units
hidden_units(bytes(32), "g", 1000, 0.5)
assert not {"torch", "numba", "transformers"} & set(sys.modules)
"""
    run(program)
