"""export-proxy --train all: clients train the public base in the holes, too, and hidden units get the difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import audit, client_train, export_proxy, mask, merge
from fedqsn_cli.errors import InputError, RefusedUpdate
from support.families import build
from support.helpers import (
    contents,
    hidden_elements,
    make_model,
    noise,
    nothing_written,
    read_file,
    read_model,
    send,
    to_bits,
    to_floats,
    write_file,
)
from support.scenario import KINDS, JobFolder, Scenario, few, job_folder, scenarios

USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "base", 0.5, 0.2)
CLIENTS = ("ann", "robert")
ALL: dict[str, Any] = {"train": "all"}


def play(job: JobFolder, rounds: int = 2, values: Any = noise) -> Path:
    """Rounds merged into the server model; the last one."""
    server = job.server(job.model, "server")
    for number in range(1, rounds + 1):
        proxies = job.export(server, f"p{number}", round=number, clients=CLIENTS, **ALL)
        updates = [
            send(proxies / name, job.root / f"u{number}-{name}", values(10 * number + len(name)), examples=len(name))
            for name in CLIENTS
        ]
        merge(str(server), updates, job.root / f"s{number}", key=job.key, ledger=job.root / "ledger.jsonl")
        server = job.root / f"s{number}"
    return server


def restored(job: JobFolder, server: Path, blend: float = 1.0) -> Path:
    out = job.root / f"restored-{blend}"
    merge(str(job.model), [], out, key=job.key, restore=str(server), public_base=str(job.root / "base"), blend=blend)
    return out


def mean(name: str, shape: tuple[int, ...], rounds: int) -> Any:
    """What the clients of `play` moved together, in double precision."""
    total = np.zeros(shape)
    for number in range(1, rounds + 1):
        ann, robert = (noise(10 * number + length)(name, shape).astype(np.float64) for length in (3, 6))
        total += (3 * ann + 6 * robert) / 9
    return total


@few(12)
@given(scenarios(fill="base", p1=0.5, double_quant=False, dtype="F32"))
def test_every_unit_of_the_server_model_moves_by_the_mean_of_the_clients(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        server = read_model(play(job, 1))
        before = read_model(job.root / "server")
        for name, (dtype, bits) in before.items():
            if dtype != "F32":
                np.testing.assert_array_equal(server[name][1], bits)
                continue
            wanted = to_floats(bits, dtype) + mean(name, bits.shape, 1)
            np.testing.assert_allclose(to_floats(server[name][1], dtype), wanted, rtol=1e-6, atol=1e-6)


@few(12)
@given(scenarios(fill="base", p1=0.5, double_quant=False, dtype="F32"), st.sampled_from([0.0, 0.25, 1.0]))
def test_a_restore_gives_hidden_units_what_was_learnt_in_their_holes(scenario: Scenario, blend: float) -> None:
    with job_folder(scenario) as job:
        server = play(job, 2)
        whole, base, end = read_model(job.model), read_model(job.root / "base"), read_model(server)
        hidden = hidden_elements(job.model, job.key)
        for name, (dtype, bits) in read_model(restored(job, server, blend)).items():
            if dtype != "F32":
                np.testing.assert_array_equal(whole[name][1], bits)
                continue
            secret, fill, now = (to_floats(model[name][1], dtype) for model in (whole, base, end))
            wanted = np.where(hidden[name], now + blend * (secret - fill), now)
            np.testing.assert_allclose(to_floats(bits, dtype), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_updates_of_zeros_leave_the_model_as_it_was(dtype: str, folder: Path) -> None:
    with job_folder(replace(USUAL, dtype=dtype)) as job:
        server = play(job, 2, lambda number: lambda name, shape: np.zeros(shape))
        before, after = read_model(job.model), read_model(restored(job, server))
        assert {name: bits.tobytes() for name, (_, bits) in before.items()} == {
            name: bits.tobytes() for name, (_, bits) in after.items()
        }


@few(12)
@given(scenarios(fill="base", double_quant=False), st.sampled_from(KINDS))
def test_i1_hidden_weights_change_no_byte_of_a_later_round(scenario: Scenario, kind: str) -> None:
    """The whole way: other hidden weights, masked, released, trained, merged and released once more."""
    with job_folder(replace(scenario, p1=max(scenario.p1, 0.1))) as job:
        first = contents(job.export(play(job, 1), "next", round=2, **ALL))
        changed = job.rewritten("changed", kind)
        again = JobFolder(job.scenario, job.root)
        server = again.server(changed, "server-b")
        proxies = again.export(server, "p1-b", round=1, clients=CLIENTS, **ALL)
        assert contents(proxies) == contents(job.root / "p1")
        records = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
        merge(str(server), [job.root / f"u1-{name}" for name in CLIENTS], job.root / "s1-b", **records)
        assert contents(again.export(job.root / "s1-b", "next-b", round=2, **ALL)) == first


def test_the_next_round_shows_what_clients_made_of_the_public_base() -> None:
    with job_folder(replace(USUAL, format="none", layout=None, p2=0.0)) as job:
        server = play(job, 1)
        proxy = read_model(job.export(server, "next", round=2, clients=("ann",), **ALL) / "ann")
        end, base = read_model(server), read_model(job.root / "base")
        hidden = hidden_elements(job.model, job.key)
        moved = 0
        for name, flags in hidden.items():
            np.testing.assert_array_equal(proxy[name][1], end[name][1])
            moved += int((proxy[name][1][flags] != base[name][1][flags]).sum())
        assert moved > 0.9 * sum(int(flags.sum()) for flags in hidden.values())


def test_the_hidden_set_and_the_release_are_those_of_the_job(folder: Path) -> None:
    with job_folder(USUAL) as job:
        usual = job.export(job.model, "usual", clients=("ann",)) / "ann"
        other = job.export(job.model, "other", clients=("ann",), **ALL) / "ann"
        same = job.export(job.model, "same", clients=("ann",), **ALL) / "ann"
        one, two = (json.loads((proxy / "proxy.json").read_bytes()) for proxy in (usual, other))
        assert "train" not in one and two["train"] == "all"
        assert one["proxy_id"] != two["proxy_id"]
        assert contents(other) == contents(same)
        assert (usual / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        lines = [json.loads(line) for line in (job.root / "ledger.jsonl").read_text().splitlines()]
        assert [line.get("train") for line in lines] == [None, "all"]


def test_a_global_model_has_no_holes_to_merge_into() -> None:
    with job_folder(USUAL) as job:
        proxy = job.export(job.model, "proxies", clients=("ann",), **ALL) / "ann"
        update = send(proxy, job.root / "update")
        with nothing_written(job.root), pytest.raises(RefusedUpdate, match="no holes"):
            merge(str(job.model), [update], job.root / "out", key=job.key, ledger=job.root / "ledger.jsonl")


def test_an_update_of_visible_units_alone_is_refused() -> None:
    with job_folder(USUAL) as job:
        server = job.server(job.model, "server")
        proxy = job.export(server, "proxies", clients=("ann",), **ALL) / "ann"
        twin = job.export(server, "twin", clients=("ann",), train="visible") / "ann"
        update, narrow = send(proxy, job.root / "update"), send(twin, job.root / "narrow")
        (update / "update.safetensors").write_bytes((narrow / "update.safetensors").read_bytes())
        with nothing_written(job.root), pytest.raises(RefusedUpdate, match="expected F32"):
            merge(str(server), [update], job.root / "out", key=job.key, ledger=job.root / "ledger.jsonl")


@pytest.mark.parametrize(("base", "message"), [(None, "so the restore needs it"), ("other", "not the public base")])
def test_a_restore_needs_the_public_base_of_the_job(base: str | None, message: str) -> None:
    with job_folder(USUAL) as job:
        server = play(job, 1)
        make_model(job.root / "other", "bert", seed=5, hidden=33, inner=48)
        reference = str(job.root / base) if base else None
        with nothing_written(job.root), pytest.raises(InputError, match=message):
            merge(str(job.model), [], job.root / "out", key=job.key, restore=str(server), public_base=reference)


def test_a_public_base_is_refused_where_nobody_trained_it() -> None:
    with job_folder(USUAL) as job:
        server = job.server(job.model, "server")
        with nothing_written(job.root), pytest.raises(InputError, match="no client trained"):
            restored(job, server)


def test_zeros_in_the_holes_cannot_be_trained() -> None:
    with (
        job_folder(replace(USUAL, fill="zero")) as job,
        nothing_written(job.root),
        pytest.raises(InputError, match="nothing in the holes"),
    ):
        job.export(job.model, "proxies", **ALL)


def test_a_client_trains_every_unit_of_such_a_proxy(folder: Path) -> None:
    model = build("bert", folder / "model", tokenizer=True)
    base = build("bert", folder / "base", seed=3)
    rows = [{"text": f"w{3 + n} w{5 + n} w9", "label": n % 2} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = {"key": folder / "job.key"}
    mask(str(model), folder / "server", p1=0.5, fill="base", public_base=str(base), **records)
    export_proxy(
        str(folder / "server"),
        folder / "proxy",
        client=["ann"],
        round=1,
        p2=0.1,
        train="all",
        fill="base",
        public_base=str(base),
        ledger=folder / "ledger.jsonl",
        **records,
    )
    client_train(folder / "proxy", folder / "update", data=folder / "data.jsonl", max_steps=2, max_length=8, lr=1e-3)
    update = read_file(folder / "update/update.safetensors")
    for name, (_, bits) in read_model(model).items():
        assert update[name][1].shape == bits.shape
    moved = update["bert.encoder.layer.0.intermediate.dense.weight"][1]
    assert np.count_nonzero(moved) > 0.9 * moved.size
    merge(str(folder / "server"), [folder / "update"], folder / "next", ledger=folder / "ledger.jsonl", **records)
    assert json.loads((folder / "next/fedqsn.json").read_text())["trained_fill"] is True


# ---------------------------------------------------------------- audit


def audited(job: JobFolder, server: Path | None, number: int) -> Any:
    proxies = [job.root / f"p{number}" / name for name in CLIENTS]
    return audit(
        proxies,
        truth=job.model,
        key=job.key,
        ledger=job.root / "ledger.jsonl",
        public_base=job.root / "base",
        server=server,
    )


def test_an_audit_of_a_later_round_builds_its_proxies_again_from_the_server_model() -> None:
    with job_folder(replace(USUAL, hidden=64, inner=128)) as job:
        play(job, 2)
        assert audited(job, None, 1).exit_code == 0
        found = audited(job, job.root / "s1", 2)
        assert found.exit_code == 0
        assert any("cannot be known from these inputs" in one.message for one in found.findings)
        assert audited(job, None, 2).exit_code == 3  # the truth alone does not explain them: no pass
        assert audited(job, job.root / "server", 2).exit_code == 3  # nor does the server model of another round


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_16_bit_numbers_that_meet_by_chance_are_no_leak(dtype: str) -> None:
    """Owner and clients both move the base by a few units in the last place."""
    with job_folder(replace(USUAL, dtype=dtype, hidden=64, inner=128)) as job:
        tensors = read_model(job.root / "base")
        rng = np.random.default_rng(0)
        for name, (kind, bits) in tensors.items():
            if kind == dtype:
                tensors[name] = (kind, (bits + rng.integers(0, 2, bits.shape)).astype(bits.dtype))
        write_file(job.model / "model.safetensors", tensors, {"format": "pt"})
        server = play(job, 1, lambda number: noise(number, 0.0002))
        job.export(server, "p2", round=2, clients=CLIENTS, **ALL)
        before, after = read_model(job.root / "server"), read_model(server)
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        hidden = hidden_elements(job.model, job.key)[name]
        met = (after[name][1] == tensors[name][1]) & (before[name][1] != tensors[name][1]) & hidden
        assert met.sum() > 16  # as many as would be a leak of fp32 numbers
        assert audited(job, server, 2).exit_code == 0


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_hidden_weights_in_the_holes_of_a_server_model_are_found(share: float, dtype: str) -> None:
    """A server model that somebody put hidden weights into, in full or in part, and released."""
    with job_folder(replace(USUAL, dtype=dtype, hidden=64, inner=128)) as job:
        play(job, 1)
        hidden = hidden_elements(job.model, job.key)
        whole, base = read_model(job.model), read_model(job.root / "base")
        tensors = read_model(job.root / "s1")
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        dtype, bits = tensors[name]
        secret, public, now = (to_floats(part, dtype) for part in (whole[name][1], base[name][1], bits))
        leak = np.where(hidden[name], share * secret + (1 - share) * public, now).astype(np.float32)
        tensors[name] = (dtype, to_bits(leak, dtype))
        write_file(job.root / "s1" / "model.safetensors", tensors, {"format": "pt"})
        job.export(job.root / "s1", "p2", round=2, clients=CLIENTS, **ALL)
        found = audited(job, job.root / "s1", 2)
        assert found.exit_code == 4
        assert ("FQ002", "server", name) in {(one.rule, one.scope, one.tensor) for one in found.findings}


def test_attacks_read_what_stands_in_trained_holes() -> None:
    """Holes that hold the hidden weights under noise: no unit is a copy, but the difference is recovered."""
    with job_folder(replace(USUAL, hidden=64, inner=128)) as job:
        play(job, 1)
        hidden = hidden_elements(job.model, job.key)
        whole, base = read_model(job.model), read_model(job.root / "base")
        tensors = read_model(job.root / "s1")
        rng = np.random.default_rng(0)
        for name, (dtype, bits) in tensors.items():
            if hidden.get(name) is None or not hidden[name].any():
                continue
            secret, public, now = (to_floats(part, dtype) for part in (whole[name][1], base[name][1], bits))
            noise = rng.standard_normal(secret.shape) * 0.5 * np.std(secret - public)
            leak = np.where(hidden[name], secret + noise, now).astype(np.float32)
            tensors[name] = (dtype, to_bits(leak, dtype))
        write_file(job.root / "s1" / "model.safetensors", tensors, {"format": "pt"})
        job.export(job.root / "s1", "p2", round=2, clients=CLIENTS, **ALL)
        leaking = audited(job, job.root / "s1", 2)
        (scores,) = [{one.attack: one for one in found.attack_table} for found in leaking.recovery[:1]]
        read, unread = scores["descale, holes as sent"], scores["descale, base fill"]
        assert (read.delta_recovered or 0) > (unread.delta_recovered or 0) + 0.1


def test_an_audit_refuses_a_global_model_as_server_model() -> None:
    with job_folder(replace(USUAL, hidden=64, inner=128)) as job:
        play(job, 1)
        assert audited(job, job.model, 1).exit_code == 3
