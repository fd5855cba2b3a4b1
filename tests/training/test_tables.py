"""Reading data files: what is taken, and what is said about a file that cannot be used."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fedqsn_cli.errors import DataError
from fedqsn_cli.training.data import tables
from fedqsn_cli.training.data.data_files import open_data
from fedqsn_cli.training.data.tables import Table
from support.tables import read_table

JSONL = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", JSONL),
        ("data.JSONL", JSONL),
        ("data.ndjson", JSONL),
        ("data.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]'),
        ("data.csv", "label,text\nx,a\ny,b\n"),
        ("odd [1]*?.jsonl", JSONL),
        ("data.csv", "\n\ntext,label\n\na,x\nb,y\n\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_columns(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    table = read_table(tmp_path / name)
    assert table.columns == {"text": ["a", "b"], "label": ["x", "y"]}
    assert table.rows == 2


def test_cells_of_a_csv_file_stay_the_text_they_are(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('\ufefftext,label\n007,NA\n"with, comma",1.0\n', "utf-8")
    assert read_table(tmp_path / "data.csv").columns == {"text": ["007", "with, comma"], "label": ["NA", "1.0"]}


def test_strings_of_json_stay_strings(tmp_path: Path) -> None:
    values = ["2020-01-01", "5", 5, "{}", "1.0", None]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    assert read_table(tmp_path / "data.jsonl").columns == {"text": values}


def test_a_field_that_a_row_lacks_is_none(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('\ufeff{"text": "a"}\n\n{"label": 1, "other": 2}\n', "utf-8")
    table = read_table(tmp_path / "data.jsonl")
    assert table.columns == {"text": ["a", None], "label": [None, 1]}
    assert table.names == ("text", "label", "other")


def test_one_relative_path_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text(JSONL)
    monkeypatch.chdir(tmp_path)
    assert read_table("data.jsonl").rows == 2


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("data.jsonl", "", "is empty"),
        ("data.jsonl", "\n\n", "no rows"),
        ("data.csv", "text,label\n", "no rows"),
        ("data.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2: not valid JSON"),
        ("data.jsonl", '{"text": "a"}\n["b"]\n', "line 2: a list, not a JSON object"),
        ("data.json", '[{"text": "a"}, 3]', "row 2: a number, not a JSON object"),
        ("data.json", "[]", "no rows"),
        ("data.csv", 'text,label\na,"b\n', "not a readable CSV file"),
        ("data.csv", "label,text\n1,a\n1,hello, world\n", "line 3: 3 fields, but the header has 2"),
        ("data.csv", "text,text\na,b\n", "two columns have the same name"),
        ("data.txt", "a\n", r"unsupported file type '.txt'; use \.jsonl, \.json, \.csv or \.parquet"),
        ("data", "a\n", "unsupported file type ''"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_csv_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a readable CSV file"):
        read_table(tmp_path / "data.csv")


def test_blanks_around_the_name_of_a_column_are_shown_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text, label\na, 1\n")
    with pytest.raises(DataError, match="column 'label' is missing \\(found: text, ' label'\\); a label"):
        read_table(tmp_path / "data.csv").require("text", "label", why="a label")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "JSON holds NaN, which is not a number"),
        ("-Infinity", "JSON holds -Infinity"),
        ('"a", "text": "b"', "JSON key 'text' is given twice"),
        ('{"a": 1, "a": 2}', "JSON key 'a' is given twice"),
        ("[1, [NaN]]", "JSON holds NaN"),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_value_that_is_no_json_matters_only_where_it_is_used(
    tmp_path: Path, name: str, value: str, reason: str
) -> None:
    rows = ['{"text": "a", "label": "x"}', f'{{"text": {value}, "label": "y"}}']
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else f"[{','.join(rows)}]")
    table = read_table(tmp_path / name)
    assert table.texts("label") == ["x", "y"]
    with pytest.raises(DataError, match=rf"row 2: column 'text' cannot be read \({reason}.*rename 'text'"):
        table.texts("text")


def test_characters_are_counted_at_any_depth() -> None:
    messages = [{"role": "user", "content": [{"text": "abc"}]}]
    assert Table(Path("x"), {"text": ["ab", None, 5], "messages": [messages, None, []]}, (), 3).characters == 2 + 7


def test_the_longest_row_is_measured_in_bytes() -> None:
    columns = {"text": ["é\ud800", "abcdefg"], "messages": [[{"content": "世"}], None]}
    assert Table(Path("x"), columns, (), 2).longest_row == 2 + 3 + 3


def in_parts(tmp_path: Path, kind: str, rows: int) -> Path:
    """A file of so many rows of 2 kB."""
    path, text = tmp_path / f"{rows}.{kind}", "word " * 400
    labelled = [{"text": f"{text}{row}", "label": str(row)} for row in range(rows)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    elif kind == "csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in labelled))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(labelled), path, row_group_size=700)
    return path


# The sizes of a part are patched below: nobody has a reason to choose them, and parameters would go from each command
# through every reader, and into the process that decodes Parquet, for tests alone.


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_come_in_parts_and_memory_holds_one_of_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 100)
    peaks = []
    for rows in (400, 4000):
        path = in_parts(tmp_path, kind, rows)
        tracemalloc.start()
        data = open_data(path)
        labels = [label for part in data.parts() for label in part.columns["label"]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert labels == [str(row) for row in range(rows)]
        assert (data.rows, data.columns, data.names) == (rows, ("text", "label"), ("text", "label"))
    assert peaks[1] < peaks[0] + 1_000_000  # of 8 MB


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_row_of_a_later_part_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 3)
    *_, last = open_data(in_parts(tmp_path, kind, 10)).parts()
    assert str(last.error("is wrong", row=last.rows - 1)).endswith("row 10: is wrong")


def test_a_long_row_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART_BYTES", 20)
    (tmp_path / "data.jsonl").write_text(JSONL * 3)
    assert [part.rows for part in open_data(tmp_path / "data.jsonl").parts()] == [1] * 6


def test_a_column_of_later_parts_is_known_in_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 2)
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n' * 3 + '{"text": "b", "text_pair": "c", "id": 1}\n')
    data = open_data(tmp_path / "data.jsonl")
    assert [part.columns["text_pair"] for part in data.parts()] == [[None, None], [None, "c"]]
    assert {part.names for part in data.parts()} == {("text", "text_pair", "id")}
    assert data.table() == read_table(tmp_path / "data.jsonl")


def test_a_file_that_changes_before_it_is_read_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 1)
    path = tmp_path / "data.jsonl"
    path.write_text(JSONL)
    data = open_data(path)
    with path.open("a") as file:
        file.write(JSONL)
    with pytest.raises(DataError, match="the file changes while it is read"):
        list(data.parts())


def test_columns_that_nobody_asked_for_are_known(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label,id\na,1,x\n")
    table = read_table(tmp_path / "data.csv")
    table.texts("text")
    assert table.unused == ("id", "label")


def test_half_a_character_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "b\\ud800"}\n')
    with pytest.raises(DataError, match=r"row 2: column 'text' holds U\+D800 at 1, which is not a character"):
        read_table(tmp_path / "data.jsonl").texts("text")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("[1, NaN]", "not a list in JSON"),
        ("[1", "not a list in JSON"),
        ("{}", "text, not a list"),
        (3, "a number, not a list"),
    ],
)
def test_a_list_may_be_the_text_of_one(tmp_path: Path, value: object, complaint: str) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"tags": tags}) + "\n" for tags in (["a"], ' ["b"]')))
    assert read_table(tmp_path / "data.jsonl").lists("tags") == [["a"], ["b"]]
    (tmp_path / "data.jsonl").write_text(json.dumps({"tags": value}) + "\n")
    with pytest.raises(DataError, match=rf"row 1: column 'tags' holds .*{complaint}"):
        read_table(tmp_path / "data.jsonl").lists("tags")
