"""I1, non-interference: change every hidden weight to anything, and every byte of every proxy stays the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import export_proxy, mask, merge
from fedqsn_cli.errors import InputError
from support.helpers import (
    contents,
    hidden_elements,
    make_config,
    make_model,
    make_tensors,
    noise,
    nothing_written,
    read_model,
    send,
    write_model,
)
from support.scenario import KINDS, JobFolder, Scenario, few, job_folder, replaced, scenarios


@few(40)
@given(scenarios(), st.sampled_from(KINDS))
def test_i1_hidden_weights_change_no_byte_of_any_proxy(scenario: Scenario, kind: str) -> None:
    with job_folder(scenario) as job:
        proxies = contents(job.export(job.model, "proxies"))
        changed = job.rewritten("changed", kind)
        assert contents(job.export(changed, "again")) == proxies
        assert len((job.root / "ledger.jsonl").read_bytes().splitlines()) == 2


@few(25)
@given(scenarios(), st.sampled_from(KINDS))
def test_i1_hidden_weights_change_no_byte_of_any_proxy_of_a_server_model(scenario: Scenario, kind: str) -> None:
    with job_folder(scenario) as job:
        proxies = contents(job.export(job.model, "proxies"))
        server = job.server(job.rewritten("changed", kind), "server")
        assert contents(job.export(server, "again")) == proxies
        packed = job.quantized(server, "packed")
        assert contents(job.export(packed, "third")) == proxies


@few(15)
@given(scenarios(), st.sampled_from(KINDS))
def test_i1_hidden_weights_change_no_byte_of_the_server_model(scenario: Scenario, kind: str) -> None:
    with job_folder(scenario) as job:
        server = contents(job.server(job.model, "server"))
        again = contents(job.server(job.rewritten("changed", kind), "again"))
        records = [json.loads(files.pop("fedqsn.json")) for files in (server, again)]
        for record in records:
            record["source"] = None  # says from which folder it was made
        assert records[0] == records[1]
        assert server == again


@few(10)
@given(scenarios(fill="zero", p1=0.5, p2=0.1, format="nf4"), st.sampled_from(KINDS))
def test_i1_hidden_weights_change_no_byte_of_a_later_round(scenario: Scenario, kind: str) -> None:
    with job_folder(scenario) as job:
        proxies = job.export(job.model, "proxies")
        updates = [send(proxies / name, job.root / f"u-{name}", noise(len(name))) for name in ("ann", "bob")]
        rounds = []
        for source in (job.model, job.rewritten("changed", kind)):
            following = job.root / f"next-{source.name}"
            merge(str(source), updates, following, key=job.key, ledger=job.root / "ledger.jsonl")
            rounds.append(contents(job.export(following, f"second-{source.name}", round=2)))
        assert rounds[0] == rounds[1]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "gpt_oss"])
@pytest.mark.parametrize("axis", ["neuron", "input", "element"])
def test_i1_the_hidden_share_of_every_masked_tensor_is_absent_from_the_server_model(
    family: str, axis: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", family, hidden=33)
    mask(str(model), tmp_path / "server", key=tmp_path / "key", p1=0.3, axis=axis)
    before, after = read_model(model), read_model(tmp_path / "server")
    hidden = hidden_elements(model, tmp_path / "key")
    manifest = json.loads((tmp_path / "server" / "fedqsn.json").read_bytes())
    masked = set(manifest["tensors"])
    assert {name for name, flags in hidden.items() if flags.any()} == masked
    for name, (_, bits) in after.items():
        assert not bits[hidden[name]].any()
        np.testing.assert_array_equal(bits[~hidden[name]], before[name][1][~hidden[name]])
        for group in manifest["tensors"].get(name, {"groups": ()})["groups"]:
            units = manifest["groups"][group]["units"]
            assert manifest["groups"][group]["hidden"] == round(0.3 * units)
    wide = {name for name, (dtype, bits) in before.items() if bits.ndim > 1 and dtype == "F32"}
    public = {"model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.down_proj_bias"}
    assert wide - (public if axis == "input" else set()) <= masked


def test_i1_a_visible_weight_does_change_the_proxy(tmp_path: Path) -> None:
    job = JobFolder(Scenario("bert", "F32", 64, 128, 1, "neuron", "nf4", None, 64, False, "zero", 0.5, 0.1), tmp_path)
    make_model(job.model, "bert", hidden=64, inner=128)
    proxies = contents(job.export(job.model, "proxies"))
    other = make_model(tmp_path / "other", "bert", hidden=64, inner=128, seed=5)
    assert contents(job.export(other, "again")) != proxies


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_i1_a_visible_number_that_is_not_finite_is_refused(kind: str, tmp_path: Path) -> None:
    tensors = make_tensors("bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    dtype, bits = tensors[name]
    only = np.zeros(bits.shape, np.bool_)
    only[:, 3] = True
    tensors[name] = (dtype, replaced(bits, dtype, only, kind))
    model = write_model(tmp_path / "model", tensors, make_config("bert"))
    with nothing_written(tmp_path), pytest.raises(InputError, match="NaN or infinity.*visible|visible.*NaN") as caught:
        export_proxy(
            str(model),
            tmp_path / "p",
            client=["ann"],
            round=1,
            p1=0.3,
            p2=0.1,
            key=tmp_path / "key",
            ledger=tmp_path / "ledger.jsonl",
        )
    assert caught.value.where == name
