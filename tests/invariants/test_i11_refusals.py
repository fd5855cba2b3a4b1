"""I11, refuse: whatever is wrong with an update, its ledger or its key, merge says so and writes nothing at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqsn_cli import merge
from fedqsn_cli.artifacts.ledger_head import write_head
from fedqsn_cli.errors import FedqsnError, FormatError, InputError, KeyFileError, RefusedUpdate
from fedqsn_cli.masks import job_key
from support.helpers import Update, draft, listing, make_model, noise, nothing_written, send
from support.scenario import JobFolder, Scenario

SCENARIO = Scenario("qwen2", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)
WEIGHT, NORM, BIAS = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias")


@pytest.fixture(scope="module")
def original(module_folder: Path) -> JobFolder:
    """A job with two proxies and an honest update of each."""
    job = JobFolder(SCENARIO, module_folder / "original")
    make_model(job.model, "qwen2", hidden=33)
    proxies = job.export(job.model, "proxies")
    for name in ("ann", "bob"):
        send(proxies / name, job.root / f"u-{name}", noise(1))
    return job


@pytest.fixture
def job(original: JobFolder, folder: Path) -> JobFolder:
    """A copy of it to tamper with."""
    shutil.copytree(original.root, folder / "job")
    (folder / "job/job.key").chmod(0o600)
    return JobFolder(SCENARIO, folder / "job")


def merged(job: JobFolder, *updates: str, **options: Any) -> Any:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    folders = [job.root / name for name in updates or ("u-ann", "u-bob")]
    return merge(str(job.model), folders, job.root / "next", **usual | options)


def refused(
    job: JobFolder, complaint: str | None, *updates: str, error: type[FedqsnError] = InputError, **options: Any
) -> None:
    """merge refuses in one line, with exit code 2, and writes nothing."""
    with nothing_written(job.root), pytest.raises(error, match=complaint) as caught:
        merged(job, *updates, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_i11_the_honest_updates_of_these_tests_are_accepted(job: JobFolder) -> None:
    merged(job)
    assert sorted(set(listing(job.root)) - {"next"})  # and below: nothing but the result is new
    assert not [name for name in listing(job.root) if ".fedqsn-" in name]


# ---------------------------------------------------------------- the tensors of an update


def tampered(change: Callable[[Update], None]) -> Callable[[JobFolder], None]:
    """An update with other content, but with a digest that fits."""

    def apply(job: JobFolder) -> None:
        update = draft(job.root / "proxies/ann", noise(1))
        change(update)
        shutil.rmtree(job.root / "u-ann")
        update.write(job.root / "u-ann")

    return apply


def put(name: str, value: float, everywhere: bool = False) -> Callable[[JobFolder], None]:
    def change(update: Update) -> None:
        values = update.tensors[name][1].view(np.float32)
        values.reshape(-1)[slice(None) if everywhere else slice(-1, None)] = value

    return tampered(change)


def put_tensor(name: str, tensor: Callable[[Any], tuple[str, Any]]) -> Callable[[JobFolder], None]:
    return tampered(lambda update: update.tensors.update({name: tensor(update.tensors.get(name, ("F32", None))[1])}))


TENSORS: dict[str, tuple[Callable[[JobFolder], None], str]] = {
    "NaN in a weight": (put(WEIGHT, float("nan")), "NaN or infinity"),
    "NaN in a norm": (put(NORM, float("nan")), "NaN or infinity"),
    "infinity in a bias": (put(BIAS, float("inf")), "NaN or infinity"),
    "minus infinity": (put(WEIGHT, float("-inf")), "NaN or infinity"),
    "infinities that cancel": (put(WEIGHT, float("inf"), True), "NaN or infinity"),
    "a huge number": (put(WEIGHT, 1e30), "summed exactly"),
    "the largest number": (put(WEIGHT, 3.4e38, True), "summed exactly"),
    "a huge norm": (put(NORM, 1e8), "norm"),
    "numbers a hundred times too large": (put(WEIGHT, 50.0, True), "norm"),
    "one tensor more": (
        put_tensor("model.layers.7.mlp.up_proj.weight", lambda x: ("F32", np.zeros(3, np.uint32))),
        "no such tensor",
    ),
    "a tensor missing": (tampered(lambda update: update.tensors.pop(WEIGHT) and None), "missing"),
    "a norm missing": (tampered(lambda update: update.tensors.pop(NORM) and None), "missing"),
    "all units": (put_tensor(WEIGHT, lambda x: ("F32", np.zeros((48, 33), np.uint32))), "expected F32"),
    "one unit less": (put_tensor(WEIGHT, lambda x: ("F32", x[1:])), "expected F32"),
    "turned": (put_tensor(WEIGHT, lambda x: ("F32", np.ascontiguousarray(x.T))), "expected F32"),
    "flat": (put_tensor(WEIGHT, lambda x: ("F32", x.reshape(-1))), "expected F32"),
    "a dimension more": (put_tensor(WEIGHT, lambda x: ("F32", x[None])), "expected F32"),
    "empty": (put_tensor(WEIGHT, lambda x: ("F32", x[:0])), "expected F32"),
    "another dtype": (put_tensor(WEIGHT, lambda x: ("BF16", x.astype(np.uint16))), "expected F32"),
    "whole numbers": (put_tensor(WEIGHT, lambda x: ("I64", x.astype(np.int64))), "expected F32"),
    "another precision than it says": (
        tampered(lambda update: update.manifest.update(precision="fp16")),
        "expected F16",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_i11_an_update_whose_tensors_are_wrong_is_refused(fault: str, job: JobFolder) -> None:
    change, complaint = TENSORS[fault]
    change(job)
    refused(job, complaint)


# ---------------------------------------------------------------- the manifest of an update


def say(**fields: Any) -> Callable[[Path], None]:
    """Other fields in update.json; `...` takes one out."""

    def change(update: Path) -> None:
        document = json.loads((update / "update.json").read_text()) | fields
        document = {name: value for name, value in document.items() if value is not ...}
        (update / "update.json").write_text(json.dumps(document))

    return change


def write(text: bytes) -> Callable[[Path], None]:
    def change(update: Path) -> None:
        (update / "update.json").write_bytes(text)

    return change


FILES = {"update.safetensors": "0" * 64}
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "no examples": say(num_examples=0),
    "negative examples": say(num_examples=-5),
    "half an example": say(num_examples=10.5),
    "a float that is whole": say(num_examples=10.0),
    "examples as text": say(num_examples="10"),
    "true examples": say(num_examples=True),
    "too many examples": say(num_examples=2**53 + 1),
    "endless examples": write(b'{"num_examples": 1e999}'),
    "no field num_examples": say(num_examples=...),
    "null examples": say(num_examples=None),
    "negative steps": say(steps=-1),
    "an unknown field": say(extra=1),
    "another format": say(format="fedqsn-update/3"),
    "an unknown precision": say(precision="fp8"),
    "no losses": say(losses=None),
    "losses that are text": say(losses={"first": "1", "last": None, "eval_before": None, "eval_after": None}),
    "a short proxy id": say(proxy_id="abc"),
    "a proxy id in capitals": say(proxy_id="A" * 64),
    "an unknown proxy id": say(proxy_id="1" * 64),
    "another proxy.json": say(proxy_sha256="1" * 64),
    "a wrong digest": say(files=FILES),
    "no files": say(files={}),
    "one file more": say(files=FILES | {"more.safetensors": "0" * 64}),
    "a file elsewhere": say(files={"../u-bob/update.safetensors": "0" * 64}),
    "an absolute file": say(files={"/etc/passwd": "0" * 64}),
    "doubled fields": write(b'{"format": "fedqsn-update/1", "format": "fedqsn-update/1"}'),
    "a list": write(b"[]"),
    "nothing": write(b""),
    "no JSON": write(b"{"),
    "no UTF-8": write(b"\xff\xfe"),
    "NaN": write(b'{"num_examples": NaN}'),
    "deep nesting": write(b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_i11_an_update_whose_manifest_is_wrong_is_refused(fault: str, job: JobFolder) -> None:
    MANIFESTS[fault](job.root / "u-ann")
    refused(job, None)


# ---------------------------------------------------------------- the files of an update


def flip(update: Path, position: int) -> None:
    data = bytearray((update / "update.safetensors").read_bytes())
    data[position] ^= 1
    (update / "update.safetensors").write_bytes(data)


@pytest.mark.parametrize("position", [-1, -2, -1000, -9_000, 9, 100, 0])
def test_i11_one_flipped_bit_anywhere_in_an_update_is_refused(position: int, job: JobFolder) -> None:
    flip(job.root / "u-ann", position)
    refused(job, None)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 4),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0\0\0\0"),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "a pickle": lambda file: file.write_bytes(b"\x80\x04\x95" + bytes(100)),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["update.safetensors", "update.json"])
def test_i11_an_update_with_a_damaged_file_is_refused(file: str, damage: str, job: JobFolder) -> None:
    DAMAGES[damage](job.root / "u-ann" / file)
    if damage == "longer" and file == "update.json":
        (job.root / "u-ann" / file).write_bytes(b"{} {}")
    with nothing_written(job.root), pytest.raises((InputError, OSError)) as caught:
        merged(job)
    assert isinstance(caught.value, InputError)


# ---------------------------------------------------------------- foreign, stale, doubled


def test_i11_an_update_given_twice_is_refused(job: JobFolder) -> None:
    shutil.copytree(job.root / "u-ann", job.root / "copy")
    (job.root / "link").symlink_to(job.root / "u-ann")
    for other in ("u-ann", "copy", "link"):
        refused(job, "more than one", "u-ann", other, error=RefusedUpdate)


def test_i11_two_updates_of_one_client_are_refused_even_from_two_rounds(job: JobFolder) -> None:
    proxies = job.export(job.model, "second", round=2)
    send(proxies / "ann", job.root / "u-again", noise(2))
    refused(job, "more than one", "u-ann", "u-again", error=RefusedUpdate)


def test_i11_an_update_of_the_last_round_is_stale_once_the_model_moved(job: JobFolder) -> None:
    merge(
        str(job.model),
        [job.root / "u-ann"],
        job.root / "moved",
        key=job.key,
        ledger=job.root / "ledger.jsonl",
    )
    with nothing_written(job.root), pytest.raises(RefusedUpdate, match="another model"):
        merge(
            str(job.root / "moved"),
            [job.root / "u-bob"],
            job.root / "next",
            key=job.key,
            ledger=job.root / "ledger.jsonl",
        )
    proxies = job.export(job.root / "moved", "second", round=2)
    send(proxies / "ann", job.root / "u-new", noise(2))
    refused(job, "another model", "u-new", "u-bob", error=RefusedUpdate)
    refused(job, "another model", "u-new", error=RefusedUpdate)


def test_i11_updates_of_another_job_are_refused(job: JobFolder) -> None:
    foreign = {"key": job.root / "other.key", "ledger": job.root / "other.jsonl"}
    proxies = job.export(job.model, "foreign", **foreign)
    send(proxies / "ann", job.root / "u-foreign", noise(1))
    refused(job, "not in the ledger", "u-foreign", error=RefusedUpdate)
    refused(job, "another job", "u-foreign", ledger=job.root / "other.jsonl", error=RefusedUpdate)
    refused(job, "another job", "u-ann", key=job.root / "other.key", error=RefusedUpdate)


def test_i11_an_update_for_another_clients_proxy_does_not_fit(job: JobFolder) -> None:
    """A client that claims another's proxy id is caught by the digest of proxy.json."""
    theirs = json.loads((job.root / "u-bob/update.json").read_text())
    say(proxy_id=theirs["proxy_id"])(job.root / "u-ann")
    refused(job, "another proxy.json", "u-ann", error=RefusedUpdate)


