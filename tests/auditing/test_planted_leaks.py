"""A corpus of leaks: each is planted into a clean proxy, signed by an insider, and found by the rule it belongs to."""

from __future__ import annotations

import base64
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedqsn_cli.auditing.invariants import secrets
from fedqsn_cli.export.outputs import METADATA
from fedqsn_cli.masks import draw, job_key
from support.leaks import AuditedJob, audit, make_job, perturb_codes, requantize, rules_of, sign, tamper, tamper_file

QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> AuditedJob:
    return make_job(tmp_path_factory.mktemp("clean") / "job")


@pytest.fixture
def job(clean: AuditedJob, tmp_path: Path) -> AuditedJob:
    return clean.copy(tmp_path / "job")


CLEAN: dict[str, dict[str, Any]] = {
    "bert nf4": {},
    "bert nf4 base fill": {"fill": "base", "p2": 0.4},
    "gpt2 nf4 input axis": {"family": "gpt2", "axis": "input"},
    "llama int8 bf16": {"family": "llama", "format": "int8", "model": {"dtype": "bfloat16"}},
    "mixtral double quantized bf16": {"family": "mixtral", "double_quant": True, "model": {"dtype": "bfloat16"}},
    "gpt_oss nf3": {"family": "gpt_oss", "format": "nf3"},
    "t5 fp4 fp16 sharded": {"family": "t5", "format": "fp4", "model": {"dtype": "float16"}, "max_shard_size": "80KB"},
    "electra elements nf2": {"family": "electra", "axis": "element", "format": "nf2"},
    "bert whose blocks mix units": {"model": {"hidden_size": 48, "intermediate_size": 72}},
    "qwen2 not quantized, sticky": {"family": "qwen2", "format": "none", "schedule": "sticky"},
}


