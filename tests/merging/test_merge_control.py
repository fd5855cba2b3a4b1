"""merge --control against a few lines of numpy; hidden stays, determinism and zero updates with a control; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import merge
from fedqsn_cli.errors import InputError, RefusedUpdate
from invariants.test_i3_hidden_stays import seen_by
from invariants.test_i4_determinism import chunks_of, threads_of
from merging.test_merge import fedavg, whole_update
from support.helpers import (
    contents,
    draft,
    hidden_elements,
    make_model,
    noise,
    nothing_written,
    read_model,
    send,
    to_floats,
)
from support.scenario import KINDS, Place, World, few, placed, worlds

USUAL = World("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.4)
EXAMPLES = [7, 30]


def play(place: Place, source: Path | None = None, **options: Any) -> tuple[list[Path], list[Any], Path, Any]:
    """Two clients' updates, and a control that the owner trained on a proxy without a client mask."""
    source = source or place.model
    released = place.export(source, "proxies", clients=("c0", "c1"))
    proxies = [released / "c0", released / "c1"]
    proxies.append(place.export(source, "own", clients=("own",), p2=0.0) / "own")
    sizes = enumerate([*EXAMPLES, 999])
    drafts = [draft(proxy, noise(i), examples=n, **options) for proxy, (i, n) in zip(proxies, sizes, strict=True)]
    folders = [each.write(place.root / f"u{i}") for i, each in enumerate(drafts)]
    parts = [whole_update(proxy, each) for proxy, each in zip(proxies, drafts, strict=True)]
    return folders[:2], parts[:2], folders[2], parts[2]


def job(place: Place) -> dict[str, Any]:
    return {"key": place.key, "ledger": place.root / "ledger.jsonl"}


@few(25)
@given(
    worlds(),
    st.sampled_from(["coverage", "clients"]),
    st.sampled_from([1.0, 0.25]),
    st.sampled_from([1.0, 2.0]),
    st.sampled_from(["fp32", "bf16"]),
)
def test_a_control_is_taken_off_where_it_and_a_client_saw_the_unit(
    world: World, normalize: str, weight: float, rate: float, precision: str
) -> None:
    with placed(world) as place:
        updates, parts, control, own = play(place, precision=precision)
        merge(
            str(place.model),
            updates,
            place.root / "next",
            **job(place),
            normalize=normalize,
            server_lr=rate,
            control=control,
            control_weight=weight,
        )
        before, after = read_model(place.model), read_model(place.root / "next")
        for name, (u, seen, s) in own.items():
            dtype, bits = before[name]
            old = to_floats(bits, dtype).astype(np.float64).reshape(-1)
            shown = [part[name][1].reshape(-1) for part in parts]
            mean = fedavg(np.zeros(old.size), [part[name] for part in parts], EXAMPLES, normalize, 1.0)
            anyone = shown[0] | shown[1]
            share = (shown[0] * EXAMPLES[0] + shown[1] * EXAMPLES[1]) / sum(EXAMPLES)
            drift = weight * (u * seen).reshape(-1) / s * (share if normalize == "clients" else anyone)
            wanted = old + rate * (mean - drift)
            result = to_floats(after[name][1], dtype).reshape(-1)
            digits = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}[dtype]
            assert (np.abs(result - wanted) <= np.abs(wanted) * digits + 1e-6).all()
            np.testing.assert_array_equal(after[name][1].reshape(-1)[~anyone], bits.reshape(-1)[~anyone])
            if dtype == "F32" and name != "bert.embeddings.position_ids":
                assert np.count_nonzero(result[anyone] != old[anyone]) > 0.9 * np.count_nonzero(anyone)


@few(15)
@given(worlds(), st.sampled_from(KINDS))
def test_i3_hidden_and_unseen_units_keep_their_bits_with_a_control(world: World, kind: str) -> None:
    with placed(replace(world, p1=max(world.p1, 0.1), p2=max(world.p2, 0.3))) as place:
        updates, _, control, _ = play(place)
        changed = place.rewritten("changed", kind)
        merge(str(changed), updates, place.root / "next", **job(place), control=control)
        seen = seen_by([place.root / "proxies/c0", place.root / "proxies/c1"])
        hidden = hidden_elements(place.model, place.key)
        old, new = read_model(changed), read_model(place.root / "next")
        for name, flags in seen.items():
            assert not (flags & hidden[name].reshape(flags.shape)).any()
            was, now = old[name][1].reshape(flags.shape), new[name][1].reshape(flags.shape)
            np.testing.assert_array_equal(was[~flags], now[~flags])


@few(10)
@given(worlds(p1=0.3, p2=0.3, shards=1), st.sampled_from(["coverage", "clients"]))
def test_i4_order_chunks_and_threads_change_no_byte_with_a_control(world: World, normalize: str) -> None:
    with placed(world) as place:
        updates, _, control, _ = play(place)
        how = job(place) | {"normalize": normalize, "control": control, "control_weight": 0.7}
        merge(str(place.model), updates, place.root / "next", **how)
        with chunks_of(300), threads_of(2):
            merge(str(place.model), updates[::-1], place.root / "again", **how)
        assert contents(place.root / "next") == contents(place.root / "again")


