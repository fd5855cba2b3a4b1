"""export-proxy: three ways to the same bytes, ids and ledger lines, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from fedqsn_cli import export_proxy, mask, merge, quantize
from fedqsn_cli.artifacts import ledger
from fedqsn_cli.artifacts.manifests import file_digest
from fedqsn_cli.checkpoint import stream
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
from support.scenario import JobFolder, Scenario, few, job_folder, scenarios

USUAL = Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "zero", 0.3, 0.2)


@pytest.fixture
def job(folder: Path) -> JobFolder:
    """A small BERT and the usual options."""
    make_model(folder / "model", "bert", hidden=33)
    return JobFolder(USUAL, folder)


@few(60)
@given(scenarios())
def test_global_server_and_quantized_server_models_give_byte_equal_proxies(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        server = job.server(job.model, "server")
        packed = job.quantized(server, "packed")
        proxies = contents(job.export(job.model, "from-global"))
        assert contents(job.export(server, "from-server")) == proxies
        assert contents(job.export(packed, "from-packed")) == proxies
        assert len(ledger.read(job.root / "ledger.jsonl")) == 2


@few(40)
@given(scenarios())
def test_mask_quantize_mask_by_hand_gives_the_weights_of_export_proxy(scenario: Scenario) -> None:
    with job_folder(scenario) as job:
        packed = job.quantized(job.server(job.model, "server"), "packed")
        proxy = job.export(job.model, "proxies") / "ann"
        mask(str(packed), job.root / "by-hand", key=job.key, client="ann", round=1, p2=scenario.p2, **job.filled)
        by_hand = contents(job.root / "by-hand")
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
    records = {"key": folder / "key", "ledger": folder / "ledger.jsonl", "p1": 0.3}
    server, packed = folder / "server", folder / "packed"
    mask(str(model), server, key=folder / "key", p1=0.3)
    quantize(str(server), packed, format=format)
    for source in (model, server, packed):
        export_proxy(str(source), folder / f"p-{source.name}", client="ann", round=1, p2=0.2, format=format, **records)
    assert contents(folder / "p-model") == contents(folder / "p-server") == contents(folder / "p-packed")


def test_a_client_sees_the_units_that_its_key_round_and_name_draw(job: JobFolder) -> None:
    proxy = job.export(job.model, "proxies") / "ann"
    shown, manifest = visible_elements(proxy), json.loads((proxy / "proxy.json").read_bytes())
    loaded = job_key.load(job.key)
    for name, units in manifest["tensors"].items():
        (group,) = units["groups"]
        n = manifest["groups"][group]["units"]
        hidden = drawn(loaded.key, ("server",), group, np.ones(n, np.bool_), 0.3)
        visible = ~hidden & ~drawn(loaded.key, ("client", "ann", "1"), group, ~hidden, 0.2)
        flags = shown[name][0].any(axis=1 if units["axis"] == "row" else 0)
        np.testing.assert_array_equal(flags, visible)


def test_a_repeated_export_is_the_same_release_and_one_ledger_line(job: JobFolder) -> None:
    first = contents(job.export(job.model, "proxies"))
    assert contents(job.export(job.model, "proxies", force=True)) == first
    assert contents(job.export(job.model, "elsewhere")) == first
    assert [release.client for release in ledger.read(job.root / "ledger.jsonl")] == ["ann", "bob"]


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
def test_another_option_makes_another_proxy_id(options: dict[str, Any], job: JobFolder) -> None:
    job.export(job.model, "one", clients=("ann",))
    job.export(job.model, "two", **{"clients": ("ann",)} | options)
    releases = ledger.read(job.root / "ledger.jsonl")
    assert releases[0].proxy_id != releases[1].proxy_id
    assert releases[0].job == releases[1].job


def test_another_key_makes_another_id_commitment_and_mask(job: JobFolder) -> None:
    job.export(job.model, "one", clients=("ann",))
    job.export(job.model, "two", clients=("ann",), key=job.root / "other.key")
    first, second = ledger.read(job.root / "ledger.jsonl")
    assert first.proxy_id != second.proxy_id and first.job != second.job
    one, two = (contents(job.root / name / "ann")["visible.safetensors"] for name in ("one", "two"))
    assert one != two


def test_the_ledger_line_and_the_manifest_pin_every_file_of_the_proxy(job: JobFolder) -> None:
    (job.model / "vocab.txt").write_text("a\nb\n")
    (job.model / "secret-notes.txt").write_text("not for clients")
    proxy = job.export(job.model, "proxies", clients=("ann",)) / "ann"
    manifest = json.loads((proxy / "proxy.json").read_bytes())
    files = {path.name for path in proxy.iterdir()}
    assert files == {"config.json", "model.safetensors", "proxy.json", "visible.safetensors", "vocab.txt"}
    assert manifest["files"] == {name: file_digest(proxy / name) for name in files - {"proxy.json"}}
    (release,) = ledger.read(job.root / "ledger.jsonl")
    assert release.proxy_sha256 == file_digest(proxy / "proxy.json")
    assert release.proxy_id == manifest["proxy_id"]
    assert (release.client, release.round, release.p1, release.p2) == ("ann", 1, 0.3, 0.2)


def test_a_new_key_is_private_and_a_known_one_needs_no_p1(job: JobFolder) -> None:
    job.export(job.model, "one", clients=("ann",))
    assert stat.S_IMODE(job.key.stat().st_mode) == 0o600
    before = job.key.read_bytes()
    job.export(job.model, "two", clients=("ann",), p1=None, round=2)
    assert job.key.read_bytes() == before


def test_shares_and_hidden_counts_are_those_of_the_masks(job: JobFolder) -> None:
    result = export_proxy(
        str(job.model),
        job.root / "p",
        client=["ann"],
        round=1,
        key=job.key,
        p1=0.3,
        p2=0.2,
        ledger=job.root / "ledger.jsonl",
    )
    shown = visible_elements(job.root / "p")
    total = sum(bits.size for dtype, bits in make_tensors("bert", hidden=33).values())
    hidden = sum(flags.size - int(flags.sum()) for flags in shown.values())
    assert result.hidden_from_client == pytest.approx(hidden / total)
    assert 0.2 < result.hidden_by_server < 0.35 < result.hidden_from_client < 0.5
    assert sum(result.shares.values()) == pytest.approx(1)
    assert result.proxies[0].bytes == sum(len(data) for data in contents(job.root / "p").values())
    assert result.key_created


@pytest.mark.parametrize("option", ["{client}", "deep/er/{client}/proxy"])
def test_several_clients_each_get_a_directory(option: str, job: JobFolder) -> None:
    export_proxy(
        str(job.model),
        str(job.root / option),
        client=["ann", "bob"],
        round=1,
        key=job.key,
        p1=0.3,
        p2=0.2,
        ledger=job.root / "ledger.jsonl",
    )
    for name in ("ann", "bob"):
        assert (job.root / option.replace("{client}", name) / "proxy.json").is_file()


@contextmanager
def at_most_open(more: int) -> Iterator[None]:
    """No more files can be opened than `more`, and the limit cannot be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + more
    stuck = SimpleNamespace(
        RLIMIT_NOFILE=resource.RLIMIT_NOFILE,
        RLIM_INFINITY=resource.RLIM_INFINITY,
        getrlimit=lambda what: (limit, limit),
        setrlimit=lambda what, limits: None,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "resource", stuck)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_under_a_low_limit_of_open_files_fewer_proxies_are_written_at_a_time(job: JobFolder) -> None:
    clients = tuple(f"c{number}" for number in range(40))
    whole = contents(job.export(job.model, "whole", clients=clients))
    with at_most_open(64):
        assert contents(job.export(job.model, "in-turns", clients=clients)) == whole
    refused = pytest.raises(
        InputError, match=r"40 proxies need 5\d open files, .* may open (49|50) more; raise the limit"
    )
    with at_most_open(50), nothing_written(job.root), refused:
        job.export(job.model, "none", clients=clients, round=2)


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
    options: dict[str, Any], complaint: str, job: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.root)
    usual: dict[str, Any] = {
        "client": ["ann"],
        "round": 1,
        "key": job.key,
        "p1": 0.3,
        "p2": 0.2,
        "ledger": job.root / "ledger.jsonl",
        "out": "proxy",
    }
    arguments = usual | options
    with nothing_written(job.root), pytest.raises(InputError, match=complaint):
        export_proxy(str(job.model), arguments.pop("out"), **arguments)


