"""export-proxy: three ways to the same bytes, ids and ledger lines, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from fedqsn_cli import export_proxy, mask, merge, quantize
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.errors import FedqsnError, InputError, KeyFileError, OutputExists
from fedqsn_cli.masks import job_key
from support.helpers import (
    contents,
    drawn,
    listing,
    make_config,
    make_model,
    make_tensors,
    nothing_written,
    to_bits,
    to_floats,
    visible_elements,
    write_model,
)
from support.scenario import Place, World, few, placed, worlds

USUAL = World("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


@pytest.fixture
def place(folder: Path) -> Place:
    """A small BERT and the usual options."""
    make_model(folder / "model", "bert", hidden=33)
    return Place(USUAL, folder)


@few(60)
@given(worlds())
def test_global_server_and_quantized_server_models_give_byte_equal_proxies(world: World) -> None:
    with placed(world) as place:
        server = place.server(place.model, "server")
        packed = place.quantized(server, "packed")
        proxies = contents(place.export(place.model, "from-global"))
        assert contents(place.export(server, "from-server")) == proxies
        assert contents(place.export(packed, "from-packed")) == proxies
        assert len(ledger.read(place.root / "ledger.jsonl")) == 2


@few(40)
@given(worlds())
def test_mask_quantize_mask_by_hand_gives_the_weights_of_export_proxy(world: World) -> None:
    with placed(world) as place:
        packed = place.quantized(place.server(place.model, "server"), "packed")
        proxy = place.export(place.model, "proxies") / "ann"
        mask(str(packed), place.root / "by-hand", key=place.key, client="ann", round=1, p2=world.p2, **place.filled)
        by_hand = contents(place.root / "by-hand")
        for name, data in contents(proxy).items():
            if name not in {"proxy.json", "visible.safetensors"}:
                assert by_hand[name] == data


@pytest.mark.parametrize("format", ["nf4", "int8", "nf3", "none"])
@pytest.mark.parametrize("says", ["float32", "bfloat16", None, "nonsense"])
def test_mixed_dtypes_and_whatever_the_config_says_give_byte_equal_proxies(
    format: str, says: str | None, folder: Path
) -> None:
    tensors = make_tensors("llama", dtype="BF16", hidden=64)
    for name in list(tensors):
        if "norm" in name or "down_proj" in name or "embed" in name:
            values = to_floats(tensors[name][1], "BF16")
            dtype = "F16" if "down_proj" in name else "F32"
            tensors[name] = (dtype, to_bits(values, dtype))
    config = {key: value for key, value in make_config("llama").items() if key != "dtype"}
    model = write_model(folder / "model", tensors, config | ({"dtype": says} if says else {}))
    job = {"key": folder / "key", "ledger": folder / "ledger.jsonl", "p1": 0.3}
    server, packed = folder / "server", folder / "packed"
    mask(str(model), server, key=folder / "key", p1=0.3)
    quantize(str(server), packed, format=format)
    for source in (model, server, packed):
        export_proxy(str(source), folder / f"p-{source.name}", client="ann", round=1, p2=0.2, format=format, **job)
    assert contents(folder / "p-model") == contents(folder / "p-server") == contents(folder / "p-packed")


def test_a_client_sees_the_units_that_its_key_round_and_name_draw(place: Place) -> None:
    proxy = place.export(place.model, "proxies") / "ann"
    shown, manifest = visible_elements(proxy), json.loads((proxy / "proxy.json").read_bytes())
    job = job_key.load(place.key)
    for name, units in manifest["tensors"].items():
        (group,) = units["groups"]
        n = manifest["groups"][group]["units"]
        hidden = drawn(job.key, ("server",), group, np.ones(n, np.bool_), 0.3)
        visible = ~hidden & ~drawn(job.key, ("client", "ann", "1"), group, ~hidden, 0.2)
        flags = shown[name][0].any(axis=1 if units["axis"] == "row" else 0)
        np.testing.assert_array_equal(flags, visible)


def test_a_repeated_export_is_the_same_release_and_one_ledger_line(place: Place) -> None:
    first = contents(place.export(place.model, "proxies"))
    assert contents(place.export(place.model, "proxies", force=True)) == first
    assert contents(place.export(place.model, "elsewhere")) == first
    assert [release.client for release in ledger.read(place.root / "ledger.jsonl")] == ["ann", "bob"]


OTHER_OPTIONS: list[dict[str, Any]] = [
    {"round": 2},
    {"p2": 0.3},
    {"format": "fp4"},
    {"block_size": 128},
    {"layout": "dense"},
    {"double_quant": True},
    {"schedule": "sticky"},
    {"rescale": False},
    {"clients": ("bob",)},
]


@pytest.mark.parametrize("options", OTHER_OPTIONS, ids=lambda options: next(iter(options)))
def test_another_option_makes_another_proxy_id(options: dict[str, Any], place: Place) -> None:
    place.export(place.model, "one", clients=("ann",))
    place.export(place.model, "two", **{"clients": ("ann",)} | options)
    releases = ledger.read(place.root / "ledger.jsonl")
    assert releases[0].proxy_id != releases[1].proxy_id
    assert releases[0].job == releases[1].job


def test_another_key_makes_another_id_commitment_and_mask(place: Place) -> None:
    place.export(place.model, "one", clients=("ann",))
    place.export(place.model, "two", clients=("ann",), key=place.root / "other.key")
    first, second = ledger.read(place.root / "ledger.jsonl")
    assert first.proxy_id != second.proxy_id and first.job != second.job
    one, two = (contents(place.root / name / "ann")["visible.safetensors"] for name in ("one", "two"))
    assert one != two


def test_the_ledger_line_and_the_manifest_pin_every_file_of_the_proxy(place: Place) -> None:
    (place.model / "vocab.txt").write_text("a\nb\n")
    (place.model / "secret-notes.txt").write_text("not for clients")
    proxy = place.export(place.model, "proxies", clients=("ann",)) / "ann"
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    files = {path.name for path in proxy.iterdir()}
    assert files == {"config.json", "model.safetensors", "proxy.json", "visible.safetensors", "vocab.txt"}
    assert manifest["files"] == {name: file_digest(proxy / name) for name in files - {"proxy.json"}}
    (release,) = ledger.read(place.root / "ledger.jsonl")
    assert release.proxy_sha256 == file_digest(proxy / "proxy.json")
    assert release.proxy_id == manifest["proxy_id"]
    assert (release.client, release.round, release.p1, release.p2) == ("ann", 1, 0.3, 0.2)


def test_a_new_key_is_private_and_a_known_one_needs_no_p1(place: Place) -> None:
    place.export(place.model, "one", clients=("ann",))
    assert stat.S_IMODE(place.key.stat().st_mode) == 0o600
    before = place.key.read_bytes()
    place.export(place.model, "two", clients=("ann",), p1=None, round=2)
    assert place.key.read_bytes() == before


def test_shares_and_hidden_counts_are_those_of_the_masks(place: Place) -> None:
    result = export_proxy(
        str(place.model),
        place.root / "p",
        client=["ann"],
        round=1,
        key=place.key,
        p1=0.3,
        p2=0.2,
        ledger=place.root / "ledger.jsonl",
    )
    shown = visible_elements(place.root / "p")
    total = sum(bits.size for dtype, bits in make_tensors("bert", hidden=33).values())
    hidden = sum(flags.size - int(flags.sum()) for flags in shown.values())
    assert result.hidden_from_client == pytest.approx(hidden / total)
    assert 0.2 < result.hidden_by_server < 0.35 < result.hidden_from_client < 0.5
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.proxies[0].bytes == sum(len(data) for data in contents(place.root / "p").values())
    assert result.key_created


@pytest.mark.parametrize("option", ["{client}", "deep/er/{client}/proxy"])
def test_several_clients_each_get_a_directory(option: str, place: Place) -> None:
    export_proxy(
        str(place.model),
        str(place.root / option),
        client=["ann", "bob"],
        round=1,
        key=place.key,
        p1=0.3,
        p2=0.2,
        ledger=place.root / "ledger.jsonl",
    )
    for name in ("ann", "bob"):
        assert (place.root / option.replace("{client}", name) / "proxy.json").is_file()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"client": ["../x"]}, "client id"),
    ({"client": [""]}, "client id"),
    ({"client": ["a/b"]}, "client id"),
    ({"client": ["ann\n"]}, "client id"),
    ({"client": ["x" * 65]}, "client id"),
    ({"client": []}, "no client"),
    ({"client": ["ann", "ann"], "out": "{client}"}, "twice"),
    ({"client": ["ann", "bob"]}, "is the same for several clients"),
    ({"round": -1}, "-1 is not 0 or more"),
    ({"round": 2**60}, "not a round"),
    ({"p1": 1.0}, "leaves nothing to train"),
    ({"p1": -0.1}, "out of range"),
    ({"p1": float("nan")}, "out of range"),
    ({"p1": None}, "no key"),
    ({"p2": 1.0}, "not a ratio"),
    ({"p2": float("inf")}, "not a ratio"),
    ({"format": "nf5"}, "--format: 'nf5' is not a choice"),
    ({"block_size": 48}, "block size"),
    ({"block_size": 0}, "block size"),
    ({"layout": "packed"}, "--layout: '[a-z]*' is not a choice"),
    ({"format": "nf3", "layout": "bnb"}, "no bitsandbytes layout"),
    ({"double_quant": True, "layout": "dense"}, "double quantization"),
    ({"double_quant": True, "format": "int8"}, "double quantization"),
    ({"fill": "base"}, "needs the public base"),
    ({"public_base": "model"}, "only used with"),
    ({"axis": "diagonal"}, "--axis: '[a-z]*' is not a choice"),
    ({"schedule": "weekly"}, "schedule"),
    ({"max_shard_size": "big"}, "not a size"),
    ({"plan": "missing.toml"}, "missing.toml"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_i11_wrong_options_are_refused_and_nothing_is_written(
    options: dict[str, Any], complaint: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    usual: dict[str, Any] = {
        "client": ["ann"],
        "round": 1,
        "key": place.key,
        "p1": 0.3,
        "p2": 0.2,
        "ledger": place.root / "ledger.jsonl",
        "out": "proxy",
    }
    arguments = usual | options
    with nothing_written(place.root), pytest.raises(InputError, match=complaint):
        export_proxy(str(place.model), arguments.pop("out"), **arguments)


def test_i11_an_output_that_exists_is_refused_before_anything_is_written(place: Place) -> None:
    (place.root / "proxies/bob").mkdir(parents=True)
    with nothing_written(place.root), pytest.raises(OutputExists):
        place.export(place.model, "proxies")
    with nothing_written(place.root), pytest.raises(OutputExists, match="not made by fedqsn"):
        place.export(place.model, "proxies", force=True)


def test_i11_a_link_in_place_of_the_output_is_never_followed(place: Place) -> None:
    real = place.export(place.model, "proxies") / "ann"
    (place.root / "link").symlink_to(real)
    (place.root / "dangling").symlink_to(place.root / "nowhere")
    for name in ("link", "dangling"):
        with nothing_written(place.root), pytest.raises(OutputExists):
            export_proxy(
                str(place.model),
                place.root / name,
                client="ann",
                round=1,
                key=place.key,
                p2=0.2,
                ledger=place.root / "ledger.jsonl",
                force=True,
            )


def test_i11_another_p1_axis_or_plan_than_the_jobs_is_refused(place: Place) -> None:
    place.export(place.model, "proxies")
    plan = place.root / "plan.toml"
    plan.write_text('[[rule]]\nmatch = "*pooler*"\nmasked = false\n')
    for options in ({"p1": 0.2}, {"axis": "input"}, {"axis": "element"}, {"plan": plan}):
        with nothing_written(place.root), pytest.raises(FedqsnError) as caught:
            place.export(place.model, "again", **options)
        assert isinstance(caught.value, KeyFileError)
    other = make_model(place.root / "other", "llama")
    with nothing_written(place.root), pytest.raises(KeyFileError, match="another plan|plan"):
        place.export(other, "again")


def test_i11_a_key_that_others_can_read_is_refused(place: Place) -> None:
    place.export(place.model, "proxies")
    place.key.chmod(0o644)
    with nothing_written(place.root), pytest.raises(KeyFileError, match="chmod 600"):
        place.export(place.model, "again")


def test_i11_a_server_model_needs_its_own_key_and_its_own_options(place: Place) -> None:
    server = place.server(place.model, "server")
    with nothing_written(place.root), pytest.raises(KeyFileError, match="no key"):
        place.export(server, "again", key=place.root / "new.key")
    place.export(place.model, "other", key=place.root / "other.key")
    for options in ({"key": place.root / "other.key"}, {"p1": 0.4}, {"axis": "input"}, {"rescale": False}):
        with nothing_written(place.root), pytest.raises(InputError):
            place.export(server, "again", **options)


def test_i11_a_quantized_model_is_not_quantized_in_another_way(place: Place) -> None:
    packed = place.quantized(place.server(place.model, "server"), "packed")
    for options in ({"format": "fp4"}, {"block_size": 128}, {"layout": "dense"}, {"double_quant": True}):
        with nothing_written(place.root), pytest.raises(InputError, match="quantized"):
            place.export(packed, "again", **options)
    quantize(str(place.model), place.root / "unmasked", format="nf4")
    with nothing_written(place.root), pytest.raises(InputError, match="before it was masked"):
        place.export(place.root / "unmasked", "again")


def test_i11_proxies_updates_and_masked_models_are_no_source(place: Place) -> None:
    proxy = place.export(place.model, "proxies") / "ann"
    packed = place.quantized(place.server(place.model, "server"), "packed")
    mask(str(packed), place.root / "masked", key=place.key, client="ann", round=1, p2=0.2)
    for source in (proxy, place.root / "masked"):
        with nothing_written(place.root), pytest.raises(InputError):
            place.export(source, "again")


def test_i11_another_public_base_than_the_server_models_is_refused(folder: Path) -> None:
    place = Place(World("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "base", 0.3, 0.2), folder)
    make_model(place.model, "bert", hidden=33)
    make_model(folder / "base", "bert", hidden=33, seed=1)
    other = make_model(folder / "other", "bert", hidden=33, seed=2)
    server = place.server(place.model, "server")
    for source in (server, place.quantized(server, "packed")):
        with nothing_written(folder), pytest.raises(InputError, match="base"):
            place.export(source, "proxies", public_base=str(other))
        with nothing_written(folder), pytest.raises(InputError, match="base"):
            mask(
                str(source),
                folder / "m",
                key=place.key,
                client="ann",
                round=1,
                p2=0.2,
                fill="base",
                public_base=str(other),
            )


def test_i11_a_key_or_ledger_inside_of_an_output_is_refused(place: Place) -> None:
    """It would go out with the proxy, and --force would delete it."""
    proxies = place.export(place.model, "proxies", clients=("ann",))
    shutil.copy(place.key, proxies / "ann/job.key")
    shutil.copy(place.root / "ledger.jsonl", proxies / "ann/ledger.jsonl")
    (place.root / "link").symlink_to(proxies / "ann")
    for options in (
        {"key": proxies / "ann/job.key"},
        {"ledger": proxies / "ann/ledger.jsonl"},
        {"key": place.root / "link/job.key"},
        {"ledger": proxies / "ann/deep/er.jsonl"},
    ):
        with nothing_written(place.root), pytest.raises(InputError, match="inside of the output"):
            place.export(place.model, "proxies", clients=("ann",), force=True, **options)
    with nothing_written(place.root), pytest.raises(InputError, match="inside of the output"):
        mask(str(place.model), proxies / "ann", key=proxies / "ann/job.key", force=True)
    for options in ({"key": proxies / "ann/job.key"}, {"ledger": proxies / "ann/ledger.jsonl"}):
        usual = {"key": place.key, "ledger": place.root / "ledger.jsonl"}
        with nothing_written(place.root), pytest.raises(InputError, match="inside of the output"):
            merge(str(place.model), [place.root / "u"], proxies / "ann", force=True, **usual | options)


def test_i11_a_scale_that_leaves_the_range_of_numbers_is_refused(folder: Path) -> None:
    tensors = make_tensors("bert", hidden=64)
    name = "bert.pooler.dense.weight"
    tensors[name] = ("F32", np.full((64, 64), 3e38, np.float32).view(np.uint32))
    model = write_model(folder / "model", tensors, make_config("bert"))
    for format in ("nf4", "none"):
        with nothing_written(folder), pytest.raises(InputError, match=r"pooler.*no-rescale"):
            export_proxy(
                str(model),
                folder / "p",
                client="ann",
                round=1,
                key=folder / "key",
                p1=0.5,
                p2=0.5,
                ledger=folder / "ledger.jsonl",
                format=format,
            )


@pytest.mark.parametrize("damage", ["not json\n", '{"format":"fedqsn-ledger/1"}\n', "folder"])
def test_i11_a_damaged_ledger_is_refused_and_not_even_a_key_is_written(damage: str, place: Place) -> None:
    path = place.root / "ledger.jsonl"
    if damage == "folder":
        path.mkdir()
    else:
        path.write_text(damage)
    with nothing_written(place.root), pytest.raises((InputError, OSError)):
        place.export(place.model, "proxies")


def test_i11_a_tensor_that_no_rule_knows_is_refused_until_the_user_decides(place: Place) -> None:
    tensors = make_tensors("bert", hidden=33) | {"mystery.thing": ("F32", np.ones((3, 5), np.float32).view(np.uint32))}
    model = write_model(place.root / "strange", tensors, make_config("bert"))
    with nothing_written(place.root), pytest.raises(InputError, match=r"mystery\.thing"):
        place.export(model, "proxies")
    plan = place.root / "plan.toml"
    plan.write_text('[[rule]]\nmatch = "mystery.thing"\nrole = "linear"\n')
    place.export(model, "proxies", plan_file=plan)
    assert "mystery.thing" in visible_elements(place.root / "proxies/ann")


def test_a_client_id_that_looks_like_a_placeholder_or_an_option_is_only_a_name(place: Place) -> None:
    place.export(place.model, "proxies", clients=("a.b-c_d", "0"))
    assert sorted(path.name for path in (place.root / "proxies").iterdir()) == ["0", "a.b-c_d"]
    assert not [name for name in listing(place.root) if ".fedqsn-" in name]


# ---------------------------------------------------------------- records that were edited, or of an earlier version


def _edited(key: Path, **fields: object) -> None:
    document = json.loads(key.read_text())
    key.write_text(json.dumps(document | fields))


def test_a_running_job_whose_key_file_was_edited_is_refused(tmp_path: Path) -> None:
    """With p1 changed from 0.5 to 0.1, the next proxy would show most of what the job hides."""
    make_model(tmp_path / "model", "bert", hidden=64, inner=128)
    job: dict[str, Any] = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl", "p2": 0.1}
    export_proxy(str(tmp_path / "model"), tmp_path / "p1", client="ann", round=1, p1=0.5, **job)
    for fields in ({"p1": 0.1}, {"groups": {}}, {"clear": 10**15}):
        before = job["key"].read_bytes()
        _edited(job["key"], **fields)
        for trust in (False, True):
            with nothing_written(tmp_path), pytest.raises(KeyFileError, match="was edited"):
                again = job | {"trust_records": trust}
                export_proxy(str(tmp_path / "model"), tmp_path / "p2", client="ann", round=2, **again)
        job["key"].write_bytes(before)


def test_records_of_an_earlier_version_are_sealed_once_on_request(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "bert", hidden=64, inner=128)
    job: dict[str, Any] = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl", "p2": 0.1}
    export_proxy(str(tmp_path / "model"), tmp_path / "p1", client="ann", round=1, p1=0.5, **job)
    head = tmp_path / "ledger.jsonl.head"
    sealed = job["key"].read_bytes(), head.read_bytes()
    document = json.loads(sealed[0])
    del document["seal"]
    job["key"].write_text(json.dumps(document))
    head.unlink()
    export = partial(export_proxy, str(tmp_path / "model"), client="ann", round=1, force=True, **job)
    with nothing_written(tmp_path), pytest.raises(KeyFileError, match="no seal"):
        export(tmp_path / "p1")
    export(tmp_path / "p1", trust_records=True)
    assert (job["key"].read_bytes(), head.read_bytes()) == sealed
    export(tmp_path / "p1")


def test_files_of_a_proxy_have_one_mode_and_one_time_whatever_umask_and_clock(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "bert", hidden=64, inner=128)
    before = os.umask(0o077)
    try:
        job: dict[str, Any] = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl"}
        export_proxy(str(tmp_path / "model"), tmp_path / "p1", client="ann", round=1, p1=0.5, p2=0.1, **job)
    finally:
        os.umask(before)
    found = [path.stat() for path in (tmp_path / "p1").iterdir()]
    assert {(stat.S_IMODE(one.st_mode), one.st_mtime_ns) for one in found} == {(0o644, 315_532_800 * 10**9)}
    assert stat.S_IMODE((tmp_path / "p1").stat().st_mode) == 0o700
