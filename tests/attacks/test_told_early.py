"""What the owner hears before a release, and what is refused instead of being released."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedqsn_cli import export_proxy
from fedqsn_cli.checkpoint.companions import COMPANIONS, find_companions, left_behind
from fedqsn_cli.models.tokenizer_files import tokenizer_problem
from support.attacks import World, make_world
from support.families import build
from support.processes import run
from support.training_jobs import write_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def edit(folder: Path, name: str = "config.json", **fields: object) -> Path:
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | fields))
    return folder


@pytest.mark.parametrize("name", ["spm.model", "bpe.codes", "vocab.bpe", "source.spm", "tekken.json", "x.tiktoken"])
def test_every_file_of_a_tokenizer_goes_with_a_model(name: str, world: World, tmp_path: Path) -> None:
    model = world.copy("model", tmp_path)
    (model / name).write_bytes(b"words")
    (model / "helper.py").write_text("")
    masked = run("mask", model, "--out", tmp_path / "server", "--p1", "0.25", "--key", tmp_path / "key")
    assert masked.code == 0, masked
    assert "not carried along: helper.py" in masked.err
    assert (tmp_path / "server" / name).read_bytes() == b"words"
    ended = run(*world.export(model, tmp_path))
    assert ended.code == 0, ended
    assert "not carried along: helper.py" in ended.err
    assert (tmp_path / "proxy" / name).read_bytes() == b"words"
    assert name in json.loads((tmp_path / "proxy" / "proxy.json").read_text())["files"]


def test_weights_in_a_tokenizer_file_are_told_of_before_the_release_that_an_audit_fails(
    world: World, tmp_path: Path
) -> None:
    model = world.copy("model", tmp_path)
    weights = base64.b64encode(np.random.default_rng(0).bytes(330_000)).decode()
    edit(model, "tokenizer_config.json", note=weights)

    ended = run(*world.export(model, tmp_path))
    audited = run("audit", tmp_path / "proxy", "--format", "json")

    assert ended.code == 0, ended
    (note,) = [line for line in ended.err.splitlines() if "FQ104" in line]
    assert "tokenizer_config.json has 3" in note and "every proxy" in note
    (finding,) = [one for one in json.loads(audited.out)["findings"] if one["rule"] == "FQ104"]
    assert finding["message"] in note


def test_usual_companions_are_not_told_of(world: World, tmp_path: Path) -> None:
    assert "FQ104" not in run(*world.export(world.model, tmp_path)).err


def test_texts_about_a_model_and_its_weights_are_not_called_left_behind(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", ".gitattributes", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "modeling_x.py").write_text("")
    assert left_behind(tmp_path) == ["modeling_x.py"]


def test_companions_come_in_one_order(tmp_path: Path) -> None:
    names = [name.replace("*", "z") for name in COMPANIONS] + ["a.tiktoken"]
    for name in reversed(names):
        (tmp_path / name).write_text("")
    assert [path.name for path in find_companions(tmp_path)] == [*names[:-2], "a.tiktoken", "z.tiktoken"]


def tokenizer(folder: Path, **parts: object) -> Path:
    document = {"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": []} | parts
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document))
    return path


def test_a_tokenizer_that_can_be_of_no_use_is_known_by_its_files(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "DebertaV2Tokenizer"}))
    assert tokenizer_problem([], 9) == "it has no tokenizer"
    assert tokenizer_problem([tmp_path / "generation_config.json"], 9) == "it has no tokenizer"
    assert "DebertaV2Tokenizer) has no vocabulary file" in str(tokenizer_problem([config], 9))
    config.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert tokenizer_problem([config], 9) is None
    assert tokenizer_problem([tokenizer(tmp_path)], 9) is None
    special = {"id": 0, "content": "a", "special": True}
    assert "no word but special" in str(tokenizer_problem([tokenizer(tmp_path, added_tokens=[special])], 9))
    unigram = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}
    assert tokenizer_problem([tokenizer(tmp_path, model=unigram)], 2) is None
    assert "ids up to 1" in str(tokenizer_problem([tokenizer(tmp_path, model=unigram)], 1))
    for odd in (None, 5, {"vocab": 7}, {"vocab": [[]]}, []):
        tokenizer_problem([tokenizer(tmp_path, model=odd, added_tokens=odd)], 9)


@pytest.mark.parametrize(
    ("file", "what"), [("tokenizer.json", "no vocabulary file"), ("tokenizer*", "no tokenizer"), ("", "")]
)
def test_the_owner_hears_that_no_client_could_train(file: str, what: str, world: World, tmp_path: Path) -> None:
    model = world.copy("model", tmp_path)
    for path in model.glob(file) if file else ():
        path.unlink()
    ended = run(*world.export(model, tmp_path))
    assert ended.code == 0, ended
    assert ("no client can train a proxy of this model" in ended.err) == bool(file)
    assert what in ended.err
    if file == "tokenizer.json":
        shutil.copy(world.model / "tokenizer.json", tmp_path / "elsewhere")
        evaluated = run("evaluate", model, "--data", world.data)
        assert (evaluated.code, len(evaluated.err.splitlines())) == (2, 1), evaluated


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"architectures": None}, "does not name one architecture"),
        ({"architectures": ["BertModel"]}, "architecture BertModel has no head"),
        ({"architectures": ["FooForCausalLM"]}, "transformers has no architecture FooForCausalLM"),
        ({"problem_type": "odd"}, "problem type 'odd' is unknown"),
    ],
)
def test_the_owner_hears_of_a_model_that_cannot_be_trained(
    fields: dict[str, object], what: str, world: World, tmp_path: Path
) -> None:
    ended = run(*world.export(edit(world.copy("model", tmp_path), **fields), tmp_path))
    assert f"no client can train a proxy of this model: {what}" in ended.err or what in ended.err


def test_the_owner_hears_of_tied_tensors_that_differ(world: World, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", tokenizer=True)
    edit(model, tie_word_embeddings=True)
    ended = run(*world.export(model, tmp_path))
    assert "no client can train a proxy of this model: " in ended.err
    assert "differs from lm_head.weight, though config.json ties the two" in ended.err
    edit(model, tie_word_embeddings=False)
    (tmp_path / "untied").mkdir()
    assert "ties" not in run(*world.export(model, tmp_path / "untied")).err


def test_an_adapter_is_named_with_the_command_that_merges_it(tmp_path: Path, world: World) -> None:
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(world.model)
    settings = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    for words in (("inspect",), ("evaluate", "--data", world.data), ("mask", "--out", tmp_path / "o", "--key", "k")):
        ended = run(words[0], tmp_path / "adapter", *words[1:])
        assert ended.code == 2, ended
        assert "this is a LoRA adapter, not a model; merge it into its base first: python -c " in ended.err
        assert AutoPeftModelForSequenceClassification.__name__ in ended.err


@pytest.mark.parametrize(("name", "what"), [("x.gguf", "llama.cpp"), ("x.bin", "pickled"), ("x.parquet", "data set")])
def test_a_folder_of_another_kind_is_called_by_its_name(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    ended = run("inspect", tmp_path)
    assert ended.code == 2
    assert what in ended.err


def test_private_fields_of_the_sources_files_are_not_exported(world: World, tmp_path: Path) -> None:
    model = world.copy("model", tmp_path)
    private = {"/home/me/x": 1, "hostname": "here", "created_at": "2026-01-02T03:04:05", "kept": 1}
    edit(model, **private)
    edit(model, "tokenizer.json", origin="/home/me/tokenizer")
    assert run(*world.export(model, tmp_path)).code == 0
    written = json.loads((tmp_path / "proxy" / "config.json").read_text())
    assert private.keys() & written.keys() == {"kept"}
    assert b"/home/me" not in (tmp_path / "proxy" / "tokenizer.json").read_bytes()
    words = ("--truth", model, "--key", tmp_path / "job.key", "--ledger", tmp_path / "ledger.jsonl")
    assert "FQ006" not in "".join(
        line for line in run("audit", tmp_path / "proxy", *words).out.splitlines() if "hard" in line
    )


def test_a_path_in_a_rule_of_a_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    rule = {"type": "Replace", "pattern": {"String": "/home/me/x"}, "content": "y"}
    model = edit(world.copy("model", tmp_path), "tokenizer.json", normalizer=rule)
    ended = run(*world.export(model, tmp_path))
    assert ended.code == 2, ended
    assert "field normalizer holds an absolute path" in ended.err


def test_a_malformed_repository_is_refused_before_the_release(world: World, tmp_path: Path) -> None:
    ended = run(*world.export(world.model, tmp_path), "--push", "hf://no/such/name")
    assert ended.code == 2, ended
    assert "not a model reference" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_setting_that_is_forgotten_in_the_second_round_is_asked_for(world: World, tmp_path: Path) -> None:
    words = world.export(world.model, tmp_path)
    assert run(*words, "--schedule", "sticky").code == 0
    second = [word if word != "1" else "2" for word in words]
    second[second.index(tmp_path / "proxy")] = tmp_path / "second"
    ended = run(*second)
    assert ended.code == 2, ended
    assert "--schedule: was sticky in the last release for carol" in ended.err
    assert run(*second, "--schedule", "sticky").code == 0  # as the hint says


def test_a_second_proxy_of_one_round_is_told_of(world: World, tmp_path: Path) -> None:
    words = world.export(world.model, tmp_path)
    assert run(*words).code == 0
    words[words.index(tmp_path / "proxy")] = tmp_path / "second"
    assert "another proxy" not in run(*words, "--force").err
    assert "client carol has another proxy of round 1 already" in run(*words, "--force", "--format", "nf3").err


def several(world: World, where: Path, **more: object) -> None:
    export_proxy(
        world.model,
        where / "{client}",
        client=["ann", "bob", "cat"],
        round=1,
        p1=0.25,
        p2=0.25,
        key=where / "job.key",
        ledger=where / "ledger.jsonl",
        **more,
    )


def test_an_export_that_was_killed_while_it_published_is_completed(world: World, tmp_path: Path) -> None:
    several(world, tmp_path)
    before = {name: load_file(tmp_path / name / "model.safetensors") for name in ("ann", "bob", "cat")}
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    kept = (tmp_path / "ann" / "proxy.json").stat().st_ino
    shutil.rmtree(tmp_path / "bob")
    several(world, tmp_path)
    after = {name: load_file(tmp_path / name / "model.safetensors") for name in before}
    assert all(np.array_equal(after[name][key], before[name][key]) for name in before for key in before[name])
    assert (tmp_path / "ledger.jsonl").read_bytes() == ledger
    assert (tmp_path / "ann" / "proxy.json").stat().st_ino == kept


def test_a_proxy_of_another_export_is_no_part_of_it(world: World, tmp_path: Path) -> None:
    several(world, tmp_path)
    shutil.rmtree(tmp_path / "bob")
    with pytest.raises(Exception, match="is another proxy"):
        several(world, tmp_path, format="nf3")
    assert not (tmp_path / "bob").exists()


def test_what_fedqsn_did_not_make_has_one_message_with_or_without_force(world: World, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(world.proxy)
    (tmp_path / "empty").mkdir()
    for name in ("link", "empty"):
        words = ("mask", world.model, "--out", tmp_path / name, "--p1", "0.25", "--key", tmp_path / "key")
        plain, forced = run(*words), run(*words, "--force")
        assert plain == forced
        assert "never replaced; choose another path" in plain.err


def test_data_in_place_of_a_model_is_no_safetensors_file(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"text": "a", "label": 1}])
    for words in (("evaluate", data, "--data", data), ("mask", data, "--out", tmp_path / "o", "--key", tmp_path / "k")):
        ended = run(*words)
        assert ended.code == 2 and "not a safetensors file: it does not begin as one" in ended.err


def test_a_policy_is_made_with_a_result_in_json(tmp_path: Path) -> None:
    ended = run("audit", "--init-policy", "--policy", tmp_path / "policy.toml", "--json")
    assert json.loads(ended.out) == {"policy": str(tmp_path / "policy.toml")}