@few(10)
@given(worlds(), st.sampled_from(["coverage", "clients"]))
def test_i8_a_control_of_zeros_changes_no_byte(world: World, normalize: str) -> None:
    with placed(world) as place:
        updates, _, _, _ = play(place)
        nothing = send(place.root / "own/own", place.root / "nothing", examples=50)
        merge(str(place.model), updates, place.root / "next", **job(place), normalize=normalize)
        merge(str(place.model), updates, place.root / "same", **job(place), normalize=normalize, control=nothing)
        assert contents(place.root / "next") == contents(place.root / "same")


@few(6)
@given(worlds(p2=0.0, shards=1))
def test_i8_clients_that_learnt_what_the_control_learnt_change_nothing(world: World) -> None:
    """One mask for all, so that equal updates are equal steps."""
    with placed(replace(world, dtype="F32")) as place:
        proxies = [place.export(place.model, f"p-{name}", clients=(name,)) / name for name in ("ann", "own")]
        updates = [send(proxy, place.root / f"u{i}", noise(1), examples=4) for i, proxy in enumerate(proxies)]
        merge(str(place.model), updates[:1], place.root / "next", **job(place), control=updates[1])
        before, after = read_model(place.model), read_model(place.root / "next")
        assert all(np.array_equal(before[name][1], after[name][1]) for name in before)


@pytest.fixture
def place(folder: Path) -> Place:
    make_model(folder / "model", "bert", hidden=33)
    place = Place(USUAL, folder)
    play(place)
    return place


def merged(place: Place, *updates: str, **options: Any) -> Any:
    folders = [place.root / name for name in updates]
    return merge(str(place.model), folders, place.root / "next", **job(place) | options)


def test_the_result_has_the_control_apart_from_the_clients(place: Place) -> None:
    result = merged(place, "u0", "u1", control=place.root / "u2")
    assert [client.client for client in result.clients] == ["c0", "c1"]
    assert (result.control.client, result.control.share, result.control.num_examples) == ("own", 0.0, 999)
    assert result.num_examples == sum(EXAMPLES)
    alone = merge(str(place.model), [place.root / "u0", place.root / "u1"], place.root / "plain", **job(place))
    assert (alone.control, alone.covered, alone.clients) == (None, result.covered, result.clients)


def test_a_control_works_on_the_server_model_too(place: Place) -> None:
    server = place.server(place.model, "server")
    options = {"control": place.root / "u2"}
    updates = [place.root / "u0", place.root / "u1"]
    merge(str(place.model), updates, place.root / "n-model", **job(place), **options)
    merge(str(server), updates, place.root / "n-server", **job(place), **options)
    assert contents(place.export(place.root / "n-model", "r2", round=2)) == contents(
        place.export(place.root / "n-server", "again", round=2)
    )


def test_i11_a_control_that_does_not_belong_is_refused(place: Place) -> None:
    other = make_model(place.root / "other", "bert", hidden=33, seed=4)
    foreign = send(place.export(other, "p-other", clients=("own",), round=2) / "own", place.root / "foreign", noise(1))
    unknown = draft(place.root / "own/own", noise(1))
    unknown.manifest["proxy_id"] = "0" * 64
    unknown.write(place.root / "unknown")
    late = send(place.export(place.model, "p2", clients=("c1",), round=2) / "c1", place.root / "late", noise(1))
    with nothing_written(place.root):
        with pytest.raises(RefusedUpdate, match="another model"):
            merged(place, "u0", control=foreign)
        with pytest.raises(RefusedUpdate, match="not in the ledger"):
            merged(place, "u0", control=place.root / "unknown")
        for control in (place.root / "u1", late):
            with pytest.raises(RefusedUpdate, match="'c1' sent an update too"):
                merged(place, "u0", "u1", control=control)
        with pytest.raises(InputError, match="no update was given"):
            merged(place, control=place.root / "u2")
        with pytest.raises(InputError, match="--control"):
            merged(place, restore="server", control=place.root / "u2")
        for weight in (0.0, -1.0, 1.5, float("nan")):
            with pytest.raises(InputError, match="--control-weight"):
                merged(place, "u0", control=place.root / "u2", control_weight=weight)
        with pytest.raises(InputError, match="--control-weight"):
            merged(place, "u0", control_weight=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_i11_a_poisoned_control_is_refused(value: float, place: Place) -> None:
    def poison(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, value if name == "classifier.bias" else 0.0, np.float32)

    send(place.root / "own/own", place.root / "poison", poison)
    with nothing_written(place.root), pytest.raises(RefusedUpdate, match="poison"):
        merged(place, "u0", control=place.root / "poison")


def test_i11_a_control_whose_bytes_changed_is_refused(place: Place) -> None:
    path = place.root / "u2/update.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with nothing_written(place.root), pytest.raises(RefusedUpdate, match="sha256"):
        merged(place, "u0", control=place.root / "u2")
