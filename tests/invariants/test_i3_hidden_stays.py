"""I3, hidden stays: merge leaves hidden units, and units that nobody saw, bit-equal. I11 guards the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import mask, merge
from support.helpers import hidden_elements, make_model, noise, read_file, read_model, send, visible_elements
from support.scenario import KINDS, Place, World, few, placed, worlds


def seen_by(proxies: list[Path]) -> dict[str, np.ndarray]:
    """Elements of masked tensors that at least one proxy shows."""
    shown = [visible_elements(proxy) for proxy in proxies]
    return {name: np.logical_or.reduce([proxy[name] for proxy in shown]) for name in shown[0]}


def check_unseen(before: Path, after: Path, seen: dict[str, np.ndarray]) -> None:
    """Unseen elements keep their bits; seen ones of an fp32 model moved."""
    old, new = read_model(before), read_model(after)
    assert old.keys() == new.keys()
    for name, flags in seen.items():
        was, now = old[name][1].reshape(flags.shape), new[name][1].reshape(flags.shape)
        np.testing.assert_array_equal(was[~flags], now[~flags])
        if old[name][0] == "F32":
            assert np.count_nonzero(was[flags] != now[flags]) > 0.9 * flags.sum()


@few(40)
@given(worlds(), st.sampled_from(KINDS), st.sampled_from(["coverage", "clients"]))
def test_i3_hidden_and_unseen_units_keep_their_bits(world: World, kind: str, normalize: str) -> None:
    with placed(replace(world, p1=max(world.p1, 0.1))) as place:
        proxies = place.export(place.model, "proxies")
        updates = [send(proxies / name, place.root / f"u-{name}", noise(len(name), 0.02)) for name in ("ann", "bob")]
        changed = place.rewritten("changed", kind)
        merge(
            str(changed),
            updates,
            place.root / "next",
            key=place.key,
            ledger=place.root / "ledger.jsonl",
            normalize=normalize,
        )
        seen = seen_by([proxies / "ann", proxies / "bob"])
        hidden = hidden_elements(place.model, place.key)
        assert not any((flags & hidden[name].reshape(flags.shape)).any() for name, flags in seen.items())
        check_unseen(changed, place.root / "next", seen)


@few(10)
@given(worlds(p1=0.3, p2=0.5))
def test_i3_a_server_model_keeps_its_holes(world: World) -> None:
    with placed(world) as place:
        server = place.server(place.model, "server")
        proxies = place.export(server, "proxies")
        updates = [send(proxies / name, place.root / f"u-{name}", noise(len(name), 0.02)) for name in ("ann", "bob")]
        merge(str(server), updates, place.root / "next", key=place.key, ledger=place.root / "ledger.jsonl")
        check_unseen(server, place.root / "next", seen_by([proxies / "ann", proxies / "bob"]))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_i3_residuals_of_hidden_and_unseen_units_stay_zero(dtype: str, folder: Path) -> None:
    place = Place(World("gpt2", dtype, 33, 51, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.5), folder)
    model = make_model(place.model, "gpt2", dtype=dtype, hidden=33, inner=51)
    for number in (1, 2):
        proxies = place.export(model, f"proxies-{number}", clients=("ann",), schedule="sticky", round=number)
        update = send(proxies / "ann", folder / f"u-{number}", noise(number, 0.02))
        merge(str(model), [update], folder / f"next-{number}", key=place.key, ledger=folder / "ledger.jsonl")
        model = folder / f"next-{number}"
    residual = read_file(model / "fedqsn-residual.safetensors")
    for name, flags in visible_elements(proxies / "ann").items():
        bits = residual[name][1].reshape(flags.shape)
        assert not bits[~flags].any()
        assert bits[flags].any()


def test_i3_the_server_models_own_bits_are_those_of_the_global_model(folder: Path) -> None:
    model = make_model(folder / "model", "bert", dtype="F16", hidden=33)
    mask(str(model), folder / "server", key=folder / "key", p1=0.5)
    hidden = hidden_elements(model, folder / "key")
    before, after = read_model(model), read_model(folder / "server")
    for name, (_, bits) in before.items():
        np.testing.assert_array_equal(bits[~hidden[name]], after[name][1][~hidden[name]])
