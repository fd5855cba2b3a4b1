"""I4, determinism: same inputs, key and options give byte-equal outputs, whatever threads, chunks, shards and order."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import export_proxy, mask, merge
from fedqsn_cli.export import pipeline
from fedqsn_cli.kernels import threads
from fedqsn_cli.merging.ending import restore
from fedqsn_cli.merging.step import chunks
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
from support.passes import chunks_of, threads_of
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

SEVERAL = ("ann", "bob", "cleo")


def test_i4_chunk_size_and_threads_reach_every_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: dict[str, set[int]] = {}

    def spy(name: str, layout: TensorLayout, block: int, elements: int) -> Iterator[tuple[int, int]]:
        reached.setdefault(name, set()).add(elements)
        return row_chunks(layout, block, elements)

    for module in (pipeline, chunks, restore, residual):
        monkeypatch.setattr(module, "row_chunks", partial(spy, module.__name__.rpartition(".")[2]))
    job = JobFolder(Scenario("llama", "BF16", 32, 48, 1, "neuron", "nf4", "bnb", 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "llama", dtype="BF16")
    with chunks_of(7), threads_of(5):
        assert threads.thread_count() == 5
        job.quantized(job.server(job.model, "server"), "packed")
        update = send(job.export(job.model, "proxies") / "ann", folder / "update", noise(1))
        merge(str(job.model), [update], folder / "next", key=job.key, ledger=folder / "ledger.jsonl")
        trained = job.server(folder / "next", "trained")
        merge(str(job.model), [], folder / "whole", key=job.key, restore=str(trained))
    averaged = {14}  # two chunks at a time where no exact sum is in memory
    assert reached == {"pipeline": {7}, "chunks": averaged, "restore": {7}, "residual": {7}}


@few(40)
@given(scenarios(), st.sampled_from([1, 100, 1000]))
def test_i4_chunk_size_changes_no_byte_of_any_proxy(scenario: Scenario, elements: int) -> None:
    with job_folder(scenario) as job:
        proxies = contents(job.export(job.model, "proxies"))
        with chunks_of(elements):
            assert contents(job.export(job.model, "again")) == proxies


@few(15)
@given(scenarios())
def test_i4_chunk_size_changes_no_byte_of_a_server_model(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        server = job.server(job.model, "server")
        packed = job.quantized(server, "packed")
        before = contents(server), contents(packed)
        shutil.rmtree(server)
        shutil.rmtree(packed)
        with chunks_of(50):
            job.server(job.model, "server")
            job.quantized(server, "packed")
        assert (contents(server), contents(packed)) == before


LARGE = Scenario("gpt2", "BF16", 192, 512, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.soak), "gpt_oss"])
@pytest.mark.parametrize("format", ["nf4", "int8", "nf3", "none"])
@pytest.mark.parametrize("axis", ["neuron", "element"])
def test_i4_the_number_of_threads_changes_no_byte_of_any_proxy(
    family: str, format: str, axis: str, folder: Path
) -> None:
    scenario = replace(LARGE, family=family, format=format, axis=axis)
    job = JobFolder(scenario, folder)
    make_model(job.model, family, dtype="BF16", hidden=192, inner=512, vocabulary=301)
    outcomes = []
    for count in (1, 2, 3):
        with threads_of(count):
            outcomes.append(contents(job.export(job.model, f"p{count}")))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@few(20)
@given(scenarios())
def test_i4_shards_of_the_model_change_no_byte_of_any_proxy(scenario: Scenario) -> None:
    with job_folder(replace(scenario, shards=1)) as job:
        tensors = make_tensors(scenario.family, dtype=scenario.dtype, hidden=scenario.hidden, inner=scenario.inner)
        config = make_config(scenario.family, scenario.dtype)
        sharded = write_model(job.root / "sharded", tensors, config, shards=4)
        assert contents(job.export(sharded, "again")) == contents(job.export(job.model, "proxies"))


@few(8)
@given(scenarios(format="nf4"))
def test_i4_shards_of_a_proxy_hold_the_same_tensors(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        one = job.export(job.model, "one", clients=("ann",)) / "ann"
        other = {"ledger": job.root / "other.jsonl", "max_shard_size": "4KB"}
        many = job.export(job.model, "many", clients=("ann",), **other) / "ann"
        assert (many / "model.safetensors.index.json").exists()
        first, second = read_model(one), read_model(many)
        assert first.keys() == second.keys()
        assert all(first[name][1].tobytes() == second[name][1].tobytes() for name in first)


@few(12)
@given(scenarios())
def test_i4_other_clients_of_the_same_export_and_their_order_change_no_byte(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        together = contents(job.export(job.model, "together", clients=SEVERAL))
        backwards = contents(job.export(job.model, "backwards", clients=SEVERAL[::-1]))
        alone = {}
        for name in SEVERAL:
            alone |= contents(job.export(job.model, "alone", clients=(name,)))
        assert together == backwards == alone
        assert len((job.root / "ledger.jsonl").read_bytes().splitlines()) == len(SEVERAL)


@few(12)
@given(scenarios(p1=0.3, p2=0.3), st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from(["coverage", "clients"]))
def test_i4_order_chunks_and_shards_change_no_byte_of_a_merged_model(
    scenario: Scenario, precision: str, normalize: str
) -> None:
    with job_folder(replace(scenario, shards=1)) as job:
        proxies = job.export(job.model, "proxies", clients=SEVERAL)
        updates = [
            send(proxies / name, job.root / f"u-{name}", noise(index), examples=7 + index, precision=precision)
            for index, name in enumerate(SEVERAL)
        ]
        records = {"key": job.key, "ledger": job.root / "ledger.jsonl", "normalize": normalize}
        merge(str(job.model), updates, job.root / "next", **records)
        with chunks_of(300), threads_of(2):
            merge(str(job.model), updates[::-1], job.root / "again", **records, max_shard_size="4KB")
        one, other = read_model(job.root / "next"), read_model(job.root / "again")
        assert len(contents(job.root / "again")) > len(contents(job.root / "next"))
        assert all(one[name][1].tobytes() == other[name][1].tobytes() for name in one)
        if scenario.dtype != "F32":
            rest = [read_file(job.root / name / "fedqsn-residual.safetensors") for name in ("next", "again")]
            assert all(rest[0][name][1].tobytes() == rest[1][name][1].tobytes() for name in rest[0])


def test_i4_updates_are_added_in_one_order_even_where_the_order_decides(folder: Path) -> None:
    """In doubles 1e5 - 1e5 + 1e-12 is 1e-12, and 1e5 + 1e-12 - 1e5 is 0."""
    job = JobFolder(replace(LARGE, dtype="F32", format="none", p1=0.0, p2=0.0), folder)
    make_model(job.model, "gpt2", hidden=32)
    proxies = job.export(job.model, "proxies", clients=SEVERAL)
    updates = [
        send(proxies / name, folder / name, lambda _, shape, x=x: np.full(shape, x, np.float32))
        for name, x in zip(SEVERAL, (1e5, -1e5, 1e-12), strict=True)
    ]
    outcomes = []
    for number, order in enumerate(itertools.permutations(updates)):
        merge(
            str(job.model),
            order,
            folder / f"n{number}",
            key=job.key,
            ledger=folder / "ledger.jsonl",
            max_update_norm=1e30,
        )
        outcomes.append(contents(folder / f"n{number}"))
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
def test_i4_the_number_of_threads_changes_no_byte_of_a_merged_model(axis: str, folder: Path) -> None:
    job = JobFolder(replace(LARGE, axis=axis), folder)
    make_model(job.model, "gpt2", dtype="BF16", hidden=192, inner=512, vocabulary=301)
    proxies = job.export(job.model, "proxies")
    updates = [send(proxies / name, folder / name, noise(3), examples=5) for name in ("ann", "bob")]
    outcomes = []
    for count in (1, 2, 3):
        with threads_of(count):
            merge(str(job.model), updates, folder / f"n{count}", key=job.key, ledger=folder / "ledger.jsonl")
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
export_proxy("model", sys.argv[1], client=["ann", "bob"], round=1, key="key", p1=0.3, p2=0.2, ledger="ledger.jsonl",
    allow_untrainable=True)
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
