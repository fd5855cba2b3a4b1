"""I2, one code: two clients of one round have equal codes and scales wherever both see a unit, up to the factor s.

Stronger than that, every proxy is compared with Q(X) itself, the proxy of a client from whom nothing is hidden: what a
client sees of a tensor is Q(X) times s, rounded once.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.helpers import Tensors, read_model, to_bits, to_floats, visible_elements
from support.scenario import Scenario, few, job_folder, scenarios

Array = NDArray[Any]


def nibbles(packed: Array, count: int) -> Array:
    """4-bit codes, one a byte."""
    flat = packed.reshape(-1)
    return np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)[:count]


def is_turned(name: str) -> bool:
    """Is the weight a Conv1D, which bitsandbytes holds as [out, in]?"""
    return any(name.endswith(f".{module}.weight") for module in ("c_attn", "c_proj", "c_fc"))


def check_packed4(name: str, proxy: Tensors, whole: Tensors, shown: Array, s: np.float32, block: int) -> None:
    count = shown.size
    codes, reference = (nibbles(model[name][1], count) for model in (proxy, whole))
    np.testing.assert_array_equal(codes[shown], reference[shown])
    edges = np.arange(0, count, block)
    seen = np.logical_or.reduceat(shown, edges)
    scales, wanted = (model[f"{name}.absmax"][1] for model in (proxy, whole))
    if f"{name}.nested_absmax" not in whole:
        np.testing.assert_array_equal(scales.view(np.float32)[seen], wanted.view(np.float32)[seen] * s)
        return
    np.testing.assert_array_equal(scales[seen], wanted[seen])
    nested = (model[f"{name}.nested_absmax"][1].view(np.float32) for model in (proxy, whole))
    np.testing.assert_array_equal(next(nested), next(nested) * s)
    state = [next(k for k in model if k.startswith(f"{name}.quant_state")) for model in (proxy, whole)]
    texts = [model[k][1].tobytes() for model, k in zip((proxy, whole), state, strict=True)]
    offsets = [json.loads(text)["nested_offset"] for text in texts]
    assert offsets[0] == float(np.float32(offsets[1]) * s)


def check_tensor(name: str, proxy: Tensors, whole: Tensors, shown: Array, s: np.float32, block: int) -> None:
    """What the client sees of one tensor is Q(X) times s."""
    dtype, bits = proxy[name]
    if dtype == "U8":
        turned = shown[0].T if is_turned(name) else shown[0]
        check_packed4(name, proxy, whole, turned.reshape(-1), s, block)
    elif dtype == "I8":
        flags = shown[0].T if is_turned(name) else shown[0]
        np.testing.assert_array_equal(bits[flags], whole[name][1][flags])
        rows = flags.any(axis=1)
        scales, wanted = (model[name.removesuffix("weight") + "SCB"][1].view(np.float32) for model in (proxy, whole))
        np.testing.assert_array_equal(scales[rows], wanted[rows] * s)
    else:
        flags = shown.reshape(bits.shape)
        expected = to_bits(to_floats(whole[name][1], dtype) * s, dtype) if s != 1 else whole[name][1]
        np.testing.assert_array_equal(bits[flags], expected[flags])


def check_proxy(proxy: Path, whole: Path, block: int) -> None:
    """Every tensor of a proxy against the proxy that shows everything."""
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    tensors, reference, shown = read_model(proxy), read_model(whole), visible_elements(proxy)
    for name, flags in shown.items():
        units = manifest["groups"][manifest["tensors"][name]["groups"][0]]["units"]
        s = np.float32(1)
        if manifest["rescale"]:
            s = np.float32(units / (units * int(flags[0].sum()) // flags[0].size))
        check_tensor(name, tensors, reference, flags, s, block)
    companions = {name for name in tensors if any(name.startswith(owner.removesuffix("weight")) for owner in shown)}
    for name in tensors.keys() - shown.keys() - companions:
        np.testing.assert_array_equal(tensors[name][1], reference[name][1])


@few(60)
@given(scenarios(), st.sampled_from([0.1, 0.5, 0.9]))
def test_i2_every_proxy_is_selected_from_the_same_codes_and_scales(scenario: Scenario, p2: float) -> None:
    with job_folder(replace(scenario, p2=p2)) as job:
        whole = job.export(job.model, "whole", clients=("owner",), p2=0.0, rescale=False) / "owner"
        proxies = job.export(job.model, "proxies")
        for client in ("ann", "bob"):
            check_proxy(proxies / client, whole, scenario.block_size)


@few(10)
@given(scenarios(p1=0.3, p2=0.3))
def test_i2_clients_of_one_round_with_different_ratios_share_codes_too(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        whole = job.export(job.model, "whole", clients=("owner",), p2=0.0, rescale=False) / "owner"
        for p2 in (0.05, 0.6):
            proxies = job.export(job.model, f"proxies-{p2}", clients=("ann",), p2=p2, round=2)
            check_proxy(proxies / "ann", whole, scenario.block_size)


@few(12)
@given(scenarios(p1=0.1, p2=0.5))
def test_i2_clients_see_different_units_and_one_client_different_ones_each_round(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        first = job.export(job.model, "first")
        second = job.export(job.model, "second", clients=("ann",), round=2)
        shown = [visible_elements(path) for path in (first / "ann", first / "bob", second / "ann")]
        masks = [np.concatenate([flags.reshape(-1) for flags in proxy.values()]) for proxy in shown]
        assert not np.array_equal(masks[0], masks[1])
        assert not np.array_equal(masks[0], masks[2])


@few(12)
@given(scenarios(p1=0.1, p2=0.5))
def test_i2_schedule_sticky_shows_a_client_the_same_units_in_every_round(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        sticky = {"schedule": "sticky", "clients": ("ann",)}
        first, second = (job.export(job.model, f"r{number}", round=number, **sticky) / "ann" for number in (1, 2))
        for file in ("model.safetensors", "visible.safetensors"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
        assert (first / "proxy.json").read_bytes() != (second / "proxy.json").read_bytes()


@few(20)
@given(scenarios(fill="zero"))
def test_i2_what_a_client_does_not_see_is_zero_in_its_proxy(scenario: Scenario) -> None:
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.dense import load_dense

    with job_folder(scenario) as job:
        proxy = job.export(job.model, "proxies", clients=("ann",)) / "ann"
        with Checkpoint.open(proxy) as checkpoint:
            dense = load_dense(checkpoint)
        for name, flags in visible_elements(proxy).items():
            assert not dense[name].reshape(flags.shape)[~flags].any()


@few(20)
@given(scenarios(fill="base", p1=0.3, p2=0.3, layout="dense"))
def test_i2_holes_of_a_dense_proxy_hold_the_quantized_public_base(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        proxy = job.export(job.model, "proxies", clients=("ann",)) / "ann"
        plain = {"fill": "zero", "public_base": None, "p1": 0.0, "p2": 0.0, "key": job.root / "other.key"}
        base = job.export(job.root / "base", "base-proxy", clients=("ann",), **plain) / "ann"
        tensors, public = read_model(proxy), read_model(base)
        mine = job.export(job.model, "mine", clients=("ann",), p2=0.0) / "ann"
        server_holes, holes = visible_elements(mine), visible_elements(proxy)
        for name, flags in holes.items():
            only_client = (server_holes[name] & ~flags).reshape(tensors[name][1].shape)
            np.testing.assert_array_equal(tensors[name][1][only_client], public[name][1][only_client])
