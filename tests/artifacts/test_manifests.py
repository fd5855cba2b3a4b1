"""Manifests: strict in, canonical out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedqsn_cli.artifacts.manifests import (
    GroupCount,
    GroupUnits,
    Losses,
    ModelManifest,
    ProxyManifest,
    Quantization,
    SourceRecord,
    Units,
    UpdateManifest,
    file_digest,
    manifest_bytes,
    parse_manifest,
    read_manifest,
)
from fedqsn_cli.errors import FormatError, InputError

ONE, TWO = "1" * 64, "2" * 64
PACKED = Quantization(format="nf4", block_size=64, double_quant=False, layout="bnb")
UNITS = Units(groups=("g",), axis="row", view=(1, 4, 8))

MANIFESTS: dict[str, Any] = {
    "model": ModelManifest(
        kind="server-model",
        job=ONE,
        p1=0.1,
        axis="neuron",
        rescale=True,
        fill="zero",
        public_base=None,
        plan=TWO,
        overrides={},
        model_digest=ONE,
        quantization=PACKED,
        groups={"g": GroupCount(units=4, hidden=1)},
        tensors={"g": UNITS},
        source=SourceRecord(reference="model", revision=None),
    ),
    "proxy": ProxyManifest(
        proxy_id=ONE,
        job=TWO,
        round=1,
        quantization=PACKED,
        fill="zero",
        public_base=None,
        rescale=True,
        groups={"g": GroupUnits(units=4)},
        tensors={"g": UNITS},
        files={"model.safetensors": ONE},
    ),
    "update": UpdateManifest(
        proxy_id=ONE,
        proxy_sha256=TWO,
        num_examples=10,
        steps=3,
        losses=Losses(first=1.0, last=0.5, eval_before=None, eval_after=None),
        precision="fp32",
        tool="test",
        files={"update.safetensors": ONE},
    ),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_is_read_back_as_it_was_written(kind: str, tmp_path: Path) -> None:
    manifest = MANIFESTS[kind]
    (tmp_path / manifest.FILE).write_bytes(manifest_bytes(manifest))
    read = read_manifest(tmp_path, type(manifest))
    assert read == manifest
    assert manifest_bytes(read) == manifest_bytes(manifest)


def every_field(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all fields of a JSON document."""
    found = []
    for key, value in document.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += every_field(value, (*path, key))
    return found


