"""Data files that are huge, that inflate, that grow or that are not files: refused at once, in one line."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fedqsn_cli.cli.tables import rows_left_out
from fedqsn_cli.errors import DataError
from fedqsn_cli.training.data import data_files
from fedqsn_cli.training.data import parquet as parquet_columns
from fedqsn_cli.training.data.data_files import FILE_BYTES, READERS, ROW_BYTES
from support.tables import read_table

KINDS = sorted(READERS)
QUICK = 5.0  # seconds of processor time
ROW = b'{"text":"a","label":1}\n'


def refusal(path: Path) -> str:
    """Why a file is refused, in one line, soon, and without much memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert time.process_time() - started < QUICK
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": a_socket,
    "a folder": Path.mkdir,
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_plain_file_is_never_read(what: str, tmp_path: Path) -> None:
    NO_FILES[what](tmp_path / "data.jsonl")
    complaint = refusal(tmp_path / "data.jsonl")
    assert any(part in complaint for part in ("not a regular file", "no such file", "cannot be opened"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [10 * ROW_BYTES, FILE_BYTES + 1])
def test_a_file_of_nothing_but_holes_is_refused(kind: str, length: int, tmp_path: Path) -> None:
    path = tmp_path / f"data{kind}"
    path.touch()
    os.truncate(path, length)
    refusal(path)


@pytest.mark.parametrize(
    ("name", "parts", "complaint"),
    [
        (
            "data.jsonl",
            (ROW + b'{"text":"', b"w ", ROW_BYTES, b'"}'),
            "line 2: longer than the 8.0 MB of a row",
        ),
        ("data.csv", (b"text,label\n", b"w ", ROW_BYTES, b",1\n"), "line 2: longer than the 8.0 MB of a row"),
        ("data.csv", (b"a", b",bcdefg", 2_000_000, b""), "longer than the 8.0 MB of a row"),
        ("data.csv", (b'text,label\n"w,1\n', b"w " * 500 + b",1\n", 10_000, b""), "field larger than field limit"),
        ("data.jsonl", (b'{"text":', b"[", 100_000, b""), "line 1: JSON is nested too deeply"),
        ("data.json", (b"", b"[", 100_000, b""), "JSON is nested too deeply"),
        ("data.json", (b"[", b"[],", 6_000_000, b"[]]"), "write it as .jsonl"),
    ],
    ids=["a long line", "a long cell", "columns", "an open quote", "a deep row", "a deep array", "a long array"],
)
def test_rows_without_end_are_refused(
    name: str, parts: tuple[bytes, bytes, int, bytes], complaint: str, tmp_path: Path
) -> None:
    first, repeated, times, last = parts
    (tmp_path / name).write_bytes(first + repeated * times + last)
    assert complaint in refusal(tmp_path / name)


def test_only_some_names_of_unused_columns_are_shown() -> None:
    assert rows_left_out(0, 0, [f"c{n}" for n in range(100_000)])[-1][1] == (
        ", ".join(f"c{n}" for n in range(20)) + " and 99980 more"
    )
    assert dict(rows_left_out(0, 0, ["a", "b"]))["columns not used"] == "a, b"
    assert dict(rows_left_out(0, 0, []))["columns not used"] is None


def test_only_some_names_of_many_columns_are_told(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(",".join(f"c{number}" for number in range(1000)) + "\n" + "," * 999 + "\n")
    with pytest.raises(DataError, match=r"found: c0, .*c19 and 980 more\)"):
        read_table(tmp_path / "data.csv").require("text", why="it is needed")


def test_a_deep_value_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(ROW + b'{"text":"a","label":' + b"[" * 900 + b"NaN" + b"]" * 900 + b"}\n")
    with pytest.raises(DataError, match="row 2: column 'label' cannot be read .*NaN"):
        read_table(tmp_path / "data.jsonl").values("label")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_file_that_grows_while_it_is_read_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, row = tmp_path / f"data{kind}", b"a,1\n" if kind == ".csv" else ROW
    path.write_bytes((b"text,label\n" if kind == ".csv" else b"") + row)
    bounded = data_files._bounded

    def growing(*given: object) -> object:
        for line in bounded(*given):  # type: ignore[arg-type]
            with path.open("ab") as file:
                file.write(row * 1000)
            yield line

    monkeypatch.setattr(data_files, "_bounded", growing)
    assert "changes while it is read" in refusal(path)


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_parquet_file_that_inflates_is_refused(
    dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # patched: the real one needs a file that inflates to 250 MB
    monkeypatch.setattr(parquet_columns, "BYTES", 20_000_000)
    path = tmp_path / "data.parquet"
    table = pyarrow.table({"text": ["w1 " * 300_000] * 60, "label": [1] * 60})
    parquet.write_table(table, path, compression="zstd", use_dictionary=dictionary)
    assert path.stat().st_size < 100_000
    complaint = refusal(path)
    assert "inflates to more than 20.0 MB" in complaint or "takes too much memory" in complaint
    assert complaint.endswith("; write it as .jsonl")


def test_a_parquet_file_that_crashes_its_library_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "data.parquet")
    monkeypatch.setattr(parquet_columns, "_decoded", lambda *_: os.abort())
    assert "crashes the library that reads it" in refusal(tmp_path / "data.parquet")
