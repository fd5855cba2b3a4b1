"""merge --server-optimizer against ten lines of numpy over several rounds; its state; what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqsn_cli import inspect, merge
from fedqsn_cli.errors import InputError
from merging.test_merge import fedavg, whole_update
from support.helpers import contents, draft, make_model, noise, nothing_written, read_file, read_model, to_floats
from support.passes import chunks_of, threads_of
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

Doubles = NDArray[np.float64]
STATE = "fedqsn-server-state.safetensors"
RATES = {"momentum": 1.0, "adam": 0.01, "yogi": 0.01, "adagrad": 0.01}


class Reference:
    """One tensor under an optimizer (Reddi et al. 2021, algorithm 2), its state in fp32 between rounds."""

    def __init__(self, name: str, size: int, beta1: float, beta2: float, tau: float) -> None:
        self.name, self.beta1, self.beta2, self.tau = name, beta1, beta2, tau
        self.m, self.v = np.zeros(size, np.float32), np.full(size, tau**2, np.float32)

    def step(self, delta: Doubles, seen: NDArray[np.bool_]) -> Doubles:
        m, v, g = self.m.astype(np.float64), self.v.astype(np.float64), delta**2
        m = self.beta1 * m + (delta if self.name == "momentum" else (1 - self.beta1) * delta)
        v = {
            "momentum": v,
            "adagrad": v + g,
            "adam": self.beta2 * v + (1 - self.beta2) * g,
            "yogi": v - (1 - self.beta2) * g * np.sign(v - g),
        }[self.name]
        self.m, self.v = (np.where(seen, new, old).astype("f4") for new, old in ((m, self.m), (v, self.v)))
        return np.where(seen, m if self.name == "momentum" else m / (np.sqrt(v) + self.tau), 0.0)


def round_of(job: JobFolder, model: Path, number: int) -> tuple[list[Path], list[Any]]:
    """Two updates of a round."""
    proxies = job.export(model, f"p{number}", round=number, clients=("ann", "bob"))
    drafts = [draft(proxies / name, noise(10 * number + i, 0.01)) for i, name in enumerate(("ann", "bob"))]
    folders = [each.write(job.root / f"u{number}-{i}") for i, each in enumerate(drafts)]
    return folders, [whole_update(proxies / n, each) for n, each in zip(("ann", "bob"), drafts, strict=True)]


def step(job: JobFolder, model: Path, updates: list[Path], out: str, **options: Any) -> Path:
    usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
    return Path(merge(str(model), updates, job.root / out, **usual | options).path)


@few(16)
@given(
    scenarios(p2=0.4, dtype="F32"),
    st.sampled_from(list(RATES)),
    st.sampled_from([0.9, 0.0, 0.5]),
    st.sampled_from(["coverage", "clients"]),
)
def test_three_rounds_are_what_numpy_says(scenario: Scenario, name: str, beta1: float, normalize: str) -> None:
    with job_folder(scenario) as job:
        model = job.model
        weights = {n: to_floats(b, d).astype(np.float64) for n, (d, b) in read_model(model).items() if d != "I64"}
        states = {n: Reference(name, w.size, beta1, 0.99, 1e-3) for n, w in weights.items()}
        for number in (1, 2, 3):
            updates, parts = round_of(job, model, number)
            options = {"server_optimizer": name, "server_beta1": beta1, "server_lr": RATES[name]}
            model = step(job, model, updates, f"m{number}", normalize=normalize, **options)
            after = read_model(model)
            for n, old in weights.items():
                shape = old.shape
                delta = fedavg(np.zeros(shape), [p[n] for p in parts], [10, 10], normalize, 1.0).ravel()
                seen = parts[0][n][1].ravel() | parts[1][n][1].ravel()
                new = old.ravel() + RATES[name] * states[n].step(delta, seen)
                found = to_floats(after[n][1], after[n][0]).ravel()
                np.testing.assert_allclose(found, new, rtol=2e-6, atol=2e-7)
                np.testing.assert_array_equal(found[~seen], old.ravel()[~seen])
                weights[n] = found.astype(np.float64).reshape(shape)
        kept = read_file(model / STATE)
        for n, state in states.items():
            np.testing.assert_allclose(
                to_floats(kept[f"momentum/{n}"][1], "F32").ravel(), state.m, rtol=1e-6, atol=1e-8
            )
            assert (f"variance/{n}" in kept) == (name != "momentum")


@few(6)
@given(scenarios(shards=2), st.sampled_from(list(RATES)), st.data())
def test_i4_threads_and_chunks_change_no_byte(scenario: Scenario, name: str, data: st.DataObject) -> None:
    with job_folder(scenario) as job:
        options = {"server_optimizer": name, "server_lr": RATES[name] / 2}
        updates, _ = round_of(job, job.model, 1)
        first = step(job, job.model, updates, "first", **options)
        with chunks_of(data.draw(st.sampled_from([100, 5000]))), threads_of(3):
            again = step(job, job.model, updates, "again", **options)
        assert contents(first) == contents(again)


@pytest.fixture
def job(folder: Path) -> JobFolder:
    """A small BERT with a state of adam after one round."""
    job = JobFolder(Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2), folder)
    make_model(job.model, "bert", hidden=33)
    updates, _ = round_of(job, job.model, 1)
    step(job, job.model, updates, "m1", server_optimizer="adam", server_lr=0.01)
    return job


ADAM = {"server_optimizer": "adam", "server_lr": 0.01}


def test_the_state_stays_with_the_owner(job: JobFolder) -> None:
    assert (job.root / "m1" / STATE).is_file()
    assert inspect(str(job.root / "m1"))
    assert STATE not in contents(job.server(job.root / "m1", "server"))
    proxies = job.export(job.root / "m1", "released", round=2)
    assert not any(name.endswith(STATE) for name in contents(proxies))


def test_a_state_that_is_taken_out_begins_anew(job: JobFolder) -> None:
    updates, _ = round_of(job, job.root / "m1", 2)
    carried = step(job, job.root / "m1", updates, "carried", **ADAM)
    (job.root / "m1" / STATE).unlink()
    anew = step(job, job.root / "m1", updates, "anew", **ADAM)
    assert contents(carried)["model.safetensors"] != contents(anew)["model.safetensors"]


def test_a_state_that_is_not_a_file_does_not_count_as_taken_out(job: JobFolder) -> None:
    path = job.root / "m1" / STATE
    updates, _ = round_of(job, job.root / "m1", 2)
    path.unlink()
    path.symlink_to("moved.safetensors")
    with nothing_written(job.root), pytest.raises(InputError, match=STATE):
        step(job, job.root / "m1", updates, "next", **ADAM)
    path.unlink()
    os.mkfifo(path)
    with nothing_written(job.root), pytest.raises(InputError, match="not a regular file"):
        step(job, job.root / "m1", updates, "next", **ADAM)


def test_the_state_of_another_optimizer_is_refused(job: JobFolder) -> None:
    updates, _ = round_of(job, job.root / "m1", 2)
    for options in ({}, {"server_optimizer": "yogi", "server_lr": 0.01}, {"server_optimizer": "momentum"}):
        with nothing_written(job.root), pytest.raises(InputError, match="rounds before were merged with adam"):
            step(job, job.root / "m1", updates, "next", **options)


def test_the_state_of_another_round_or_model_is_refused(job: JobFolder) -> None:
    shutil.copy(job.root / "m1" / STATE, job.model / STATE)
    updates, _ = round_of(job, job.root / "m1", 2)
    second = step(job, job.root / "m1", updates, "m2", **ADAM)
    shutil.copy(job.root / "m1" / STATE, second / STATE)
    later, _ = round_of(job, second, 3)
    for model, sent in ((second, later), (job.model, [job.root / "u1-0"])):
        with nothing_written(job.root), pytest.raises(InputError, match="belongs to another job or model"):
            step(job, model, sent, "next", **ADAM)


def test_a_state_beside_other_weights_is_refused(job: JobFolder) -> None:
    path = job.root / "m1/model.safetensors"
    data = bytearray(path.read_bytes())
    for at in range(-4 * 33 * 33, 0, 4):  # enough that some of it is not hidden
        data[at] ^= 1
    path.write_bytes(data)
    updates, _ = round_of(job, job.root / "m1", 2)
    with nothing_written(job.root), pytest.raises(InputError, match="belongs to other weights"):
        step(job, job.root / "m1", updates, "next", **ADAM)


def test_a_state_that_holds_no_numbers_is_refused(job: JobFolder) -> None:
    path = job.root / "m1" / STATE
    updates, _ = round_of(job, job.root / "m1", 2)
    good = path.read_bytes()
    path.write_bytes(good[:-4] + np.float32(-1).tobytes())
    with nothing_written(job.root), pytest.raises(InputError, match="not the numbers of a state"):
        step(job, job.root / "m1", updates, "next", **ADAM)
    path.write_bytes(good[:-4])
    with nothing_written(job.root), pytest.raises(InputError):
        step(job, job.root / "m1", updates, "next", **ADAM)


def test_a_server_model_carries_a_state_too(job: JobFolder) -> None:
    model = job.server(job.model, "server")
    for number in (4, 5):
        updates, _ = round_of(job, model, number)
        model = step(job, model, updates, f"s{number}", **ADAM)
    assert (model / STATE).is_file()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"server_optimizer": "adam"}, "--server-lr: with adam a weight moves by up to --server-lr"),
    ({"server_optimizer": "lion"}, "not a choice"),
    (
        {"server_optimizer": "momentum", "server_lr": "auto", "eval_data": "x"},
        "--server-lr: auto measures single steps",
    ),
    ({"server_optimizer": "momentum", "server_tau": 0.1}, "--server-tau: momentum has no such number"),
    ({"server_beta1": 0.5}, "--server-beta1: sgd has no such number"),
    ({"server_optimizer": "adagrad", "server_lr": 0.1, "server_beta2": 0.5}, "--server-beta2: adagrad has no such"),
    ({"server_optimizer": "momentum", "server_beta1": 1.0}, "--server-beta1"),
    ({"server_optimizer": "adam", "server_lr": 0.1, "server_tau": 0}, "--server-tau"),
    ({"server_optimizer": "adam", "server_lr": 0.1, "restore": "model"}, "no updates|takes no step"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_i11_wrong_options_are_refused(options: dict[str, Any], complaint: str, job: JobFolder) -> None:
    with nothing_written(job.root), pytest.raises(InputError, match=complaint):
        step(job, job.model, [job.root / "u1-0"], "next", **options)
