"""Parquet files: which values a column gives, and how a file that cannot be used is refused."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pyarrow.parquet import encryption

from fedqsn_cli.errors import DataError
from fedqsn_cli.training.data.tables import Table
from support.processes import run
from support.tables import read_table

JSON = pyarrow.json_()
TURNS = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": None, "name": "x"}]


def written(folder: Path, columns: dict[str, Any] | pyarrow.Table, **options: Any) -> Path:
    """A Parquet file."""
    path = folder / "data.parquet"
    parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), path, **options)
    return path


def read(folder: Path, columns: dict[str, Any] | pyarrow.Table, **options: Any) -> Table:
    return read_table(written(folder, columns, **options))


def json_documents(*texts: str | None) -> Any:
    return pyarrow.ExtensionArray.from_storage(JSON, pyarrow.array(texts, pyarrow.string()))


def test_known_columns_are_read_and_all_names_are_kept(tmp_path: Path) -> None:
    table = read(tmp_path, {"text": ["a", "b"], "other": [1.5, 2.5], "label": [1, 0]})
    assert table.columns == {"text": ["a", "b"], "label": [1, 0]}
    assert (table.names, table.rows) == (("text", "other", "label"), 2)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (pyarrow.array([1, None], pyarrow.int8()), [1, None]),
        (pyarrow.array([2**64 - 1], pyarrow.uint64()), [2**64 - 1]),
        (pyarrow.array([1.0, None]), [1.0, None]),
        (pyarrow.array([True, None]), [True, None]),
        (pyarrow.nulls(2), [None, None]),
        (pyarrow.array(["a", None], pyarrow.large_string()), ["a", None]),
        (pyarrow.array(["a", None], pyarrow.string_view()), ["a", None]),
        (pyarrow.array([b"a"]), [b"a"]),
        (pyarrow.array(["x", "y", None, "x"]).dictionary_encode(), ["x", "y", None, "x"]),
        (pyarrow.array([7, 5]).dictionary_encode(), [7, 5]),
        (pyarrow.array([1_000_000], pyarrow.timestamp("us")), [datetime.datetime(1970, 1, 1, 0, 0, 1)]),
        (pyarrow.array([1], pyarrow.date32()), [datetime.date(1970, 1, 2)]),
        (pyarrow.array([TURNS, None]), [TURNS, None]),
        (pyarrow.array([[1, 2]], pyarrow.list_(pyarrow.int64(), 2)), [[1, 2]]),
        (pyarrow.array([{"text": "z"}]), [{"text": "z"}]),
        (pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())), [{"a": 1}, {}]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_values_are_those_that_python_has_for_the_type(tmp_path: Path, array: Any, values: list[object]) -> None:
    got = read(tmp_path, {"label": array}).columns["label"]
    assert got == values
    assert [type(value) for value in got] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (json_documents('"a"', '{"b": 1}', None), ["a", {"b": 1}, None]),
        (pyarrow.ListArray.from_arrays([0, 2], json_documents('{"role": "user"}', "[1]")), [[{"role": "user"}, [1]]]),
        (pyarrow.StructArray.from_arrays([json_documents("[1]", None)], ["calls"]), [{"calls": [1]}, {"calls": None}]),
    ],
    ids=["documents", "lists of documents", "documents in fields"],
)
def test_json_documents_are_parsed(tmp_path: Path, array: Any, values: list[object]) -> None:
    assert read(tmp_path, {"messages": array}).columns["messages"] == values


def test_columns_are_found_by_their_whole_name(tmp_path: Path) -> None:
    columns = {"text.x": ["no"], "x": pyarrow.array([{"text": "no"}]), "text": ["yes"], "Label": [1]}
    assert read(tmp_path, columns).columns == {"text": ["yes"]}


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    (tmp_path / "label=3").mkdir()
    assert read(tmp_path / "label=3", {"text": ["a"]}).columns == {"text": ["a"]}


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_row_groups_and_compression_change_nothing(tmp_path: Path, compression: str) -> None:
    columns = {"text": [f"text {row}" for row in range(100)], "label": list(range(100))}
    table = read(tmp_path, columns, row_group_size=7, compression=compression, write_page_checksum=True)
    assert (table.columns, table.rows) == (columns, 100)


@pytest.mark.parametrize("metadata", ["not json", '{"info": {"features": {"text": {"_type": "Unknown"}}}}'])
def test_what_other_libraries_note_in_a_file_is_left_alone(tmp_path: Path, metadata: str) -> None:
    table = pyarrow.table({"text": ["a"]}).replace_schema_metadata({"huggingface": metadata, "pandas": metadata})
    assert read(tmp_path, table).columns == {"text": ["a"]}


BAD_VALUES: dict[str, tuple[str, Any, str]] = {
    "not UTF-8": ("text", pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string()), "row 2: .*a value of type string"),
    "no such year": (
        "text",
        pyarrow.array([None, 2**62], pyarrow.timestamp("us")),
        r"row 2: .*a value of type timestamp\[us\]",
    ),
    "key given twice": ("messages", json_documents("[]", '{"a": 1, "a": 2}'), "row 2: .*JSON key 'a' is given twice"),
    "map key given twice": (
        "messages",
        pyarrow.array([[("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "row 1: .*a value of type map",
    ),
}


@pytest.mark.parametrize("what", BAD_VALUES)
def test_a_value_that_python_does_not_have_is_named_where_it_is_used(tmp_path: Path, what: str) -> None:
    name, values, complaint = BAD_VALUES[what]
    table = read(tmp_path, {name: values, "label": pyarrow.array([1] * len(values))})
    assert table.values("label") == [1] * len(values)
    with pytest.raises(DataError, match=complaint) as caught:
        table.values(name)
    assert f"column '{name}' cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"text": pyarrow.array([], pyarrow.string())}, "data.parquet: the file has no rows"),
        ({}, "data.parquet: the file has no rows"),
        (
            pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["other", "other"]),
            "two columns have the same name",
        ),
        (
            pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]),
            "two columns have the same name",
        ),
    ],
    ids=[
        "no rows",
        "no columns",
        "name",
        "text",
    ],
)
def test_values_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, columns: Any, complaint: str) -> None:
    path = written(tmp_path, columns)
    with pytest.raises(DataError, match=complaint) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_value_in_a_column_that_is_not_used_does_no_harm(tmp_path: Path) -> None:
    columns = {"text": ["a"], "other": pyarrow.array([b"\xff"]).view(pyarrow.string())}
    assert read(tmp_path, columns).columns == {"text": ["a"]}


def replaced(data: bytes, first: int, values: bytes) -> bytes:
    stop = (first + len(values)) % len(data)
    return data[:first] + values + data[stop:] if first >= 0 else data[: len(data) + first] + values + data[stop:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"PAR1PAR1",
        lambda data: b"PAR1 or not",
        lambda data: data[:-100],
        lambda data: data[-500:],
        lambda data: replaced(data, -400, b"\xab" * 100),
        lambda data: replaced(data, -8, (2**31 - 1).to_bytes(4, "little")),
        lambda data: data[:-4] + b"PARE",
        lambda data: replaced(data, 200, b"\xab" * 100),
        lambda data: data.replace(b"word 50", b"sword50"),
    ],
    ids=["magic", "no footer", "cut", "tail", "footer", "length", "encrypted magic", "page", "checksum"],
)
def test_a_damaged_file_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    columns = {"text": [f"word {row}" for row in range(100)], "label": list(range(100))}
    path = written(tmp_path, columns, compression="none", use_dictionary=False, write_page_checksum=True)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


class Keys(encryption.KmsClient):
    """A key service that hides nothing."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64decode(key)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_file_is_refused(tmp_path: Path, plaintext_footer: bool) -> None:
    settings = encryption.EncryptionConfiguration("f", column_keys={"c": ["text"]}, plaintext_footer=plaintext_footer)
    keys = encryption.CryptoFactory(Keys)
    properties = keys.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    path = written(tmp_path, {"text": ["a"], "label": [1]}, encryption_properties=properties)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_table(path)


def test_a_damaged_file_ends_the_command_with_2(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 or not")
    outcome = run("evaluate", str(tmp_path), "--data", str(tmp_path / "data.parquet"))
    assert outcome.code == 2
    assert f"{tmp_path}/data.parquet: not a readable Parquet file" in outcome.err.replace("\n", " ")


def test_no_copy_of_the_data_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"text": ["a"]})
    for name in ("temporary", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    read_table(path)
    assert not list((tmp_path / "temporary").iterdir())
    assert not list((tmp_path / "home").iterdir())
