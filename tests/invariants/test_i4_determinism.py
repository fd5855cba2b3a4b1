"""I4, determinism: same inputs, key and options give byte-equal outputs, whatever threads, chunks, shards and order."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import export_proxy, mask, merge
from fedqsn_cli.export import pipeline, proxy, server_model
from fedqsn_cli.kernels import threads
from fedqsn_cli.merging import chunks, restore
from fedqsn_cli.models import residual
from fedqsn_cli.quantization.layout import TensorLayout, row_chunks
from support.helpers import (
    contents,
    environment,
    make_config,
    make_model,
    make_tensors,
    noise,
    read_file,
    read_model,
    send,
    write_model,
)
from support.scenario import Place, World, few, placed, worlds

SEVERAL = ("ann", "bob", "cleo")


@contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    """Let every pass over a model read so many elements at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (proxy, server_model):
            patch.setattr(module, "run", partial(pipeline.run, chunk_elements=elements))
        patch.setattr(restore, "CHUNK_ELEMENTS", elements)
        patch.setattr(residual, "CHUNK", elements)
        patch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        yield


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Let kernels compute in so many threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDQSN_THREADS", str(count))
        forget_threads()
        yield
    forget_threads()


def forget_threads() -> None:
    threads.thread_count.cache_clear()
    threads._pool.cache_clear()


def test_i4_the_patches_of_this_file_reach_what_they_patch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: dict[str, set[int]] = {}

    def spy(name: str, layout: TensorLayout, block: int, elements: int) -> Iterator[tuple[int, int]]:
        reached.setdefault(name, set()).add(elements)
        return row_chunks(layout, block, elements)

    for module in (pipeline, chunks, restore, residual):
        monkeypatch.setattr(module, "row_chunks", partial(spy, module.__name__.rpartition(".")[2]))
    place = Place(World("llama", "BF16", 32, 48, 1, "neuron", "nf4", "bnb", 64, False, "zero", 0.3, 0.2), folder)
    make_model(place.model, "llama", dtype="BF16")
    with chunks_of(7), threads_of(5):
        assert threads.thread_count() == 5
        place.quantized(place.server(place.model, "server"), "packed")
        update = send(place.export(place.model, "proxies") / "ann", folder / "update", noise(1))
        merge(str(place.model), [update], folder / "next", key=place.key, ledger=folder / "ledger.jsonl")
        trained = place.server(folder / "next", "trained")
        merge(str(place.model), [], folder / "whole", key=place.key, restore=str(trained))
    assert reached == {"pipeline": {7}, "chunks": {7}, "restore": {7}, "residual": {7}}


@few(40)
@given(worlds(), st.sampled_from([1, 100, 1000]))
def test_i4_chunk_size_changes_no_byte_of_any_proxy(world: World, elements: int) -> None:
    with placed(world) as place:
        proxies = contents(place.export(place.model, "proxies"))
        with chunks_of(elements):
            assert contents(place.export(place.model, "again")) == proxies


@few(15)
@given(worlds())
def test_i4_chunk_size_changes_no_byte_of_a_server_model(world: World) -> None:
    with placed(world) as place:
        server = place.server(place.model, "server")
        packed = place.quantized(server, "packed")
        before = contents(server), contents(packed)
        shutil.rmtree(server)
        shutil.rmtree(packed)
        with chunks_of(50):
            place.server(place.model, "server")
            place.quantized(server, "packed")
        assert (contents(server), contents(packed)) == before


