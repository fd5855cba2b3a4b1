"""mask and quantize: what a server model is, and what the two refuse."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from fedqsn_cli import export_proxy, mask, quantize
from fedqsn_cli.errors import InputError, KeyFileError, OutputExists
from support.helpers import (
    contents,
    hidden_elements,
    make_config,
    make_model,
    make_tensors,
    noise,
    nothing_written,
    read_file,
    read_model,
    send,
    to_bits,
    write_file,
    write_model,
)
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


@pytest.fixture
def job(folder: Path) -> JobFolder:
    make_model(folder / "model", "bert", hidden=33)
    return JobFolder(USUAL, folder)


# ---------------------------------------------------------------- mask


@few(20)
@given(scenarios(fill="base", p1=0.5))
def test_with_a_public_base_its_units_stand_in_the_holes(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        server = read_model(job.server(job.model, "server"))
        model, base = read_model(job.model), read_model(job.root / "base")
        for name, hidden in hidden_elements(job.model, job.key).items():
            np.testing.assert_array_equal(server[name][1], np.where(hidden, base[name][1], model[name][1]))


def test_a_server_model_is_a_checkpoint_with_its_tokenizer(job: JobFolder) -> None:
    (job.model / "tokenizer.json").write_text('{"version": "1.0"}')
    (job.model / "training_args.bin").write_bytes(b"pickled")
    server = job.server(job.model, "server")
    assert {path.name for path in server.iterdir()} == {
        "config.json",
        "fedqsn.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (server / "config.json").read_bytes() == (job.model / "config.json").read_bytes()


def test_the_manifest_of_a_server_model_says_how_it_was_masked_but_not_where(job: JobFolder) -> None:
    result = mask(str(job.model), job.root / "server", key=job.key, p1=0.3, axis="input", rescale=False)
    text = (job.root / "server/fedqsn.json").read_text()
    manifest = json.loads(text)
    facts = [manifest[name] for name in ("kind", "p1", "axis", "rescale")]
    assert facts == ["server-model", 0.3, "input", False]
    assert manifest["model_digest"] == result.model_digest
    assert json.loads(job.key.read_text())["key"] not in text
    hidden = hidden_elements(job.model, job.key)
    share = sum(flags.sum() for flags in hidden.values()) / sum(flags.size for flags in hidden.values())
    assert result.hidden == pytest.approx(share)
    assert result.kind == "server-model" and result.key_created


def test_the_model_digest_is_that_of_the_export(job: JobFolder) -> None:
    digest = mask(str(job.model), job.root / "server", key=job.key, p1=0.3).model_digest
    exported = export_proxy(
        str(job.model),
        job.root / "p",
        client="ann",
        round=1,
        key=job.key,
        p2=0.2,
        ledger=job.root / "ledger.jsonl",
    )
    assert exported.model_digest == digest


def test_the_residual_of_a_16_bit_model_goes_with_its_visible_part(folder: Path) -> None:
    job = JobFolder(Scenario("llama", "BF16", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.5, 0.2), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=33)
    residual = {name: ("BF16", np.full_like(bits, 0x3A00)) for name, (_, bits) in read_model(job.model).items()}
    write_file(job.model / "fedqsn-residual.safetensors", residual)
    server = job.server(job.model, "server")
    kept = read_file(server / "fedqsn-residual.safetensors")
    for name, hidden in hidden_elements(job.model, job.key).items():
        np.testing.assert_array_equal(kept[name][1] == 0, hidden)


@pytest.mark.parametrize("change", ["lacks a tensor", "has another shape", "has another dtype", "has one more"])
def test_i11_a_residual_of_another_model_is_refused(change: str, folder: Path) -> None:
    job = JobFolder(Scenario("llama", "BF16", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.5, 0.2), folder)
    make_model(job.model, "llama", dtype="BF16", hidden=33)
    residual: Any = {name: ("BF16", np.zeros_like(bits)) for name, (_, bits) in read_model(job.model).items()}
    if change == "lacks a tensor":
        del residual["lm_head.weight"]
    elif change == "has another shape":
        residual["lm_head.weight"] = ("BF16", np.zeros((2, 2), np.uint16))
    elif change == "has another dtype":
        residual["lm_head.weight"] = ("F32", residual["lm_head.weight"][1].astype(np.uint32))
    else:
        residual["more.weight"] = ("BF16", np.zeros((2, 2), np.uint16))
    write_file(job.model / "fedqsn-residual.safetensors", residual)
    with nothing_written(folder), pytest.raises(InputError, match="residual"):
        job.server(job.model, "server")


def test_one_safetensors_file_without_a_config_can_be_masked(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    write_file(folder / "single.safetensors", {name: make_tensors("llama")[name]})
    mask(str(folder / "single.safetensors"), folder / "server", key=folder / "key", p1=0.25)
    bits = read_model(folder / "server")[name][1]
    assert (bits == 0).all(axis=1).sum() >= 8
    assert not (folder / "server/config.json").exists()


WRONG_MASKS: list[tuple[dict[str, Any], str]] = [
    ({"p1": None}, "no key"),
    ({"p1": 1.5}, "out of range"),
    ({"axis": "depth"}, "--axis: '[a-z]*' is not a choice"),
    ({"fill": "base"}, "needs the public base"),
    ({"fill": "noise"}, "fill"),
    ({"public_base": "model"}, "only used with"),
    ({"round": 1}, "--round"),
    ({"p2": 0.1}, "--p2"),
    ({"client": "ann"}, "--round|--p2"),
    ({"client": "ann", "round": 1}, "--p2"),
    ({"client": "ann", "p2": 0.1}, "--round"),
    ({"client": "../ann", "round": 1, "p2": 0.1}, "client id"),
    ({"client": "ann", "round": -1, "p2": 0.1}, "-1 is not 0 or more"),
    ({"client": "ann", "round": 1, "p2": 1.0}, "not a ratio"),
    ({"client": "ann", "round": 1, "p2": 0.1, "schedule": "monthly"}, "schedule"),
    ({"plan": "missing.toml"}, "missing.toml"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG_MASKS, ids=lambda value: str(value)[:50])
def test_i11_wrong_options_of_mask_are_refused_and_nothing_is_written(
    options: dict[str, Any], complaint: str, job: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.root)
    with nothing_written(job.root), pytest.raises(InputError, match=complaint):
        mask(str(job.model), job.root / "server", **{"key": job.key, "p1": 0.3} | options)


def test_i11_a_server_model_is_not_masked_by_the_server_again(job: JobFolder) -> None:
    server = job.server(job.model, "server")
    packed = job.quantized(server, "packed")
    with nothing_written(job.root):
        for source in (server, packed):
            with pytest.raises(InputError, match="already"):
                job.server(source, "again")
    for_ann: dict[str, Any] = {"key": job.key, "client": "ann", "round": 1, "p2": 0.2}
    mask(str(packed), job.root / "masked", **for_ann)
    with nothing_written(job.root), pytest.raises(InputError, match="client mask"):
        mask(str(job.root / "masked"), job.root / "twice", **for_ann)
    with nothing_written(job.root), pytest.raises(InputError):
        quantize(str(job.root / "masked"), job.root / "twice", format="nf4")


def test_i11_a_job_keeps_its_p1_plan_and_axis(job: JobFolder) -> None:
    job.server(job.model, "server")
    for options in ({"p1": 0.2}, {"p1": 0.3, "axis": "input"}):
        with nothing_written(job.root), pytest.raises(KeyFileError, match="belongs to a job"):
            mask(str(job.model), job.root / "other", key=job.key, **options)


def test_i11_a_key_path_that_is_no_private_file_is_refused(job: JobFolder) -> None:
    job.server(job.model, "server")
    copy = job.root / "copy.key"
    copy.write_bytes(job.key.read_bytes())
    copy.chmod(0o640)
    link = job.root / "dangling.key"
    link.symlink_to(job.root / "nowhere")
    (job.root / "folder.key").mkdir()
    (job.root / "text.key").write_text("{}")
    (job.root / "text.key").chmod(0o600)
    for key in (copy, link, job.root / "folder.key", job.root / "text.key"):
        with nothing_written(job.root), pytest.raises(KeyFileError):
            mask(str(job.model), job.root / "other", key=key, p1=0.3)


def test_a_failed_mask_leaves_no_key_behind(job: JobFolder) -> None:
    (job.root / "taken").mkdir()
    with nothing_written(job.root), pytest.raises(OutputExists):
        mask(str(job.model), job.root / "taken", key=job.key, p1=0.3)


def test_a_key_is_created_private_whatever_the_umask(job: JobFolder) -> None:
    old = os.umask(0)
    try:
        job.server(job.model, "server")
    finally:
        os.umask(old)
    assert stat.S_IMODE(job.key.stat().st_mode) == 0o600


# ---------------------------------------------------------------- quantize


@few(15)
@given(scenarios(fill="zero"))
def test_quantize_with_format_none_changes_no_weight(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        server = job.server(job.model, "server")
        quantize(str(server), job.root / "plain", format="none")
        assert (job.root / "plain/model.safetensors").read_bytes() == (server / "model.safetensors").read_bytes()


def test_quantize_reports_what_is_quantized(job: JobFolder) -> None:
    result = quantize(str(job.model), job.root / "packed", format="nf4")
    assert result.quantization is not None
    assert (result.quantization.format, result.quantization.layout) == ("nf4", "bnb")
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.shares["masked_quantized"] > 0.8


WRONG_QUANTIZE: list[tuple[dict[str, Any], str]] = [
    ({"format": "nf5"}, "--format: 'nf5' is not a choice"),
    ({"format": "nf4", "block_size": 65}, "block size"),
    ({"format": "nf4", "block_size": 8192}, "block size"),
    ({"format": "nf2", "layout": "bnb"}, "bitsandbytes layout"),
    ({"format": "int8", "double_quant": True}, "double quantization"),
    ({"format": "nf4", "layout": "sparse"}, "--layout: '[a-z]*' is not a choice"),
    ({"format": "nf4", "max_shard_size": "-1"}, "not a size"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG_QUANTIZE, ids=lambda value: str(value)[:50])
def test_i11_wrong_options_of_quantize_are_refused_and_nothing_is_written(
    options: dict[str, Any], complaint: str, job: JobFolder
) -> None:
    with nothing_written(job.root), pytest.raises(InputError, match=complaint):
        quantize(str(job.model), job.root / "packed", **options)


def test_i11_what_is_quantized_is_not_quantized_again(job: JobFolder) -> None:
    packed = job.quantized(job.model, "packed")
    proxy = job.export(job.model, "proxies") / "ann"
    update = send(proxy, job.root / "update", noise(1))
    for source in (packed, proxy, update, job.root / "ledger.jsonl", job.key, job.root / "nowhere"):
        with nothing_written(job.root), pytest.raises(InputError):
            quantize(str(source), job.root / "again", format="nf4")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_tensors_of_one_constant_are_no_copies_of_each_other(dtype: str, folder: Path) -> None:
    tensors = make_tensors("bert", dtype=dtype, hidden=128)
    for name in ("intermediate.dense.bias", "output.dense.bias", "attention.self.query.bias"):
        full = f"bert.encoder.layer.0.{name}"
        tensors[full] = (dtype, to_bits(np.full(128, 0.1, np.float32), dtype))
        tensors[full.replace("bias", "weight")] = (dtype, to_bits(np.full((128, 128), 0.1, np.float32), dtype))
    model = write_model(folder / "model", tensors, make_config("bert", dtype))
    mask(str(model), folder / "server", key=folder / "key", p1=0.3)


@pytest.mark.parametrize("fault", ["weight_map points outside", "a shard is missing", "pickles only", "absolute path"])
def test_i11_a_malformed_checkpoint_is_refused(fault: str, folder: Path) -> None:
    model = make_model(folder / "model", "bert", shards=2)
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    (folder / "outside.safetensors").write_bytes((model / document["weight_map"][name]).read_bytes())
    if fault == "weight_map points outside":
        document["weight_map"][name] = "../outside.safetensors"
    elif fault == "absolute path":
        document["weight_map"][name] = str(folder / "outside.safetensors")
    index.write_text(json.dumps(document))
    if fault == "a shard is missing":
        (model / document["weight_map"][name]).unlink()
    if fault == "pickles only":
        for file in model.glob("model*"):
            file.unlink()
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with nothing_written(folder):
        with pytest.raises(InputError):
            mask(str(model), folder / "server", key=folder / "key", p1=0.3)
        with pytest.raises(InputError):
            quantize(str(model), folder / "packed", format="nf4")


def test_i11_a_float_type_that_cannot_be_masked_is_refused(folder: Path) -> None:
    tensors = make_tensors("bert")
    name = "bert.pooler.dense.weight"
    tensors[name] = ("F64", np.zeros((32, 32), np.float64))
    model = write_model(folder / "model", tensors, make_config("bert"))
    with nothing_written(folder), pytest.raises(InputError, match="F64"):
        mask(str(model), folder / "server", key=folder / "key", p1=0.3)


def test_i11_a_value_beyond_the_range_of_int8s_half_precision_is_refused(folder: Path) -> None:
    tensors = make_tensors("bert")
    name = "bert.pooler.dense.weight"
    bits = tensors[name][1].copy()
    bits[3, 3] = np.float32(1e6).view(np.uint32)
    tensors[name] = ("F32", bits)
    model = write_model(folder / "model", tensors, make_config("bert"))
    with nothing_written(folder), pytest.raises(InputError, match="int8"):
        quantize(str(model), folder / "packed", format="int8")


def test_replacing_with_force_leaves_only_the_new_artifact(job: JobFolder) -> None:
    job.quantized(job.model, "packed")
    (job.root / "packed/note.txt").write_text("left here by somebody")
    quantize(str(job.model), job.root / "packed", format="fp4", force=True)
    assert "note.txt" not in contents(job.root / "packed")
    assert sorted(path.name for path in job.root.iterdir()) == ["model", "packed"]
