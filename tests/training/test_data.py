"""Rows to token ids and targets: labels, what of a text the loss counts, what is cut and what is refused."""

from __future__ import annotations

import copy
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import DataError, InputError
from fedqsn_cli.models.torch_model import Loaded, load_model
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tasks import TASKS
from fedqsn_cli.training.steps.batching import IGNORED, Examples
from support.scenario import MEMORY, few
from support.tables import read_table
from support.training_jobs import small_model, write_lines

EOS = 2
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
MARKED_CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def load(folder: Path) -> Loaded:
    with Checkpoint.open(folder) as checkpoint:
        return load_model(checkpoint)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    names = {"id2label": {0: "bad", 1: "good", 2: "7", 3: "odd", 4: "even"}}
    names["label2id"] = {name: number for number, name in names["id2label"].items()}  # type: ignore[assignment]
    return load(small_model(tmp_path_factory.mktemp("classifier") / "model", "bert", **names))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(small_model(tmp_path_factory.mktemp("writer") / "model", "gpt2"))


def encode(loaded: Loaded, folder: Path, *rows: dict[str, Any], max_length: int = 64) -> Examples:
    table = read_table(write_lines(folder / "data.jsonl", rows))
    return Encoder.of(loaded, max_length).encode(table, Silent())


TEXTS = st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: f"w5 {text} w6")  # Cs: no UTF-8 for them
LABELLED = st.sampled_from([st.integers(0, 4), st.sampled_from(["bad", "good", "7", "odd"])]).flatmap(
    lambda labels: st.lists(st.fixed_dictionaries({"text": TEXTS, "label": labels}), min_size=1)
)
PAIRS = st.lists(st.fixed_dictionaries({"text": TEXTS, "text_pair": TEXTS, "label": st.integers(0, 4)}), min_size=1)
REPLIES = st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}), min_size=1)
PLAIN = st.lists(st.fixed_dictionaries({"text": TEXTS}), min_size=1)