def test_i11_an_output_that_exists_is_refused_before_anything_is_written(job: JobFolder) -> None:
    (job.root / "proxies/bob").mkdir(parents=True)
    with nothing_written(job.root), pytest.raises(OutputExists):
        job.export(job.model, "proxies")
    with nothing_written(job.root), pytest.raises(OutputExists, match="not made by fedqsn"):
        job.export(job.model, "proxies", force=True)


def test_i11_a_link_in_place_of_the_output_is_never_followed(job: JobFolder) -> None:
    real = job.export(job.model, "proxies") / "ann"
    (job.root / "link").symlink_to(real)
    (job.root / "dangling").symlink_to(job.root / "nowhere")
    for name in ("link", "dangling"):
        with nothing_written(job.root), pytest.raises(OutputExists):
            export_proxy(
                str(job.model),
                job.root / name,
                client="ann",
                round=1,
                key=job.key,
                p2=0.2,
                ledger=job.root / "ledger.jsonl",
                force=True,
            )


def test_i11_another_p1_axis_or_plan_than_the_jobs_is_refused(job: JobFolder) -> None:
    job.export(job.model, "proxies")
    plan = job.root / "plan.toml"
    plan.write_text('[[rule]]\nmatch = "*pooler*"\nmasked = false\n')
    for options in ({"p1": 0.2}, {"axis": "input"}, {"axis": "element"}, {"plan": plan}):
        with nothing_written(job.root), pytest.raises(FedqsnError) as caught:
            job.export(job.model, "again", **options)
        assert isinstance(caught.value, KeyFileError)
    other = make_model(job.root / "other", "llama")
    with nothing_written(job.root), pytest.raises(KeyFileError, match="another plan|plan"):
        job.export(other, "again")


