"""One data set in every file format, encoding and way to write a list: training sees the same."""

from __future__ import annotations

import codecs
import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fedqsn_cli.errors import DataError
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.examples import Examples
from fedqsn_cli.training.data.tasks import TASKS
from support.scenario import MEMORY, few
from support.tables import read_table
from support.tokenizers import tokenizer

LABELS = {"O": 0, "B-x": 1, "7": 2}
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
INPUTS = frozenset({"input_ids", "attention_mask"})
Rows = list[dict[str, Any]]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(lambda text: f"fox {text}")
WORD = st.text("helo wrdé世,\"'[{".replace(" ", ""), min_size=1, max_size=4)
LABEL = st.sampled_from(["O", "B-x", "7"])


def rows_of(**columns: st.SearchStrategy[Any]) -> st.SearchStrategy[Rows]:
    return st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=3)


NUMBERS = st.floats(-1e6, 1e6, width=32) | st.integers(-(10**6), 10**6)
WORDS = st.lists(st.tuples(WORD, LABEL | st.integers(0, 2)), min_size=1, max_size=4)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=2)
DATA: dict[str, st.SearchStrategy[Rows]] = {
    "regression": NUMBERS.flatmap(
        lambda one: rows_of(
            text=TEXT, label=st.floats(-9, 9, width=32) if isinstance(one, float) else st.integers(-9, 9)
        )
    ),
    "multi-label": rows_of(text=TEXT, label=st.lists(LABEL, unique=True)),
    "classification": rows_of(text=TEXT, label=LABEL) | rows_of(text=TEXT, text_pair=TEXT, label=st.integers(0, 2)),
    "token-classification": st.lists(
        WORDS.map(lambda words: {"tokens": [word for word, _ in words], "tags": [str(tag) for _, tag in words]}),
        min_size=1,
        max_size=3,
    ),
    "causal-lm": rows_of(prompt=TEXT, completion=TEXT)
    | rows_of(text=TEXT)
    | st.lists(
        TURNS.map(
            lambda turns: {
                "messages": [
                    {"role": role, "content": content}
                    for pair in turns
                    for role, content in zip(("user", "assistant"), pair, strict=True)
                ]
            }
        ),
        min_size=1,
        max_size=3,
    ),
    "seq2seq": rows_of(source=TEXT, target=TEXT),
}


def written_out(row: dict[str, Any]) -> dict[str, Any]:
    """Lists as the text of JSON."""
    return {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}


def as_csv(rows: Rows, line_end: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file, list(rows[0]), lineterminator=line_end, quoting=csv.QUOTE_ALL if line_end == "\n" else csv.QUOTE_MINIMAL
    )
    writer.writeheader()
    writer.writerows(map(written_out, rows))
    return file.getvalue().encode()


def write_all(place: Path, rows: Rows) -> list[Path]:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    files = {
        "a.jsonl": lines,
        "b.ndjson": "".join(json.dumps(row) + "\r\n\r\n" for row in rows).encode(),
        "c.jsonl": codecs.BOM_UTF8 + lines.rstrip(b"\n"),
        "d.jsonl": "".join(json.dumps(written_out(row)) + "\n" for row in rows).encode(),
        "e.json": json.dumps(rows, indent=1).encode(),
        "f.json": lines,
        "g.csv": as_csv(rows, "\n"),
        "h.csv": codecs.BOM_UTF8 + as_csv(rows, "\r\n"),
        "i.JSONL": "".join(json.dumps({"id": {}, **row, "other": None}) + "\n" for row in rows).encode(),
    }
    for name, data in files.items():
        (place / name).write_bytes(data)
    for name, content in {"j.parquet": rows, "k.parquet": [written_out(row) for row in rows]}.items():
        table = pyarrow.Table.from_pylist(content)
        parquet.write_table(table, place / name)
    texts = [
        name for name, kind in zip(table.schema.names, table.schema.types, strict=True) if kind == pyarrow.string()
    ]
    for name in texts:
        encoded = table.column(name).dictionary_encode()
        table = table.set_column(table.schema.get_field_index(name), name, encoded)
    parquet.write_table(table, place / "l.parquet", compression="zstd")
    return sorted(place.iterdir())


def examples(task: Any, path: Path) -> Examples:
    given = tokenizer("byte-level", chat_template=CHAT)
    encoder = Encoder(
        task=task,
        tokenizer=given,
        inputs=INPUTS | {"decoder_input_ids"},
        vocabulary=10**6,
        label_ids=LABELS,
        labels=1 if task == "regression" else 3,
        max_length=64,
        positions=1024,
        decoder_inputs=lambda ids: [0, *ids[:-1]],
    )
    return TASKS[encoder.task].encode(encoder, read_table(path), Silent())  # in this process: there are many


def seen(found: Examples) -> tuple[Any, ...]:
    """All that training sees of them."""
    return found.features, found.targets, found.skipped, found.cut


@pytest.mark.parametrize("task", DATA)
@few(12)
@given(data=st.data())
def test_training_sees_the_same_in_every_format(task: str, data: st.DataObject) -> None:
    rows = data.draw(DATA[task])
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        paths = write_all(Path(place), rows)
        assert len(paths) == 12
        first, *others = [seen(examples(task, path)) for path in paths]
    assert all(other == first for other in others)


@pytest.mark.parametrize("label", [None, "", "other", 3, 1.0, 0.5, True, [0]])
def test_what_is_no_label_is_none_in_any_format(tmp_path: Path, label: object) -> None:
    for path in write_all(tmp_path, [{"text": "fox", "label": label}]):
        with pytest.raises(DataError, match=r"row 1: column 'label'"):
            examples("classification", path)