def test_i11_more_examples_than_allowed_are_refused(job: JobFolder) -> None:
    refused(job, "max-examples", max_examples=9, error=RefusedUpdate)
    merged(job, max_examples=10)


def test_i11_a_norm_over_the_limit_is_refused(job: JobFolder) -> None:
    norm = max(client.relative_norm for client in merged(job).clients)
    shutil.rmtree(job.root / "next")
    refused(job, "max-update-norm", max_update_norm=norm * 0.99, error=RefusedUpdate)
    merged(job, max_update_norm=norm * 1.01)


@pytest.mark.parametrize("poisoned", ["u-ann", "u-bob"])
def test_i11_one_bad_update_among_good_ones_is_named(poisoned: str, job: JobFolder) -> None:
    flip(job.root / poisoned, -1)
    refused(job, poisoned, error=RefusedUpdate)


# ---------------------------------------------------------------- ledger and key


@pytest.fixture
def lines(job: JobFolder) -> Iterator[list[bytes]]:
    """Lines of the ledger; what the test leaves in the list is written back by `rewrite`."""
    yield (job.root / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def test_i11_a_broken_chain_in_the_ledger_is_refused(job: JobFolder, lines: list[bytes]) -> None:
    first, second = lines
    broken = [
        [second, first],
        [second],
        [first, first],
        [first.replace(b'"p2":0.2', b'"p2":0.1'), second],
        [first, b"\n", second],
        [first, b"{}\n", second],
        [first, second, b"null\n"],
        [b"\xff\n"],
        [first.replace(b'"round":1', b'"round":1,"round":1'), second],
    ]
    for content in broken:
        (job.root / "ledger.jsonl").write_bytes(b"".join(content))
        refused(job, "ledger.jsonl", error=FormatError)


def test_i11_a_torn_last_line_of_the_ledger_was_never_a_release(job: JobFolder, lines: list[bytes]) -> None:
    """The head is written after the lines, so that of an export that was killed names the line before."""
    first, second = lines
    for length in (1, len(second) // 2, len(second) - 2):
        write_head(job.root / "ledger.jsonl", None, job_key.load(job.key), ["0" * 64, sha256(first[:-1]).hexdigest()])
        (job.root / "ledger.jsonl").write_bytes(first + second[:length])
        refused(job, "not in the ledger", error=RefusedUpdate)
        merged(job, "u-ann")
        shutil.rmtree(job.root / "next")
        job.export(job.model, "again")  # writes the lost line once more
        shutil.rmtree(job.root / "again")
        assert (job.root / "ledger.jsonl").read_bytes() == first + second


def test_i11_an_empty_ledger_has_no_release(job: JobFolder) -> None:
    (job.root / "ledger.jsonl").write_bytes(b"")
    refused(job, "releases were removed", error=FormatError)
    (job.root / "ledger.jsonl.head").unlink()
    refused(job, "not in the ledger", error=RefusedUpdate)


def test_i11_a_key_that_others_can_read_or_that_is_none_is_refused(job: JobFolder) -> None:
    for mode in (0o644, 0o640, 0o604, 0o660):
        job.key.chmod(mode)
        refused(job, "chmod 600", error=KeyFileError)
    job.key.chmod(0o600)
    job.key.write_text("not a key")
    refused(job, None, error=KeyFileError)


def test_i11_a_taken_output_is_refused_before_anything_is_read(job: JobFolder) -> None:
    (job.root / "next").mkdir()
    refused(job, "already exists")
    refused(job, "not made by fedqsn", force=True)