def test_i11_a_key_that_others_can_read_is_refused(job: JobFolder) -> None:
    job.export(job.model, "proxies")
    job.key.chmod(0o644)
    with nothing_written(job.root), pytest.raises(KeyFileError, match="chmod 600"):
        job.export(job.model, "again")


def test_i11_a_server_model_needs_its_own_key_and_its_own_options(job: JobFolder) -> None:
    server = job.server(job.model, "server")
    with nothing_written(job.root), pytest.raises(KeyFileError, match="no key"):
        job.export(server, "again", key=job.root / "new.key")
    job.export(job.model, "other", key=job.root / "other.key")
    for options in ({"key": job.root / "other.key"}, {"p1": 0.4}, {"axis": "input"}, {"rescale": False}):
        with nothing_written(job.root), pytest.raises(InputError):
            job.export(server, "again", **options)


def test_i11_a_quantized_model_is_not_quantized_in_another_way(job: JobFolder) -> None:
    packed = job.quantized(job.server(job.model, "server"), "packed")
    for options in ({"format": "fp4"}, {"block_size": 128}, {"layout": "dense"}, {"double_quant": True}):
        with nothing_written(job.root), pytest.raises(InputError, match="quantized"):
            job.export(packed, "again", **options)
    quantize(str(job.model), job.root / "unmasked", format="nf4")
    with nothing_written(job.root), pytest.raises(InputError, match="before it was masked"):
        job.export(job.root / "unmasked", "again")


def test_i11_proxies_updates_and_masked_models_are_no_source(job: JobFolder) -> None:
    proxy = job.export(job.model, "proxies") / "ann"
    packed = job.quantized(job.server(job.model, "server"), "packed")
    mask(str(packed), job.root / "masked", key=job.key, client="ann", round=1, p2=0.2)
    for source in (proxy, job.root / "masked"):
        with nothing_written(job.root), pytest.raises(InputError):
            job.export(source, "again")


def test_i11_another_public_base_than_the_server_models_is_refused(folder: Path) -> None:
    job = JobFolder(Scenario("bert", "F32", 33, 48, 1, "neuron", "nf4", None, 64, False, "base", 0.3, 0.2), folder)
    make_model(job.model, "bert", hidden=33)
    make_model(folder / "base", "bert", hidden=33, seed=1)
    other = make_model(folder / "other", "bert", hidden=33, seed=2)
    server = job.server(job.model, "server")
    for source in (server, job.quantized(server, "packed")):
        with nothing_written(folder), pytest.raises(InputError, match="base"):
            job.export(source, "proxies", public_base=str(other))
        with nothing_written(folder), pytest.raises(InputError, match="base"):
            mask(
                str(source),
                folder / "m",
                key=job.key,
                client="ann",
                round=1,
                p2=0.2,
                fill="base",
                public_base=str(other),
            )


def test_i11_a_key_or_ledger_inside_of_an_output_is_refused(job: JobFolder) -> None:
    """It would go out with the proxy, and --force would delete it."""
    proxies = job.export(job.model, "proxies", clients=("ann",))
    shutil.copy(job.key, proxies / "ann/job.key")
    shutil.copy(job.root / "ledger.jsonl", proxies / "ann/ledger.jsonl")
    (job.root / "link").symlink_to(proxies / "ann")
    for options in (
        {"key": proxies / "ann/job.key"},
        {"ledger": proxies / "ann/ledger.jsonl"},
        {"key": job.root / "link/job.key"},
        {"ledger": proxies / "ann/deep/er.jsonl"},
    ):
        with nothing_written(job.root), pytest.raises(InputError, match="is inside of "):
            job.export(job.model, "proxies", clients=("ann",), force=True, **options)
    with nothing_written(job.root), pytest.raises(InputError, match="is inside of "):
        mask(str(job.model), proxies / "ann", key=proxies / "ann/job.key", force=True)
    for options in ({"key": proxies / "ann/job.key"}, {"ledger": proxies / "ann/ledger.jsonl"}):
        usual = {"key": job.key, "ledger": job.root / "ledger.jsonl"}
        with nothing_written(job.root), pytest.raises(InputError, match="is inside of "):
            merge(str(job.model), [job.root / "u"], proxies / "ann", force=True, **usual | options)


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
def test_i11_a_damaged_ledger_is_refused_and_not_even_a_key_is_written(damage: str, job: JobFolder) -> None:
    path = job.root / "ledger.jsonl"
    if damage == "folder":
        path.mkdir()
    else:
        path.write_text(damage)
    with nothing_written(job.root), pytest.raises((InputError, OSError)):
        job.export(job.model, "proxies")


