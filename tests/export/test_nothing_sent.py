"""p1 = 1: all of the model is hidden, and proxies hold the public base and what clients taught it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fedqsn_cli import audit, client_train, export_proxy, inspect, mask, merge, quantize
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.errors import InputError, RefusedUpdate
from fedqsn_cli.exposure.exposure import exposure
from fedqsn_cli.masks import job_key
from support.families import build
from support.helpers import contents, nothing_written
from support.processes import run
from support.raw_safetensors import read_model, to_floats
from support.training_jobs import labelled

FORMATS: tuple[dict[str, Any], ...] = (
    {"format": "nf4"},
    {"format": "nf4", "layout": "dense"},
    {"format": "int8"},
    {"format": "nf2"},
    {"format": "none"},
)


class Owners:
    """Two owners, a and b, who fine-tuned one public base, each with a job of their own."""

    def __init__(self, home: Path, family: str, **options: Any) -> None:
        self.home = home
        build(family, home / "base", tokenizer=True, seed=11, **options)
        for seed, owner in enumerate("ab"):
            build(family, home / owner, tokenizer=True, seed=seed, **options)

    def job(self, owner: str) -> dict[str, Any]:
        return {"key": self.home / f"{owner}.key", "preset": "base-only", "public_base": str(self.home / "base")}

    def export(self, owner: str, name: str, source: str | None = None, **options: Any) -> Path:
        out = self.home / name
        given: dict[str, Any] = {"client": "ann", "round": 1, "ledger": self.home / f"{owner}.jsonl", "p2": 0.0}
        export_proxy(self.home / (source or owner), out, **{**given, **self.job(owner), **options})
        return out

    def floats(self, name: str) -> dict[str, NDArray[np.float64]]:
        stored = read_model(self.home / name)
        return {tensor: to_floats(bits, dtype).astype(np.float64) for tensor, (dtype, bits) in stored.items()}


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Owners:
    """Two owners of BERT classifiers; tests write under names of their own."""
    return Owners(tmp_path_factory.mktemp("owners"), "bert")


@pytest.fixture(scope="module")
def trained(owners: Owners) -> Owners:
    """Owner a, after one round: server/ is what was masked, update/ what came back, next/ what they were merged to."""
    owners.export("a", "proxy")
    mask(owners.home / "a", owners.home / "server", **owners.job("a"))
    data = labelled(owners.home / "data.jsonl")
    client_train(owners.home / "proxy", owners.home / "update", data=data, lr=1e-3)
    merge(owners.home / "server", [owners.home / "update"], owners.home / "next", **_merge_job(owners))
    return owners


def _merge_job(owners: Owners) -> dict[str, Any]:
    return {"key": owners.home / "a.key", "ledger": owners.home / "a.jsonl"}


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "t5"])
def test_first_proxies_of_two_owners_hold_the_same_tensors(family: str, tmp_path: Path) -> None:
    owners = Owners(tmp_path, family)
    for number, options in enumerate(FORMATS):
        one, other = (owners.export(owner, f"{owner}-{number}", **options) for owner in "ab")
        for name in ("model.safetensors", "visible.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), (options, name)
    tensors = load_file(tmp_path / "a-4" / "model.safetensors")
    public = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(tensors[name], public[name]) for name in tensors)


def test_no_weight_of_the_owner_is_looked_at(owners: Owners, tmp_path: Path) -> None:
    shutil.copytree(owners.home / "a", tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    save_file({name: x * float("nan") for name, x in load_file(path).items()}, path, {"format": "pt"})
    owners.export("a", "of-sound")
    job = {"ledger": tmp_path / "l.jsonl", "source": str(tmp_path / "damaged")}
    owners.export("a", "of-damaged", **job)
    assert contents(owners.home / "of-sound") == contents(owners.home / "of-damaged")


def test_all_three_ways_to_a_proxy_are_one(owners: Owners) -> None:
    direct = owners.export("b", "direct")
    mask(owners.home / "b", owners.home / "b-server", **owners.job("b"))
    quantize(owners.home / "b-server", owners.home / "b-quantized", format="nf4")
    for source in ("b-server", "b-quantized"):
        assert contents(owners.export("b", f"of-{source}", source)) == contents(direct)


def test_nothing_counts_as_seen(owners: Owners) -> None:
    owners.export("a", "proxy-of-budget", budget=0.0)
    found = exposure(job_key.load(owners.home / "a.key"), ledger.read(owners.home / "a.jsonl"))
    assert found.hidden_share == 1.0 and found.clear_share == 0.0
    assert all(client.shares[-1] == 0.0 for client in found.clients)


def test_clients_train_all_of_it_and_the_restore_adds_what_they_learnt(trained: Owners) -> None:
    whole, base, server, next_ = (trained.floats(name) for name in ("a", "base", "server", "next"))
    assert all(np.array_equal(server[name], base[name]) for name in base)
    assert all(not np.array_equal(next_[name], base[name]) for name in base if "position_ids" not in name)
    for blend in (0.0, 0.25, 1.0):
        out = f"restored-{blend}"
        restore = {"restore": trained.home / "next", "public_base": trained.home / "base", "blend": blend}
        merge(trained.home / "a", [], trained.home / out, key=trained.home / "a.key", **restore)
        for name, found in trained.floats(out).items():
            expected = next_[name] + blend * (whole[name] - base[name])
            assert np.allclose(found, expected, rtol=0, atol=1e-6), (blend, name)


def test_the_next_round_starts_from_what_clients_taught(trained: Owners) -> None:
    proxy = trained.export("a", "second", "next", round=2, format="none")
    assert trained.floats("second").keys() == trained.floats("next").keys()
    for name, found in trained.floats("second").items():
        assert np.array_equal(found, trained.floats("next")[name]), name
    assert json.loads((proxy / "proxy.json").read_text())["round"] == 2


def test_an_update_of_an_earlier_round_is_refused(trained: Owners, tmp_path: Path) -> None:
    with pytest.raises(RefusedUpdate, match="proxies of another model"):
        merge(trained.home / "next", [trained.home / "update"], tmp_path / "out", **_merge_job(trained))


def test_inspect_says_what_it_means(trained: Owners) -> None:
    for name in ("proxy", "server", "next"):
        facts = inspect(trained.home / name).facts
        assert facts["hidden"] == 1.0 and "nothing of the owner's model is in it" in facts["meaning"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": None, "p1": 1.0, "fill": "zero", "public_base": None}, "leaves nothing to train"),
        ({"preset": None, "p1": 1.0, "fill": "base", "train": "visible"}, "nothing would be trained"),
        ({"where": "outputs"}, "--where shows a part of it"),
        ({"layers": "0"}, "--layers shows a part of it"),
        ({"p1": 1.5}, "out of range"),
        ({"p1": float("nan")}, "out of range"),
    ],
)
def test_what_contradicts_it_is_refused(owners: Owners, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with nothing_written(tmp_path), pytest.raises(InputError, match=message):
        owners.export("a", str(tmp_path / "out"), key=tmp_path / "new.key", ledger=tmp_path / "l", **options)


def test_a_plan_file_that_shows_a_tensor_is_refused(owners: Owners, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('[[rule]]\nmatch = "*pooler.dense.weight"\nmasked = false\n')
    options = {"key": tmp_path / "k", "ledger": tmp_path / "l", "plan_file": tmp_path / "plan.toml"}
    with pytest.raises(InputError, match="the plan file shows a part of it"):
        owners.export("a", str(tmp_path / "out"), **options)


@pytest.mark.parametrize(
    "tensor", ["bert.encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0.attention.self.query.bias"]
)
def test_a_base_without_a_norm_or_a_bias_is_refused(owners: Owners, tmp_path: Path, tensor: str) -> None:
    shutil.copytree(owners.home / "base", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if name != tensor}, path, {"format": "pt"})
    options = {"key": tmp_path / "k", "ledger": tmp_path / "l", "public_base": tmp_path / "base"}
    with pytest.raises(InputError, match="has no such tensor"):
        owners.export("a", str(tmp_path / "out"), **options)


def test_a_buffer_of_integers_comes_from_the_base_too(owners: Owners, tmp_path: Path) -> None:
    for name, values in (("a", torch.arange(8)), ("base", torch.arange(8)), ("without", None)):
        shutil.copytree(owners.home / ("a" if name == "a" else "base"), tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        buffer = {} if values is None else {"bert.embeddings.position_ids": values[None] + 100 * (name == "a")}
        save_file(load_file(path) | buffer, path, {"format": "pt"})
    options = {"key": tmp_path / "k", "ledger": tmp_path / "l", "source": str(tmp_path / "a"), "format": "none"}
    owners.export("a", str(tmp_path / "out"), public_base=tmp_path / "base", **options)
    found = load_file(tmp_path / "out" / "model.safetensors")["bert.embeddings.position_ids"]
    assert torch.equal(found, torch.arange(8)[None])
    with pytest.raises(InputError, match="has no such tensor"):
        owners.export("a", str(tmp_path / "no"), public_base=tmp_path / "without", **options)


def test_as_a_command(owners: Owners, tmp_path: Path) -> None:
    done = run(
        *("export-proxy", owners.home / "a", "--out", tmp_path / "out", "--client", "ann", "--round", "1"),
        *("--key", tmp_path / "k", "--ledger", tmp_path / "l", "--p2", "0"),
        *("--preset", "base-only", "--public-base", owners.home / "base", "--json"),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["hidden_by_server"] == 1.0


def test_an_audit_of_both_rounds_passes(trained: Owners) -> None:
    owner = {"truth": trained.home / "a", "key": trained.home / "a.key", "ledger": trained.home / "a.jsonl"}
    first = [trained.export("a", f"audited-{client}", client=client, round=7) for client in ("ann", "bob")]
    found = audit(first, public_base=trained.home / "base", **owner)
    assert (found.verdict, found.findings) == ("passed", ())
    later = trained.export("a", "audited-later", "next", round=8)
    found = audit([later], public_base=trained.home / "base", server=trained.home / "next", **owner)
    assert found.verdict == "passed" and all(finding.severity == "info" for finding in found.findings)


def test_an_audit_finds_a_weight_of_the_owner(owners: Owners) -> None:
    proxy = owners.export("b", "leaking", format="none", round=9)
    path, norm = proxy / "model.safetensors", "bert.encoder.layer.0.output.LayerNorm.weight"
    secret = load_file(owners.home / "b" / "model.safetensors")[norm] + 1.0
    save_file(load_file(path) | {norm: secret}, path, {"format": "pt"})
    owner = {"truth": owners.home / "b", "key": owners.home / "b.key", "ledger": owners.home / "b.jsonl"}
    assert audit([proxy], public_base=owners.home / "base", **owner).verdict == "broken"
