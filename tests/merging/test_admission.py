"""Which updates a merge takes: claims, sizes of tensors and units, limits of files; what is refused is named."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from fedqsn_cli import merge
from fedqsn_cli.errors import FormatError, InputError, RefusedUpdate
from fedqsn_cli.merging.step.cosines import KEPT
from merging.test_merge import fedavg, whole_update
from support.helpers import contents, draft, make_model, noise, nothing_written, read_model, send, to_floats
from support.raw_safetensors import read_file
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

CLIENTS = ("ann", "bob", "cat", "dan")
WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"
NORM = "bert.embeddings.LayerNorm.weight"


def scenario(axis: str = "neuron") -> Scenario:
    return Scenario("bert", "F32", 33, 48, 1, axis, "nf4", None, 64, False, "zero", 0.3, 0.2)


def job_with_updates(folder: Path, axis: str = "neuron", clients: tuple[str, ...] = CLIENTS) -> JobFolder:
    job = JobFolder(scenario(axis), folder)
    make_model(job.model, "bert", hidden=33)
    proxies = job.export(job.model, "proxies", clients=clients)
    for number, name in enumerate(clients):
        send(proxies / name, folder / f"u-{name}", noise(number, 0.01), examples=10 + number)
    return job


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    """A job with four updates."""
    return job_with_updates(module_folder / "original")


@pytest.fixture
def job(original: JobFolder, folder: Path) -> JobFolder:
    """A copy of it, to be changed."""
    return original.copied(folder / "job")


def merged(job: JobFolder, *names: str, out: str = "next", **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    folders = [job.root / f"u-{name}" for name in names or CLIENTS]
    return merge(str(job.model), folders, job.root / out, **usual | options)


def tamper(job: JobFolder, client: str, change: Callable[[dict[str, Any]], object], **options: Any) -> None:
    """Send another update, with values changed: fp32 arrays by name."""
    update = draft(job.root / f"proxies/{client}", noise(9, 0.01), **options)
    change({name: bits.view(np.float32) for name, (_, bits) in update.tensors.items()})
    shutil.rmtree(job.root / f"u-{client}")
    update.write(job.root / f"u-{client}")


def say(job: JobFolder, client: str, **fields: Any) -> None:
    path = job.root / f"u-{client}/update.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---------------------------------------------------------------- what is measured


@few(20)
@given(scenarios(p2=0.5))
def test_norms_cosines_coverage_and_largest_units_are_those_of_numpy(scenario: Scenario) -> None:
    names, examples = ("ann", "bob", "cat"), [3, 5, 2]
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies", clients=names)
        drafts = [
            draft(proxies / name, noise(i, 0.01), examples=n)
            for i, (name, n) in enumerate(zip(names, examples, strict=True))
        ]
        folders = [update.write(job.root / f"u{i}") for i, update in enumerate(drafts)]
        result = merge(str(job.model), folders, job.root / "next", key=job.key, ledger=job.root / "ledger.jsonl")
        wholes = [whole_update(proxies / name, update) for name, update in zip(names, drafts, strict=True)]
        before = {n: to_floats(bits, dtype) for n, (dtype, bits) in read_model(job.model).items() if dtype != "I64"}
        size = sum(bits.size for _, bits in read_model(job.model).values())
        for client, whole in zip(result.clients, wholes, strict=True):
            deltas = {name: (u / s, seen) for name, (u, seen, s) in whole.items()}
            steps = {
                n: fedavg(np.zeros(before[n].shape), [w[n] for w in wholes], examples, "coverage", 1.0) for n in deltas
            }
            own = np.concatenate([u[seen] for u, seen in deltas.values()])
            mean = np.concatenate([steps[n].reshape(u.shape)[seen] for n, (u, seen) in deltas.items()])
            assert client.norm == pytest.approx(np.linalg.norm(own))
            assert client.cosine == pytest.approx(own @ mean / np.linalg.norm(own) / np.linalg.norm(mean))
            assert client.coverage == pytest.approx(own.size / size)
            largest = deltas[client.largest_tensor.tensor]
            assert client.largest_tensor.ratio > 0 and largest[1].any()


@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
@pytest.mark.parametrize("name", [WEIGHT, NORM, "bert.encoder.layer.0.intermediate.dense.bias"])
def test_one_unit_that_is_a_million_times_too_large_is_named(axis: str, name: str, folder: Path) -> None:
    job = job_with_updates(folder / "job", axis)

    def change(tensors: dict[str, NDArray[np.float32]]) -> None:
        part = tensors[name]
        if axis == "input" and part.ndim == 2:
            part[:, 2] *= 1e6
        else:
            part.reshape(len(part), -1)[2] *= 1e6

    tamper(job, "bob", change)
    message = rf"client 'bob' moves unit \d+ of {name}|client 'bob' moves {name} by"
    with nothing_written(folder), pytest.raises(RefusedUpdate, match=message):
        merged(job, max_update_norm=1e9, max_unit_norm=10)


def test_the_unit_that_is_named_is_the_one_that_was_changed(job: JobFolder) -> None:
    tamper(job, "bob", lambda tensors: tensors[WEIGHT].__setitem__(3, 2.5))
    shown = whole_update(job.root / "proxies/bob", draft(job.root / "proxies/bob", noise(9)))[WEIGHT][1][0]
    unit = np.flatnonzero(shown.any(axis=1))[3]
    with pytest.raises(RefusedUpdate, match=rf"moves unit {unit} of {WEIGHT} by"):
        merged(job)
    result = merged(job, max_unit_norm=1e6)
    found = next(client for client in result.clients if client.client == "bob").largest_unit
    assert (found.tensor, found.unit) == (WEIGHT, unit)


def test_a_tensor_that_is_two_everywhere_is_named(job: JobFolder) -> None:
    tamper(job, "cat", lambda tensors: tensors[WEIGHT].fill(30.0))
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match=f"'cat' moves {WEIGHT} by"):
        merged(job, max_update_norm=1000, max_unit_norm=10)


def test_many_updates_are_compared_on_some_rows(folder: Path) -> None:
    clients = tuple(f"c{number:02d}" for number in range(KEPT + 4))
    job = job_with_updates(folder / "job", clients=clients)
    for name in clients:
        value = -0.01 if name == "c03" else 0.01
        tamper(job, name, lambda tensors, value=value: [x.fill(value) for x in tensors.values()])
    result = merged(job, *clients)
    cosines = {client.client: client.cosine for client in result.clients}
    assert cosines["c03"] < -0.9 and min(x for name, x in cosines.items() if name != "c03") > 0.9


# ---------------------------------------------------------------- claims


def test_a_claim_of_more_than_ten_times_the_median_is_refused(job: JobFolder) -> None:
    say(job, "dan", num_examples=10**6)
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="10 times the median .* --max-examples"):
        merged(job)
    assert merged(job, max_examples=10**6).clients[3].share > 0.99


def test_two_updates_have_no_median_to_be_held_against(job: JobFolder) -> None:
    say(job, "dan", num_examples=5000)
    assert merged(job, "ann", "dan").num_examples == 5010


def test_ten_times_the_median_is_accepted(job: JobFolder) -> None:
    for name, examples in zip(CLIENTS, (10, 10, 10, 100), strict=True):
        say(job, name, num_examples=examples)
    assert merged(job).num_examples == 130


# ---------------------------------------------------------------- refused updates are left out


def nan(tensors: dict[str, NDArray[np.float32]]) -> None:
    tensors[WEIGHT][0, 0] = np.nan


FAULTS: dict[str, tuple[Callable[[JobFolder], object], str]] = {
    "NaN": (lambda job: tamper(job, "bob", nan), "NaN"),
    "a huge unit": (lambda job: tamper(job, "bob", lambda t: t[WEIGHT].__setitem__(1, 5.0)), "moves"),
    "too many examples": (lambda job: say(job, "bob", num_examples=2**53), "median"),
    "a foreign proxy": (lambda job: say(job, "bob", proxy_id="1" * 64), "not in the ledger"),
    "no manifest": (lambda job: (job.root / "u-bob/update.json").unlink(), "no update.json"),
    "a wrong digest": (lambda job: say(job, "bob", files={"update.safetensors": "0" * 64}), "its digest is not"),
    "one more file": (lambda job: (job.root / "u-bob/run.py").write_text(""), "'run.py'"),
    "a file of adapters": (
        lambda job: (job.root / "u-bob/adapter_config.json").write_text(""),
        "'adapter_config.json'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_update_is_named_and_the_others_are_merged_without_it(fault: str, job: JobFolder) -> None:
    change, reason = FAULTS[fault]
    change(job)
    with nothing_written(job.root), pytest.raises(InputError, match=reason):
        merged(job)
    result = merged(job, on_refused="skip")
    assert [item.folder for item in result.refused] == [str(job.root / "u-bob")]
    assert reason in result.refused[0].reason
    merged(job, "ann", "cat", "dan", out="without")
    assert contents(job.root / "next") == contents(job.root / "without")


def test_a_stale_update_is_left_out_even_if_it_comes_first(job: JobFolder) -> None:
    merged(job, out="moved")
    proxies = job.export(job.root / "moved", "second", round=2, clients=("eve",))
    send(proxies / "eve", job.root / "u-aaa", noise(5, 0.01), examples=9)
    (job.root / "u-aaa").rename(job.root / "u-eve")
    result = merged(job, *CLIENTS, "eve", on_refused="skip")
    assert [item.client for item in result.refused] == ["eve"]
    assert len(result.clients) == 4


def test_two_updates_of_one_client_are_both_left_out(job: JobFolder) -> None:
    shutil.copytree(job.root / "u-ann", job.root / "u-too")
    result = merged(job, *CLIENTS, "too", on_refused="skip")
    assert [client.client for client in result.clients] == ["bob", "cat", "dan"]
    assert [item.client for item in result.refused] == ["ann", "ann"]


def test_a_round_with_too_few_updates_is_refused(job: JobFolder) -> None:
    tamper(job, "bob", nan)
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="3 of 4 updates .* --min-clients 4.*NaN"):
        merged(job, on_refused="skip", min_clients=4)
    assert len(merged(job, on_refused="skip", min_clients=3).clients) == 3
    with pytest.raises(RefusedUpdate, match="--min-clients 3"):
        merged(job, "ann", "cat", out="other", min_clients=3)


def test_a_page_draws_the_updates(job: JobFolder) -> None:
    tamper(job, "bob", nan)
    merged(job, on_refused="skip", report=job.root / "page.html")
    page = (job.root / "page.html").read_text()
    assert page.count("<svg") == 2 and "NaN" in page
    assert all(name in page for name in CLIENTS)
    assert "<script" not in page


# ---------------------------------------------------------------- limits of files


def test_a_name_of_a_tool_is_short_and_printable(job: JobFolder) -> None:
    for tool in ("x" * 201, "a\x1b[2Jb", "a\nb", "\ud800"):
        say(job, "ann", tool=tool)
        with nothing_written(job.root), pytest.raises(FormatError, match="tool|UTF-8|surrogate") as caught:
            merged(job)
        assert str(caught.value).isprintable()


def test_a_huge_manifest_is_refused_before_it_is_read(job: JobFolder) -> None:
    os.truncate(job.root / "u-ann/update.json", 250_000_000)
    with nothing_written(job.root):
        tracemalloc.start()
        start = time.process_time()
        try:
            with pytest.raises(FormatError, match="larger than 16777216 bytes"):
                merged(job)
            assert time.process_time() - start < 5
            assert tracemalloc.get_traced_memory()[1] < 200_000_000  # bytes, at any time
        finally:
            tracemalloc.stop()


def test_a_header_that_no_update_of_the_model_has_is_refused_before_it_is_read(job: JobFolder) -> None:
    file = job.root / "u-ann/update.safetensors"
    data = file.read_bytes()
    for length in (99_000_000, 1_000_000):
        with file.open("wb") as out:
            out.write(length.to_bytes(8, "little"))
            out.write(data[8:])
        os.truncate(file, length + 100)
        with nothing_written(job.root), pytest.raises(FormatError, match="header of .* is over the limit"):
            merged(job)


def test_an_update_may_describe_itself_in_its_header(job: JobFolder) -> None:
    assert read_file(job.root / "u-ann/update.safetensors")  # written with metadata
    assert merged(job).num_examples == sum(range(10, 14))