def in_every_format(place: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The same rows as JSONL (escaped and not), a JSON array, CSV and Parquet."""
    paths = [place / name for name in ("a.jsonl", "b.jsonl", "c.json", "d.csv", "e.parquet")]
    write_lines(paths[0], rows)
    paths[1].write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    paths[2].write_bytes(json.dumps(rows).encode())
    with paths[3].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), paths[4])
    return paths


@few(40)
@given(rows=LABELLED | PAIRS | REPLIES | PLAIN)
def test_the_format_of_a_file_does_not_change_the_examples(
    classifier: Loaded, writer: Loaded, rows: list[dict[str, Any]]
) -> None:
    encoder = Encoder.of(classifier if "label" in rows[0] else writer, 64)
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        tables = map(read_table, in_every_format(Path(place), rows))
        first, *others = [TASKS[encoder.task].encode(encoder, table, Silent()) for table in tables]  # no child: many
    assert len(first) == len(rows)
    assert all(examples == first for examples in others)


def test_labels_are_taken_by_name_and_else_by_number(classifier: Loaded, tmp_path: Path) -> None:
    labels = ["good", "bad", 3, "4", "7", "even"]
    examples = encode(classifier, tmp_path, *({"text": "w5", "label": label} for label in labels))
    assert examples.targets == [1, 0, 3, 4, 2, 4]


@pytest.mark.parametrize("label", ["neither", 5, -1, "5", 1.0, True, None, ["good"], ""])
def test_an_unknown_label_is_refused_with_its_row(classifier: Loaded, tmp_path: Path, label: object) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: row 2: .*label"):
        encode(classifier, tmp_path, {"text": "w5", "label": 0}, {"text": "w6", "label": label})


def test_pairs_of_texts_are_joined(classifier: Loaded, tmp_path: Path) -> None:
    examples = encode(classifier, tmp_path, {"text": "w5 w6", "text_pair": "w7", "label": 0})
    assert examples.features[0]["input_ids"] == [5, 6, 7]


def test_texts_are_cut_to_the_length_asked_for_and_to_what_the_model_takes(classifier: Loaded, tmp_path: Path) -> None:
    row = {"text": " ".join(["w5"] * 100), "label": 0}
    assert list(encode(classifier, tmp_path, row, max_length=7).lengths) == [7]
    assert list(encode(classifier, tmp_path, row, max_length=10_000).lengths) == [64]


def test_roberta_takes_fewer_tokens_than_it_has_positions(tmp_path: Path) -> None:
    loaded = load(small_model(tmp_path / "model", "roberta", pad_token_id=1))
    loaded.tokenizer.model_max_length = 10**9
    examples = encode(loaded, tmp_path, {"text": " ".join(["w5"] * 100), "label": 0}, max_length=10_000)
    assert list(examples.lengths) == [62]


def test_inputs_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    loaded = load(small_model(tmp_path / "model", "distilbert"))
    loaded.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert set(encode(loaded, tmp_path, {"text": "w5", "label": 0}).features[0]) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "w5"}, r"column 'label' is missing \(found: text\)"),
        ({"label": 1}, "column 'text' is missing"),
        ({"text": 5, "label": 1}, "row 1: column 'text' holds a number, not text"),
        ({"text": None, "label": 1}, "row 1: column 'text' holds nothing, not text"),
        ({"text": "", "label": 1}, "row 1: the text is empty"),
    ],
)
def test_rows_that_a_classifier_cannot_use_are_refused(
    classifier: Loaded, tmp_path: Path, row: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        encode(classifier, tmp_path, row)


def test_all_tokens_of_a_plain_text_count_but_the_first(writer: Loaded, tmp_path: Path) -> None:
    examples = encode(writer, tmp_path, {"text": "w5 w6 w7", "label": "left out"})
    assert examples.features[0]["input_ids"] == [5, 6, 7]
    assert examples.targets == [[IGNORED, 6, 7]]


def test_rows_with_nothing_to_learn_from_are_skipped_and_counted(writer: Loaded, tmp_path: Path) -> None:
    examples = encode(writer, tmp_path, {"text": ""}, {"text": "w5 w6"}, {"text": "w5"})
    assert len(examples) == 1
    assert examples.skipped == 2
    with pytest.raises(DataError, match="no row has a text"):
        encode(writer, tmp_path, {"text": ""}, {"text": "w5"})


def test_only_the_completion_and_the_end_of_text_count(writer: Loaded, tmp_path: Path) -> None:
    examples = encode(writer, tmp_path, {"prompt": "w5 w6 ", "completion": "w7 w8"})
    assert examples.features[0]["input_ids"] == [5, 6, 7, 8, EOS]
    assert examples.targets == [[IGNORED, IGNORED, 7, 8, EOS]]


def test_a_long_prompt_loses_its_front_before_the_completion_is_touched(writer: Loaded, tmp_path: Path) -> None:
    row = {"prompt": "w3 w4 w5 w6 ", "completion": "w7 w8"}
    assert encode(writer, tmp_path, row, max_length=5).features[0]["input_ids"] == [5, 6, 7, 8, EOS]
    assert encode(writer, tmp_path, row, max_length=3).features[0]["input_ids"] == [6, 7, 8]


def test_a_prompt_without_its_completion_is_refused(writer: Loaded, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'completion' is missing"):
        encode(writer, tmp_path, {"prompt": "w5", "text": "w6"})


def conversation(writer: Loaded, folder: Path, template: str | None, messages: object) -> Examples:
    loaded = writer._replace(tokenizer=copy.deepcopy(writer.tokenizer))
    loaded.tokenizer.chat_template = template
    return encode(loaded, folder, {"messages": messages})


TURNS = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]


def test_turns_of_the_assistant_count_where_the_template_marks_them(writer: Loaded, tmp_path: Path) -> None:
    examples = conversation(writer, tmp_path, MARKED_CHAT, TURNS)
    assert examples.features[0]["input_ids"] == [5, 6, 7, 8]
    assert examples.targets == [[IGNORED, IGNORED, 7, 8]]


def test_turns_of_the_assistant_count_where_the_template_marks_nothing(writer: Loaded, tmp_path: Path) -> None:
    examples = conversation(writer, tmp_path, CHAT, TURNS)
    assert examples.features[0]["input_ids"] == [1, 5, 6, 1, 7, 8]
    assert examples.targets == [[IGNORED, IGNORED, IGNORED, 1, 7, 8]]  # the template has no generation prompt


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        (None, TURNS, "no chat template"),
        (CHAT, "w5", "row 1: column 'messages' holds text, not a list"),
        (CHAT, [], "row 1: column 'messages' is not a list of objects"),
        (CHAT, [{"role": "user"}], "row 1: column 'messages' is not a list of objects"),
        (CHAT, [{"content": "w5"}], "row 1: column 'messages' is not a list of objects"),
        (
            "{{ raise_exception('roles must alternate') }}",
            TURNS,
            r"row 1: column 'messages': the chat template does not accept the conversation \(roles must",
        ),
    ],
)
def test_conversations_that_cannot_be_used_are_refused(
    writer: Loaded, tmp_path: Path, template: str | None, messages: object, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        conversation(writer, tmp_path, template, messages)


def test_null_fields_that_parquet_adds_do_not_reach_the_template(writer: Loaded, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }} {% if 'name' in m %}w9{% endif %} {% endfor %}"
    turns = [{"role": "user", "content": "w5", "name": None}, {"role": "assistant", "content": "w6", "name": "x"}]
    assert conversation(writer, tmp_path, template, turns).features[0]["input_ids"] == [5, 6, 9]


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    loaded = load(small_model(tmp_path / "model", "bert", vocab_size=50))
    with pytest.raises(InputError, match="beyond the model's vocabulary of 50"):
        encode(loaded, tmp_path, {"text": "w60", "label": 0})


def test_a_model_without_a_tokenizer_is_refused(classifier: Loaded) -> None:
    with pytest.raises(InputError, match="the model has no tokenizer"):
        Encoder.of(classifier._replace(tokenizer=None), 64)


def test_a_model_that_only_generates_without_an_encoder_is_refused(tmp_path: Path) -> None:
    loaded = load(small_model(tmp_path / "model", "gpt2"))._replace(task="seq2seq")
    with pytest.raises(InputError, match="GPT2LMHeadModel is not an encoder-decoder model"):
        Encoder.of(loaded, 64)
