"""The safetensors header: every rule has an attack file, and what we accept the format's own library accepts."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from fedqsn_cli.checkpoint import TensorSpec, plan_file, read_header
from fedqsn_cli.checkpoint.header import MAX_HEADER_BYTES, file_order
from fedqsn_cli.dtypes import DTYPES
from fedqsn_cli.errors import FormatError, InputError

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: object, data: bytes = bytes(8), pad: bool = True) -> bytes:
    """A file of any header: a document, or text that no document gives."""
    text = header if isinstance(header, str) else json.dumps(header)
    content = text.encode("utf-8", "surrogatepass")
    content += b" " * (-len(content) % 8 if pad else 0)
    return len(content).to_bytes(8, "little") + content + data


def entry(**changes: Any) -> bytes:
    return raw({"w": GOOD | changes})


def two(first: list[int], second: list[int], size: int = 16) -> bytes:
    """Two tensors of two floats each at the given offsets."""
    return raw({"a": GOOD | {"data_offsets": first}, "b": GOOD | {"data_offsets": second}}, bytes(size))


TEXT = json.dumps(GOOD)

ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "only 0 bytes long"),
    "cut in the length": (raw({"w": GOOD})[:7], "only 7 bytes long"),
    "cut in the header": (raw({"w": GOOD})[:20], "truncated"),
    "cut in the data": (raw({"w": GOOD})[:-1], "truncated"),
    "no data at all": (raw({"w": GOOD}, b""), "truncated"),
    "header of no bytes": (bytes(8), "only 8 bytes long"),
    "header without a tensor": (raw({}, b""), "holds no tensor"),
    "metadata without a tensor": (raw({"__metadata__": {"format": "pt"}}, b""), "holds no tensor"),
    "header longer than the file": ((2**40).to_bytes(8, "little") + b"{}", "over the limit"),
    "header length of 2**64 - 1": (b"\xff" * 8 + b"{}", "over the limit"),
    "header is a list": (raw("[]", b""), "does not begin"),
    "header is not JSON": (raw("{w}"), "not valid JSON"),
    "header is not UTF-8": (raw({"w": GOOD}).replace(b'"w"', b'"\xff"'), "not UTF-8"),
    "leading space": (raw(f' {{"w":{TEXT}}}'), "does not begin"),
    "leading line feed": (raw(f'\n{{"w":{TEXT}}}'), "does not begin"),
    "byte order mark": (raw(f'\ufeff{{"w":{TEXT}}}'), "does not begin"),
    "padding with NUL": (raw(f'{{"w":{TEXT}}}\0\0\0'), "does not end"),
    "padding with line feeds": (raw(f'{{"w":{TEXT}}}\n\n\n'), "does not end"),
    "two documents": (raw(f'{{"w":{TEXT}}} {{}}'), "not valid JSON"),
    "tensor named twice": (raw(f'{{"w":{TEXT},"w":{TEXT}}}'), "given twice"),
    "tensor named twice by an escape": (raw(f'{{"w":{TEXT},"\\u0077":{TEXT}}}'), "given twice"),
    "metadata given twice": (raw(f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{TEXT}}}'), "given twice"),
    "metadata key given twice": (raw(f'{{"__metadata__":{{"a":"1","a":"2"}},"w":{TEXT}}}'), "given twice"),
    "entry field given twice": (raw(f'{{"w":{TEXT[:-1]},"dtype":"I32"}}}}'), "given twice"),
    "metadata is null": (raw({"__metadata__": None, "w": GOOD}), "not an object of strings"),
    "metadata holds a number": (raw({"__metadata__": {"a": 1}, "w": GOOD}), "not an object of strings"),
    "metadata holds an object": (raw({"__metadata__": {"a": {}}, "w": GOOD}), "not an object of strings"),
    "unknown field": (entry(strides=[1]), "exactly dtype, shape and data_offsets"),
    "missing field": (raw({"w": {"dtype": "F32", "shape": [2]}}), "exactly dtype, shape and data_offsets"),
    "entry is a list": (raw({"w": ["F32", [2], [0, 8]]}), "exactly dtype, shape and data_offsets"),
    "entry is null": (raw({"w": None}), "exactly dtype, shape and data_offsets"),
    "empty name": (raw({"": GOOD}), "is empty"),
    "endless name": (raw({"w" * 1001: GOOD}), "is longer than 1000 characters"),
    "name with NUL": (raw({"w\0": GOOD}), "cannot be printed"),
    "name with a terminal escape": (raw({"\x1b[2J": GOOD}), "cannot be printed"),
    "name with a lone surrogate": (raw('{"\\ud800":' + TEXT + "}"), "cannot be printed"),
    "name that reverses text": (raw({"a\u202eb": GOOD}), "cannot be printed"),
    "name that climbs": (raw({"../w": GOOD}), "looks like a path"),
    "name that climbs inside": (raw({"a/../../w": GOOD}), "looks like a path"),
    "name that climbs on Windows": (raw({"..\\w": GOOD}), "looks like a path"),
    "absolute name": (raw({"/etc/w": GOOD}), "looks like a path"),
    "unknown dtype": (entry(dtype="F31"), "unknown dtype 'F31'"),
    "dtype in small letters": (entry(dtype="f32"), "unknown dtype"),
    "dtype is a number": (entry(dtype=32), "unknown dtype"),
    "dtype is a list": (entry(dtype=["F32"]), "unknown dtype"),
    "dtype of less than a byte": (entry(dtype="F4", shape=[16]), "unknown dtype"),
    "shape is a number": (entry(shape=2), "list of at most 32 counts"),
    "shape is negative": (entry(shape=[-1, -2]), "list of at most 32 counts"),
    "shape is a truth value": (entry(shape=[2, True]), "list of at most 32 counts"),
    "shape is a float": (entry(shape=[2.0]), "list of at most 32 counts"),
    "shape is a string": (entry(shape=["2"]), "list of at most 32 counts"),
    "shape of 33 dimensions": (entry(shape=[2] + [1] * 32), "list of at most 32 counts"),
    "shape beyond 64 bits": (entry(shape=[2**64]), "list of at most 32 counts"),
    "shape that wraps around to 2": (entry(shape=[2**62, 2**62, 2]), "too large"),
    "empty shape that wraps around": (
        raw({"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
        "too large",
    ),
    "empty shape too wide": (
        raw({"w": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
        "too large",
    ),
    "shape is NaN": (raw(f'{{"w":{TEXT.replace("[2]", "[NaN]")}}}'), "NaN"),
    "offset is Infinity": (raw(f'{{"w":{TEXT.replace("8]", "Infinity]")}}}'), "Infinity"),
    "offset is minus Infinity": (raw(f'{{"w":{TEXT.replace("[0", "[-Infinity")}}}'), "Infinity"),
    "offset of a thousand digits": (raw(f'{{"w":{TEXT.replace("8]", "9" * 5000 + "]")}}}'), "valid JSON|data_offsets"),
    "offset beyond 64 bits": (entry(data_offsets=[0, 2**64]), "not .begin, end."),
    "offset is a truth value": (entry(data_offsets=[False, 8]), "not .begin, end."),
    "offset is a float": (entry(data_offsets=[0, 8.0]), "not .begin, end."),
    "offset is negative": (entry(data_offsets=[-8, 0]), "not .begin, end."),
    "offsets the wrong way round": (entry(data_offsets=[8, 0]), "not .begin, end."),
    "one offset": (entry(data_offsets=[8]), "not .begin, end."),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "not .begin, end."),
    "fewer bytes than the shape": (entry(shape=[3]), r"needs 12 bytes but data_offsets hold 8"),
    "more bytes than the shape": (entry(shape=[1]), r"needs 4 bytes but data_offsets hold 8"),
    "bytes of another dtype": (entry(dtype="F64"), r"needs 16 bytes but data_offsets hold 8"),
    "nesting without end": (raw("{" + '"a":{' * 100_000), "does not end|nested"),
    "nesting that ends": (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "nested shape": (raw('{"w":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "tensor not aligned": (
        raw(
            {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": GOOD | {"data_offsets": [1, 9]}}, bytes(9)
        ),
        "not aligned to 4 bytes",
    ),
    "overlap": (two([0, 8], [4, 12], 12), "overlaps"),
    "same bytes twice": (two([0, 8], [0, 8], 8), "overlaps"),
    "hole between tensors": (two([0, 8], [12, 20], 20), "hole"),
    "hole before the first tensor": (two([4, 12], [12, 20], 20), "hole"),
    "trailing byte": (raw({"w": GOOD}, bytes(9)), "1 bytes follow"),
    "trailing archive": (raw({"w": GOOD}, bytes(8) + b"PK\3\4" + bytes(100)), "104 bytes follow"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, complaint = ATTACKS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=complaint) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 6000


def test_a_header_over_a_hundred_megabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
    os.truncate(path, 200_000_000)  # a hole: takes no disk
    with pytest.raises(FormatError, match="header of 100000001 bytes is over the limit"):
        read_header(path)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    for name, complaint in {
        "pipe": "not a regular file",
        ".": "not a regular file",
        "nothing": "there is no such file",
        "dangling": "there is no such file",
    }.items():
        with pytest.raises(InputError, match=complaint):
            read_header(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file"):
        read_header(Path("/dev/zero"))


def test_entries_come_in_file_order_with_absolute_offsets(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = two([8, 16], [0, 8])
    path.write_bytes(content)
    header = read_header(path)
    assert list(header.entries) == ["b", "a"]
    assert [entry.start for entry in header.entries.values()] == [len(content) - 16, len(content) - 8]
    assert {entry.nbytes for entry in header.entries.values()} == {8}


def test_empty_tensors_and_scalars_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"scalar": np.array(3, np.float32), "empty": np.zeros((0, 5), np.float32)}))
    entries = read_header(path).entries
    assert (entries["scalar"].shape, entries["scalar"].nbytes) == ((), 4)
    assert (entries["empty"].shape, entries["empty"].nbytes) == ((0, 5), 0)


def test_a_name_that_header_writers_use_is_not_mistaken_for_a_path(tmp_path: Path) -> None:
    names = ["a..b", "bert/encoder/w:0", "h.0.attn.c_attn.weight", "층.weight"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({name: np.zeros(2, np.float32) for name in names}))
    assert set(read_header(path).entries) == set(names)


NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and not {"/", "\\", ".."} & {*name, name}
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(sorted(DTYPES)), SHAPES),
    min_size=1,
    max_size=12,
    unique_by=lambda spec: spec.name,
)


@given(SPECS, st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3))
def test_a_planned_file_reads_back_as_planned(specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    head, starts = plan_file(specs, metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(head + bytes(sum(spec.nbytes for spec in specs)))
        header = read_header(path)
        with safe_open(path, "np") as library:
            assert set(library.keys()) == {spec.name for spec in specs}
            assert (library.metadata() or {}) == metadata
    assert header.metadata == metadata
    assert len(head) % 8 == 0
    for spec in specs:
        entry = header.entries[spec.name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (spec.dtype, spec.shape, spec.nbytes)
        assert entry.start == starts[spec.name]
        assert entry.start % DTYPES[spec.dtype].nbytes == 0


@given(SPECS)
def test_an_order_that_is_aligned_stays_and_another_moves_only_ragged_tensors(specs: list[TensorSpec]) -> None:
    ordered = file_order(specs)
    assert file_order(ordered) == ordered
    assert sorted(map(repr, ordered)) == sorted(map(repr, specs))
    if ordered != specs:
        kept = [spec for spec in specs if spec.nbytes % 8 == 0]
        assert ordered[: len(kept)] == kept


def test_planning_the_unusable_is_a_bug() -> None:
    spec = TensorSpec("w", "F32", (2,))
    for specs in ([], [spec, spec], [TensorSpec("", "F32", (2,))], [TensorSpec("__metadata__", "F32", (2,))]):
        with pytest.raises(ValueError):
            plan_file(specs, {})


VALID = raw(
    {
        "__metadata__": {"format": "pt"},
        "a": GOOD,
        "b.c": GOOD | {"dtype": "I16", "shape": [2, 2], "data_offsets": [8, 16]},
    },
    bytes(range(16)),
)


@given(
    st.integers(0, len(VALID) - 1),
    st.integers(0, 8),
    st.one_of(
        st.binary(max_size=6),
        st.sampled_from([b"0", b"1", b" ", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"1e0", b"true", b"null"]),
    ),
)
def test_whatever_survives_damage_means_the_same_to_the_library(position: int, removed: int, inserted: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(VALID[:position] + inserted + VALID[position + removed :])
        try:
            header = read_header(path)
        except FormatError as error:
            assert str(error).isprintable()
            return
        try:
            loaded = load_file(path)
        except (SafetensorError, KeyError) as error:
            pytest.fail(f"the library refuses what was accepted: {error}")
        assert {name: entry.shape for name, entry in header.entries.items()} == {
            name: array.shape for name, array in loaded.items()
        }


def test_a_header_that_an_old_writer_did_not_pad_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    path.write_bytes(raw(f'{{"w_":{TEXT}}}', bytes(8), pad=False))
    assert (path.stat().st_size - 8) % 4, "the data must lie askew for this test to say anything"
    assert read_header(path).entries["w_"].nbytes == 8