def test_i11_a_tensor_that_no_rule_knows_is_refused_until_the_user_decides(job: JobFolder) -> None:
    tensors = make_tensors("bert", hidden=33) | {"mystery.thing": ("F32", np.ones((3, 5), np.float32).view(np.uint32))}
    model = write_model(job.root / "strange", tensors, make_config("bert"))
    with nothing_written(job.root), pytest.raises(InputError, match=r"mystery\.thing"):
        job.export(model, "proxies")
    plan = job.root / "plan.toml"
    plan.write_text('[[rule]]\nmatch = "mystery.thing"\nrole = "linear"\n')
    job.export(model, "proxies", plan_file=plan)
    assert "mystery.thing" in visible_elements(job.root / "proxies/ann")


def test_a_client_id_that_looks_like_a_placeholder_or_an_option_is_only_a_name(job: JobFolder) -> None:
    job.export(job.model, "proxies", clients=("a.b-c_d", "0"))
    assert sorted(path.name for path in (job.root / "proxies").iterdir()) == ["0", "a.b-c_d"]
    assert not [name for name in listing(job.root) if ".fedqsn-" in name]


# ---------------------------------------------------------------- records that were edited, or of an earlier version


def _edited(key: Path, **fields: object) -> None:
    document = json.loads(key.read_text())
    key.write_text(json.dumps(document | fields))


def test_a_running_job_whose_key_file_was_edited_is_refused(tmp_path: Path) -> None:
    """With p1 changed from 0.5 to 0.1, the next proxy would show most of what the job hides."""
    make_model(tmp_path / "model", "bert", hidden=64, inner=128)
    records: dict[str, Any] = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl", "p2": 0.1}
    export_proxy(str(tmp_path / "model"), tmp_path / "p1", client="ann", round=1, p1=0.5, **records)
    for fields in ({"p1": 0.1}, {"groups": {}}, {"clear": 10**15}):
        before = records["key"].read_bytes()
        _edited(records["key"], **fields)
        for trust in (False, True):
            with nothing_written(tmp_path), pytest.raises(KeyFileError, match="was edited"):
                again = records | {"trust_records": trust}
                export_proxy(str(tmp_path / "model"), tmp_path / "p2", client="ann", round=2, **again)
        records["key"].write_bytes(before)


def test_records_of_an_earlier_version_are_sealed_once_on_request(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "bert", hidden=64, inner=128)
    records: dict[str, Any] = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl", "p2": 0.1}
    export_proxy(str(tmp_path / "model"), tmp_path / "p1", client="ann", round=1, p1=0.5, **records)
    head = tmp_path / "ledger.jsonl.head"
    sealed = records["key"].read_bytes(), head.read_bytes()
    document = json.loads(sealed[0])
    del document["seal"]
    records["key"].write_text(json.dumps(document))
    head.unlink()
    export = partial(export_proxy, str(tmp_path / "model"), client="ann", round=1, force=True, **records)
    with nothing_written(tmp_path), pytest.raises(KeyFileError, match="no seal"):
        export(tmp_path / "p1")
    export(tmp_path / "p1", trust_records=True)
    assert (records["key"].read_bytes(), head.read_bytes()) == sealed
    export(tmp_path / "p1")


def test_files_of_a_proxy_have_one_mode_and_one_time_whatever_umask_and_clock(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "bert", hidden=64, inner=128)
    before = os.umask(0o077)
    try:
        records: dict[str, Any] = {"key": tmp_path / "job.key", "ledger": tmp_path / "ledger.jsonl"}
        export_proxy(str(tmp_path / "model"), tmp_path / "p1", client="ann", round=1, p1=0.5, p2=0.1, **records)
    finally:
        os.umask(before)
    found = [path.stat() for path in (tmp_path / "p1").iterdir()]
    assert {(stat.S_IMODE(one.st_mode), one.st_mtime_ns) for one in found} == {(0o644, 315_532_800 * 10**9)}
    assert stat.S_IMODE((tmp_path / "p1").stat().st_mode) == 0o700