def changed(document: Any, path: tuple[Any, ...], value: Any) -> bytes:
    """The document with another value in one place; `...` takes the field out."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(copy).encode()


OPEN = {"groups", "tensors", "files", "overrides"}  # tables: their entries may be there or not


@pytest.mark.parametrize("kind", MANIFESTS)
def test_every_field_is_needed_and_has_its_type(kind: str) -> None:
    manifest = MANIFESTS[kind]
    document = json.loads(manifest_bytes(manifest))
    for path in every_field(document):
        entry = len(path) > 1 and path[-2] in OPEN
        if not entry:
            with pytest.raises(FormatError):
                parse_manifest(changed(document, path, ...), type(manifest), "there")
        if path[0] == "overrides":
            continue
        wrong_ones: list[Any] = [[[]], {"unknown": {"x": []}}]
        wrong_ones += [] if path[-1] in {"reference", "revision", "tool"} else ["\n"]  # those are any text
        wrong_ones += [] if path[0] == "losses" and len(path) == 2 else [-1, 1e300]  # those are any number
        for wrong in wrong_ones:
            with pytest.raises(FormatError, match="field"):
                parse_manifest(changed(document, path, wrong), type(manifest), "there")


@pytest.mark.parametrize("kind", MANIFESTS)
def test_unknown_fields_are_refused_at_every_depth(kind: str) -> None:
    manifest = MANIFESTS[kind]
    document = json.loads(manifest_bytes(manifest))
    for path in [(), *every_field(document)]:
        inner = document
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and (not path or path[-1] != "overrides"):
            with pytest.raises(FormatError):
                parse_manifest(changed(document, (*path, "unknown"), 1), type(manifest), "there")


UPDATE = json.loads(manifest_bytes(MANIFESTS["update"]))


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "1", True, None, 2**53 + 1, 10**200])
def test_a_number_of_examples_is_a_whole_number_above_zero(value: Any) -> None:
    with pytest.raises(FormatError, match="num_examples"):
        parse_manifest(changed(UPDATE, ("num_examples",), value), UpdateManifest, "there")


@pytest.mark.parametrize("value", [0, 8, 31, 33, 100, 8192, -64, 64.0, "64", True, None])
def test_a_block_size_is_one_that_export_takes(value: Any) -> None:
    with pytest.raises(FormatError, match="field block_size: "):
        Quantization.from_document(PACKED.model_dump() | {"block_size": value}, "file")


@pytest.mark.parametrize("value", [-0.1, 1.5, 2, "0.5", True, None, 10**400])
def test_a_ratio_is_one_that_an_option_takes(value: Any) -> None:
    document = MANIFESTS["model"].model_dump() | {"p1": value}
    with pytest.raises(FormatError, match="field p1: "):
        ModelManifest.from_document(document, "file")


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_not_finite_are_refused(text: bytes) -> None:
    data = changed(UPDATE, ("losses", "first"), "HERE").replace(b'"HERE"', text)
    with pytest.raises(FormatError):
        parse_manifest(data, UpdateManifest, "there")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../x", "/etc/passwd", "a\\b", "a\n", "x" * 129, "a b", "é"])
def test_file_names_are_plain(name: str) -> None:
    with pytest.raises(FormatError, match="files"):
        parse_manifest(changed(UPDATE, ("files",), {name: ONE}), UpdateManifest, "there")


@pytest.mark.parametrize("digest", ["", "1" * 63, "1" * 65, "G" * 64, "A" * 64, "1" * 64 + "\n"])
def test_digests_are_64_small_hexadecimal_digits(digest: str) -> None:
    with pytest.raises(FormatError):
        parse_manifest(changed(UPDATE, ("proxy_id",), digest), UpdateManifest, "there")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensors.g.groups", []),
        ("tensors.g.groups", ["h"]),
        ("groups", {}),
        ("groups.g.hidden", 5),
        ("groups.g", {"units": 0, "hidden": 0}),
    ],
)
def test_groups_of_a_model_that_contradict_each_other_are_refused(field: str, value: object) -> None:
    document = json.loads(manifest_bytes(MANIFESTS["model"]))
    with pytest.raises(FormatError, match="group 'g' hides|tensor 'g' has no group"):
        parse_manifest(changed(document, tuple(field.split(".")), value), ModelManifest, "there")


def test_a_missing_manifest_says_what_is_there_and_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no update.json here; make an update with 'fedqsn client-train'"):
        read_manifest(tmp_path, UpdateManifest)
    with pytest.raises(InputError, match="there is no such folder; .*export-proxy"):
        read_manifest(tmp_path / "nowhere", ProxyManifest)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder; .*mask"):
        read_manifest(tmp_path / "file", ModelManifest)
    (tmp_path / "updates/alice").mkdir(parents=True)
    (tmp_path / "updates/alice/update.json").write_text("{}")
    with pytest.raises(InputError, match="this is an update, not a proxy; .*export-proxy"):
        read_manifest(tmp_path / "updates/alice", ProxyManifest)
    with pytest.raises(InputError, match=r"no update.json here, only in folders in it; name those folders"):
        read_manifest(tmp_path / "updates", UpdateManifest)


@pytest.mark.timeout(300)
def test_what_is_not_a_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "update.json")
        with pytest.raises(InputError, match="not a regular file"):
            read_manifest(tmp_path / name, UpdateManifest)
    (tmp_path / "device").mkdir()
    (tmp_path / "device/update.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_manifest(tmp_path / "device", UpdateManifest)


def test_a_manifest_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "update.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FormatError, match="larger"):
        read_manifest(tmp_path, UpdateManifest)


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


PRIVACY = {
    "training": {
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip": 1.0,
        "noise_multiplier": 0.5,
        "sampling_rate": 0.1,
        "steps": 30,
        "accountant": "rdp",
    },
    "update": {"clip_norm": 1.0, "noise_multiplier": 0.0},
}


def test_what_an_update_says_of_privacy_is_read_back_and_each_part_may_be_left_out() -> None:
    for parts in (["training"], ["update"], ["training", "update"], []):
        document = UPDATE | {"privacy": {part: PRIVACY[part] for part in parts}}
        manifest = parse_manifest(json.dumps(document).encode(), UpdateManifest, "there")
        assert json.loads(manifest_bytes(manifest)) == document


@pytest.mark.parametrize("wrong", [..., -1, "1", None, [], True, 1e999])
def test_a_wrong_field_about_privacy_is_refused(wrong: Any) -> None:
    for part, fields in PRIVACY.items():
        for name in fields:
            with pytest.raises(FormatError):
                parse_manifest(
                    changed(UPDATE | {"privacy": PRIVACY}, ("privacy", part, name), wrong), UpdateManifest, "x"
                )


def test_an_unknown_field_about_privacy_is_refused() -> None:
    for path in (("privacy", "more"), ("privacy", "training", "more"), ("privacy", "update", "more")):
        with pytest.raises(FormatError):
            parse_manifest(changed(UPDATE | {"privacy": PRIVACY}, path, 1), UpdateManifest, "there")