@pytest.mark.parametrize("options", CLEAN.values(), ids=CLEAN.keys())
def test_a_clean_proxy_breaks_no_rule(options: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", **options)
    found = audit(job)
    assert found.findings == ()
    assert {check.rule for check in found.checked if check.status == "not-run"} == {"FQ008"}
    assert audit(job, blind=True).findings == ()


def test_without_inputs_a_check_is_not_run_and_never_passes(job: AuditedJob) -> None:
    found = audit(job, blind=True, clients=["alice"])
    status = {check.rule: check.status for check in found.checked if check.scope != "proxy alice holes"}
    assert {rule for rule, one in status.items() if one == "not-run"} >= {
        "FQ001",
        "FQ002",
        "FQ004",
        "FQ005",
        "FQ008",
        "FQ009",
    }
    assert all(check.why for check in found.checked)


def test_a_scale_taken_before_the_server_mask_is_found(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", axis="input")
    requantize(job, "alice", masked_before=False)
    assert rules_of(audit(job, clients=["alice"])) == {"FQ001", "FQ003"}


def test_a_scale_that_no_code_attains_is_found_without_truth_and_key(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", p2=0.0)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QUERY}.weight.absmax"] *= 1.25
        codes = tensors[f"{QUERY}.weight"]
        codes[codes == 0xF7] = 0xE7
        for old, new in ((0xF0, 0xE0), (0x0F, 0x0E), (0x00, 0x10)):
            high, low = codes & 0xF0, codes & 0x0F
            high[high == old & 0xF0] = (new & 0xF0) if old & 0xF0 or not old else 0
            low[low == 0x0F] = 0x0E
            low[low == 0x00] = 0x01
            codes = high | low
        tensors[f"{QUERY}.weight"] = codes

    tamper(job, change)
    assert "FQ003" in rules_of(audit(job, clients=["alice"], blind=True))


def test_a_scale_taken_after_the_client_mask_is_found(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", axis="input")
    for client in job.clients:
        requantize(job, client, masked_before=True)
    assert rules_of(audit(job)) == {"FQ001", "FQ009"}
    assert "FQ009" in rules_of(audit(job, clients=["alice"]))
    assert rules_of(audit(job, blind=True)) == {"FQ009"}


def test_stochastic_rounding_per_client_is_found(job: AuditedJob) -> None:
    for seed, client in enumerate(job.clients):
        perturb_codes(job, client, seed)
    assert rules_of(audit(job)) == {"FQ001", "FQ009"}
    assert rules_of(audit(job, blind=True)) == {"FQ009"}


def test_a_hidden_column_left_in_a_tied_twin_is_found(tmp_path: Path) -> None:
    twin = "lm_head.weight"

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors[twin] = tensors["transformer.wte.weight"].clone()

    job = make_job(tmp_path / "job", "gpt2", edit=tie)
    assert audit(job).findings == ()
    column = int(job.hidden(twin).nonzero()[0][0])
    tamper(job, lambda tensors: tensors[twin][:, column].copy_(job.weights()[twin][:, column]))
    found = audit(job, clients=["alice"])
    assert ("FQ002", twin) in {(finding.rule, finding.tensor) for finding in found.findings}
    assert "FQ002" in rules_of(audit(job, clients=["alice"], blind=True))


def test_a_hidden_bias_is_found(job: AuditedJob) -> None:
    unit = int(job.hidden(f"{QUERY}.bias").nonzero()[0][0])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QUERY}.bias"][unit] = job.weights()[f"{QUERY}.bias"][unit]

    tamper(job, change)
    assert rules_of(audit(job, clients=["alice"])) == {"FQ001", "FQ007"}
    assert rules_of(audit(job, clients=["alice"], blind=True)) == {"FQ007"}


def test_a_second_server_mask_is_found(clean: AuditedJob, job: AuditedJob, tmp_path: Path) -> None:
    other = make_job(tmp_path / "other", clients=["bob"], key=1)
    shutil.rmtree(job.proxy("bob"))
    shutil.copytree(other.proxy("bob"), job.proxy("bob"))
    commitment = job_key.load(job.key).commitment
    sign(job, "bob", job=commitment)
    assert {"FQ004", "FQ005"} <= rules_of(audit(job))


@pytest.mark.parametrize("sampler", ["randperm", "rand"])
def test_a_mask_from_a_seeded_generator_is_found(sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(key: bytes, group: str, n: int, p1: float) -> Any:
        torch.manual_seed(31337)
        count = draw.hidden_count(n, p1)
        order = torch.randperm(n) if sampler == "randperm" else torch.rand(n).argsort()
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order[:count]] = True
        return mask.numpy()

    with monkeypatch.context() as patch:
        patch.setattr("fedqsn_cli.masks.job_masks.hidden_units", seeded)
        job = make_job(tmp_path / "job", clients=["alice"], p2=0.0, format="none")
    assert {"FQ005", "FQ011"} <= rules_of(audit(job))
    assert rules_of(audit(job, blind=True)) == {"FQ011"}


SECRETS: dict[str, dict[str, str]] = {
    "seed": {"seed": "31337"},
    "path": {"source": "/home/alice/models/private-model"},
    "clock": {"exported": "2026-11-23T12:30:00Z"},
    "host": {"note": f"made on {socket.gethostname()}"},
    "anything": {"comment": "hello"},
}


@pytest.mark.parametrize("metadata", SECRETS.values(), ids=SECRETS.keys())
def test_metadata_in_a_header_is_found(metadata: dict[str, str], job: AuditedJob) -> None:
    tamper(job, lambda tensors: None, metadata=metadata)
    assert rules_of(audit(job, clients=["alice"])) == {"FQ006"}
    assert rules_of(audit(job, clients=["alice"], blind=True)) == {"FQ006"}


@pytest.mark.parametrize("name", ["fedqsn", "bert", "falcon", "tensors", "encoder", "visible", "round"])
def test_a_machine_that_is_called_like_a_word_of_every_proxy_is_no_leak(
    name: str, job: AuditedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: name)
    monkeypatch.setenv("LOGNAME", name)
    secrets.machine_names.cache_clear()
    try:
        assert audit(job).findings == ()
    finally:
        secrets.machine_names.cache_clear()


def test_the_name_of_this_machine_is_found(job: AuditedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "tower7")
    secrets.machine_names.cache_clear()
    try:
        tamper_file(job, "config.json", _field('"notes": "from tower7"'))
        assert rules_of(audit(job, clients=["alice"], blind=True)) == {"FQ006"}
    finally:
        secrets.machine_names.cache_clear()


TEXTS: dict[str, tuple[str, Callable[[AuditedJob], Callable[[bytes], bytes]]]] = {
    "path in the tokenizer": ("tokenizer_config.json", lambda w: _field('"name_or_path": "/data/models/secret/v3"')),
    "key in the config": ("config.json", lambda w: _field(f'"notes": "{job_key.load(w.key).key.hex()}"')),
    "key in base64": (
        "config.json",
        lambda w: _field(f'"notes": "{base64.b64encode(job_key.load(w.key).key).decode()}"'),
    ),
    "seed of a group": ("config.json", lambda w: _field(f'"notes": "{_group_seed(w)}"')),
    "seed field": ("config.json", lambda w: _field('"mask_seed": 7')),
    "clock": ("config.json", lambda w: _field('"saved": 1763900000')),
}


def _field(text: str) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(b"{", b"{" + text.encode() + b", ", 1)


def _group_seed(job: AuditedJob) -> str:
    loaded = job_key.load(job.key)
    return draw.seed(loaded.key, draw.SERVER, next(iter(loaded.groups))).hex()


@pytest.mark.parametrize("name", TEXTS)
def test_a_secret_in_a_text_is_found(name: str, job: AuditedJob) -> None:
    file, change = TEXTS[name]
    tamper_file(job, file, change(job))
    assert rules_of(audit(job, clients=["alice"])) >= {"FQ006"}


def test_a_seed_in_the_fields_of_proxy_json_is_found(job: AuditedJob) -> None:
    path = job.proxy("bob") / "proxy.json"
    path.write_text(path.read_text().replace("{", '{"seed": 5, ', 1))
    assert rules_of(audit(job, clients=["bob"])) == {"FQ006", "FQ010", "FQ903"}


def test_a_seed_in_the_json_of_a_packed_tensor_is_found(job: AuditedJob) -> None:
    name = f"{QUERY}.weight.quant_state.bitsandbytes__nf4"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        text = bytes(tensors[name].numpy()).replace(b"}", b', "seed": 3}')
        tensors[name] = torch.tensor(list(text), dtype=torch.uint8)

    tamper(job, change)
    found = audit(job, clients=["alice"])
    assert {"FQ006", "FQ903"} <= rules_of(found) and found.exit_code == 4


def test_a_proxy_that_disowns_its_units_is_not_a_pass(job: AuditedJob) -> None:
    sign(job, "alice", tensors={})
    assert audit(job, clients=["alice"]).exit_code >= 3
    assert audit(job, clients=["alice"], blind=True).exit_code >= 3


def test_raw_key_bytes_in_a_tensor_are_found(job: AuditedJob) -> None:
    key = job_key.load(job.key).key

    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes = tensors[f"{QUERY}.weight"].reshape(-1)
        codes[100:132] = torch.tensor(list(key), dtype=torch.uint8)

    tamper(job, change)
    assert "FQ006" in rules_of(audit(job, clients=["alice"]))


Copy = Callable[[torch.Tensor, int], tuple[str, torch.Tensor]]
COPIES: dict[str, Copy] = {
    "renamed": lambda w, unit: ("bert.extra.weight", w[[unit]].clone()),
    "renamed, in half precision": lambda w, unit: ("bert.extra.weight", w[[unit]].half()),
    "renamed, all rows": lambda w, unit: ("bert.extra.weight", w.clone()),
    "transposed": lambda w, unit: ("bert.extra.weight", w.t().clone()),
    "negated": lambda w, unit: ("bert.extra.weight", -w[[unit]]),
    "scaled and shifted": lambda w, unit: ("bert.extra.weight", 3.5 * w[[unit]] + 0.25),
    "flat": lambda w, unit: ("bert.extra.bias", w[[unit]].reshape(-1).clone()),
    "as bytes": lambda w, unit: ("bert.extra.state", w[[unit]].view(torch.uint8).reshape(-1).clone()),
    "as int8": lambda w, unit: ("bert.extra.codes", (w[[unit]] / w[unit].abs().max() * 127).round().to(torch.int8)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("file", ["model.safetensors", "visible.safetensors"])
def test_a_copy_of_a_hidden_unit_is_found_under_any_name(copy: Copy, file: str, job: AuditedJob) -> None:
    weight = job.weights()[f"{QUERY}.weight"]
    name, tensor = copy(weight, int(job.hidden(f"{QUERY}.weight").nonzero()[0][0]))
    tamper(job, lambda tensors: tensors.update({name: tensor}), file=file)
    found = audit(job, clients=["alice"])
    assert rules_of(found) == {"FQ002", "FQ010"}


REPLACEMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda row: row,
    "negated and scaled": lambda row: -1.7 * row,
}


@pytest.mark.parametrize("change", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_a_hidden_row_in_place_of_a_visible_one_is_found(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    job = make_job(tmp_path / "job", clients=["alice"], p2=0.0, format="none")
    name, other = f"{QUERY}.weight", f"{QUERY.replace('query', 'value')}.weight"
    unit, shown = int(job.hidden(name).nonzero()[0][0]), int((~job.hidden(other)).nonzero()[0][0])
    row = job.weights()[name][unit]
    tamper(job, lambda tensors: tensors[other][shown].copy_(change(row)))
    assert ("FQ002", other) in {(one.rule, one.tensor) for one in audit(job).findings}


def test_a_copy_in_the_model_itself_is_found(tmp_path: Path) -> None:
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))

    def twin(tensors: dict[str, torch.Tensor]) -> None:
        tensors[other] = -2 * tensors[one][torch.arange(len(tensors[one]) - 1, -1, -1)]

    job = make_job(tmp_path / "job", "llama", clients=["alice"], edit=twin)
    found = audit(job)
    assert rules_of(found) == {"FQ002"}
    assert {finding.scope for finding in found.findings} == {"truth"}


def test_a_finer_copy_of_a_quantized_tensor_is_found(job: AuditedJob) -> None:
    fine = job.weights()[f"{QUERY}.weight"] * torch.from_numpy(~job.hidden(f"{QUERY}.weight"))[:, None]
    tamper(job, lambda tensors: tensors.update({"bert.extra.weight": fine.half()}))
    assert rules_of(audit(job, clients=["alice"])) == {"FQ007", "FQ010"}


def test_an_unquantized_tensor_in_place_of_a_rounded_one_is_found(job: AuditedJob) -> None:
    path = job.proxy() / "model.safetensors"
    sent = load_file(path)[WORDS]
    factor = 64 / int((sent != 0).any(dim=0).sum())
    tamper(job, lambda tensors: tensors.update({WORDS: job.weights()[WORDS] * (sent != 0).any(dim=0) * factor}))
    assert {"FQ001", "FQ007"} <= rules_of(audit(job, clients=["alice"]))


def test_files_that_do_not_belong_are_found(job: AuditedJob) -> None:
    (job.proxy("alice") / "notes.txt").write_text("nothing")
    assert rules_of(audit(job, clients=["alice"])) == {"FQ010"}
    config = job.proxy("bob") / "config.json"
    config.write_bytes(config.read_bytes().replace(b'"vocab_size": 97', b'"vocab_size": 98'))
    assert rules_of(audit(job, clients=["bob"])) == {"FQ010"}
    job.ledger.write_text("")
    assert "FQ903" in rules_of(audit(job, clients=["alice"])), "its head says that there were releases"
    (job.home / "ledger.jsonl.head").unlink()
    assert rules_of(audit(job, clients=["alice"])) == {"FQ010"}


def test_vocabularies_and_labels_are_no_secrets(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(("seed", "time", "key", "user", "/usr/local/bin", "12:30:00"))}

    def texts(home: Path) -> None:
        (home / "truth" / "vocab.json").write_text(json.dumps(words))
        config = json.loads((home / "truth" / "config.json").read_text())
        config |= {"label2id": words, "id2label": {str(number): word for word, number in words.items()}}
        (home / "truth" / "config.json").write_text(json.dumps(config))

    job = make_job(tmp_path / "job", clients=["alice"], prepare=texts)
    assert (job.proxy() / "vocab.json").is_file()
    assert audit(job).findings == ()


def test_a_missing_or_an_empty_tensor_is_found(job: AuditedJob) -> None:
    tamper(job, lambda tensors: tensors.pop("classifier.bias"))
    found = audit(job, clients=["alice"])
    assert {"FQ007", "FQ010"} <= rules_of(found) and found.exit_code == 4
    tamper(job, lambda tensors: tensors.update({"nothing": torch.zeros(0, 7)}), "bob")
    assert rules_of(audit(job, clients=["bob"])) == {"FQ010"}


def test_a_merge_that_changed_a_hidden_unit_is_found(job: AuditedJob, tmp_path: Path) -> None:
    after = tmp_path / "after"
    shutil.copytree(job.truth, after)
    assert audit(job, after=after).findings == ()
    weights = job.weights()
    weights[f"{QUERY}.weight"][int(job.hidden(f"{QUERY}.weight").nonzero()[0][0]), 3] += 1e-3
    save_file(weights, after / "model.safetensors", METADATA)
    found = audit(job, after=after)
    assert [(one.rule, one.tensor, one.value) for one in found.findings] == [("FQ008", f"{QUERY}.weight", 1.0)]


def test_a_malformed_proxy_is_broken_and_a_missing_one_is_never_a_pass(job: AuditedJob) -> None:
    path = job.proxy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = audit(job)
    assert {"FQ010", "FQ903"} <= rules_of(found) and found.exit_code == 4
    shutil.rmtree(job.proxy())
    assert audit(job).exit_code == 3


def test_another_model_as_truth_is_incomplete_and_no_leak(job: AuditedJob) -> None:
    weights = job.weights()
    for name in weights:
        weights[name] = weights[name] + 0.01 * torch.randn_like(weights[name])
    save_file(weights, job.truth / "model.safetensors", METADATA)
    found = audit(job)
    assert "FQ904" in rules_of(found) and "FQ001" not in rules_of(found)
    assert len(set(found.findings)) == len(found.findings), "what two rules find is said once"


def test_no_finding_names_a_position_a_weight_or_a_key(job: AuditedJob) -> None:
    weight = job.weights()[f"{QUERY}.weight"]
    tamper(job, lambda tensors: tensors.update({"bert.extra.weight": weight}), metadata={"seed": "1"})
    found = audit(job)
    text = " ".join(f"{one.message} {one.value}" for one in found.findings) + " ".join(c.why for c in found.checked)
    assert job_key.load(job.key).key.hex() not in text
    positions = job.hidden(f"{QUERY}.weight").nonzero()[0]
    assert not any(f" {position} " in f" {text} " for position in positions if position > 20)
    assert str(job.home) not in text