LARGE = World("gpt2", "BF16", 192, 512, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
@pytest.mark.parametrize("format", ["nf4", "int8", "nf3", "none"])
@pytest.mark.parametrize("axis", ["neuron", "element"])
def test_i4_the_number_of_threads_changes_no_byte_of_any_proxy(
    family: str, format: str, axis: str, folder: Path
) -> None:
    world = replace(LARGE, family=family, format=format, axis=axis)
    place = Place(world, folder)
    make_model(place.model, family, dtype="BF16", hidden=192, inner=512, vocabulary=301)
    outcomes = []
    for count in (1, 2, 3):
        with threads_of(count):
            outcomes.append(contents(place.export(place.model, f"p{count}")))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@few(20)
@given(worlds())
def test_i4_shards_of_the_model_change_no_byte_of_any_proxy(world: World) -> None:
    with placed(replace(world, shards=1)) as place:
        tensors = make_tensors(world.family, dtype=world.dtype, hidden=world.hidden, inner=world.inner)
        config = make_config(world.family, world.dtype)
        sharded = write_model(place.root / "sharded", tensors, config, shards=4)
        assert contents(place.export(sharded, "again")) == contents(place.export(place.model, "proxies"))


@few(8)
@given(worlds(format="nf4"))
def test_i4_shards_of_a_proxy_hold_the_same_tensors(world: World) -> None:
    with placed(world) as place:
        one = place.export(place.model, "one", clients=("ann",)) / "ann"
        other = {"ledger": place.root / "other.jsonl", "max_shard_size": "4KB"}
        many = place.export(place.model, "many", clients=("ann",), **other) / "ann"
        assert (many / "model.safetensors.index.json").exists()
        first, second = read_model(one), read_model(many)
        assert first.keys() == second.keys()
        assert all(first[name][1].tobytes() == second[name][1].tobytes() for name in first)


@few(12)
@given(worlds())
def test_i4_other_clients_of_the_same_export_and_their_order_change_no_byte(world: World) -> None:
    with placed(world) as place:
        together = contents(place.export(place.model, "together", clients=SEVERAL))
        backwards = contents(place.export(place.model, "backwards", clients=SEVERAL[::-1]))
        alone = {}
        for name in SEVERAL:
            alone |= contents(place.export(place.model, "alone", clients=(name,)))
        assert together == backwards == alone
        assert len((place.root / "ledger.jsonl").read_bytes().splitlines()) == len(SEVERAL)


@few(12)
@given(worlds(p1=0.3, p2=0.3), st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from(["coverage", "clients"]))
def test_i4_order_chunks_and_shards_change_no_byte_of_a_merged_model(
    world: World, precision: str, normalize: str
) -> None:
    with placed(replace(world, shards=1)) as place:
        proxies = place.export(place.model, "proxies", clients=SEVERAL)
        updates = [
            send(proxies / name, place.root / f"u-{name}", noise(index), examples=7 + index, precision=precision)
            for index, name in enumerate(SEVERAL)
        ]
        job = {"key": place.key, "ledger": place.root / "ledger.jsonl", "normalize": normalize}
        merge(str(place.model), updates, place.root / "next", **job)
        with chunks_of(300), threads_of(2):
            merge(str(place.model), updates[::-1], place.root / "again", **job, max_shard_size="4KB")
        one, other = read_model(place.root / "next"), read_model(place.root / "again")
        assert len(contents(place.root / "again")) > len(contents(place.root / "next"))
        assert all(one[name][1].tobytes() == other[name][1].tobytes() for name in one)
        if world.dtype != "F32":
            rest = [read_file(place.root / name / "fedqsn-residual.safetensors") for name in ("next", "again")]
            assert all(rest[0][name][1].tobytes() == rest[1][name][1].tobytes() for name in rest[0])


def test_i4_updates_are_added_in_one_order_even_where_the_order_decides(folder: Path) -> None:
    """1e20 - 1e20 + 1 is 1, and 1e20 + 1 - 1e20 is 0."""
    place = Place(replace(LARGE, dtype="F32", format="none", p1=0.0, p2=0.0), folder)
    make_model(place.model, "gpt2", hidden=32)
    proxies = place.export(place.model, "proxies", clients=SEVERAL)
    updates = [
        send(proxies / name, folder / name, lambda _, shape, x=x: np.full(shape, x, np.float32))
        for name, x in zip(SEVERAL, (1e20, -1e20, 1.0), strict=True)
    ]
    outcomes = []
    for number, order in enumerate(itertools.permutations(updates)):
        merge(
            str(place.model),
            order,
            folder / f"n{number}",
            key=place.key,
            ledger=folder / "ledger.jsonl",
            max_update_norm=1e30,
        )
        outcomes.append(contents(folder / f"n{number}"))
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
def test_i4_the_number_of_threads_changes_no_byte_of_a_merged_model(axis: str, folder: Path) -> None:
    place = Place(replace(LARGE, axis=axis), folder)
    make_model(place.model, "gpt2", dtype="BF16", hidden=192, inner=512, vocabulary=301)
    proxies = place.export(place.model, "proxies")
    updates = [send(proxies / name, folder / name, noise(3), examples=5) for name in ("ann", "bob")]
    outcomes = []
    for count in (1, 2, 3):
        with threads_of(count):
            merge(str(place.model), updates, folder / f"n{count}", key=place.key, ledger=folder / "ledger.jsonl")
            outcomes.append(contents(folder / f"n{count}"))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "gpt_oss", "t5"])
def test_i4_order_of_tensors_in_the_file_changes_no_byte(family: str, axis: str, folder: Path) -> None:
    """Some writers do not sort."""
    tensors = make_tensors(family, hidden=33)
    model = make_model(folder / "model", family, hidden=33)
    backwards = folder / "backwards"
    shutil.copytree(model, backwards)
    entries, data = {}, b""
    for name in sorted(tensors, key=lambda name: (tensors[name][0] == "I64", name), reverse=True):
        dtype, bits = tensors[name]
        offsets = [len(data), len(data) + bits.nbytes]
        entries[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": offsets}
        data += bits.tobytes()
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    (backwards / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    common = {
        "client": ["ann"],
        "round": 1,
        "p1": 0.3,
        "p2": 0.2,
        "key": folder / "key",
        "axis": axis,
        "ledger": folder / "ledger.jsonl",
    }
    export_proxy(str(model), folder / "one", **common)
    export_proxy(str(backwards), folder / "two", **common)
    assert contents(folder / "one") == contents(folder / "two")


EXPORT = """
import sys
from fedqsn_cli import export_proxy
export_proxy("model", sys.argv[1], client=["ann", "bob"], round=1, key="key", p1=0.3, p2=0.2, ledger="ledger.jsonl")
"""


def test_i4_processes_in_other_surroundings_write_the_same_bytes(folder: Path) -> None:
    make_model(folder / "model", "gpt_oss", dtype="BF16", hidden=47)
    surroundings = [
        {"PYTHONHASHSEED": "1", "FEDQSN_THREADS": "1", "LC_ALL": "C", "TZ": "UTC", "HOME": "/nonexistent"},
        {"PYTHONHASHSEED": "2", "FEDQSN_THREADS": "3", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo", "USER": "somebody"},
    ]
    for number, variables in enumerate(surroundings):
        command = [sys.executable, "-c", EXPORT, f"p{number}/{{client}}"]
        subprocess.run(command, env=environment(**variables), cwd=folder, check=True, timeout=600)
    assert contents(folder / "p0") == contents(folder / "p1")


def test_i4_a_repeated_mask_with_the_same_key_gives_the_same_bytes(folder: Path) -> None:
    model = make_model(folder / "model", "bert", dtype="F16", hidden=47)
    mask(str(model), folder / "one", key=folder / "key", p1=0.3)
    mask(str(model), folder / "two", key=folder / "key")
    assert contents(folder / "one") == contents(folder / "two")
