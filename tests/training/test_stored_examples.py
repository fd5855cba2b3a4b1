"""Examples in memory or in a file: the same ones, and the memory of a process does not grow with them."""

from __future__ import annotations

import json
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli import client_train
from fedqsn_cli.training.data import tables
from fedqsn_cli.training.data.stored_examples import Computed, StoredExamples
from support.training_jobs import data_for, make_proxy, small_model

IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=9)
TARGETS = st.one_of(st.integers(0, 9), IDS, st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3))


@given(st.lists(st.tuples(st.fixed_dictionaries({"input_ids": IDS, "attention_mask": IDS}), TARGETS), max_size=20))
def test_what_is_read_is_what_was_added(examples: list[tuple[dict[str, list[int]], Any]]) -> None:
    stored = StoredExamples(None)
    for feature, target in examples:
        stored.add(feature, target, 1)
    order = range(len(stored) - 1, -1, -1)
    assert [stored.read(row) for row in order] == [examples[row] for row in order]


def test_a_file_of_examples_has_no_name_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    stored = StoredExamples(tmp_path, in_memory=10)
    stored.add({"input_ids": list(range(100))}, 1, 100)
    assert stat.S_IMODE(os.fstat(stored._file.fileno()).st_mode) == 0o600
    assert not list(tmp_path.iterdir())


def test_a_computed_sequence_is_a_sequence() -> None:
    squares = Computed(4, lambda place: place * place)
    assert list(squares) == [0, 1, 4, 9] and squares[-1] == 9 and squares[1:3] == [1, 4] and 4 in squares
    assert squares == [0, 1, 4, 9] and squares != [0, 1, 4]
    with pytest.raises(IndexError):
        squares[4]


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("bert", "BertForSequenceClassification", {}),
        ("llama", "LlamaForCausalLM", {"packing": True}),
    ],
)
def test_an_update_does_not_depend_on_where_examples_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head: str, options: dict[str, Any]
) -> None:
    proxy, rows = (
        make_proxy(small_model(tmp_path / "model", name, head=head), tmp_path / "proxy"),
        data_for(head, tmp_path),
    )
    recipe = {"epochs": 1, "batch_size": 4, "device": "cpu", "precision": "fp32", **options}
    client_train(proxy, tmp_path / "whole", data=rows, **recipe)
    # a user has no reason to choose either: small data is small, and large data must not fill memory
    monkeypatch.setattr("fedqsn_cli.training.data.encoder.StoredExamples", partial(StoredExamples, in_memory=1))
    monkeypatch.setattr(tables, "PART_ROWS", 3)
    client_train(proxy, tmp_path / "parts", data=rows, **recipe)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.soak
def test_memory_does_not_grow_with_the_number_of_encoded_rows(tmp_path: Path) -> None:
    """200,000 short rows: as lists of numbers their tokens would take more than 400 MB."""
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.torch_model import load_model
    from fedqsn_cli.progress import SILENT
    from fedqsn_cli.training.data.data_files import open_data
    from fedqsn_cli.training.data.encoder import Encoder

    model = small_model(tmp_path / "model", "bert", head="BertForSequenceClassification")
    path = tmp_path / "data.jsonl"
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 3, "label": 1}) + "\n"
    path.write_text(row * 200_000)
    with Checkpoint.open(model) as checkpoint:
        encoder = Encoder.of(load_model(checkpoint), 64)
    before = resident()
    examples = encoder.encode(open_data(path), SILENT, folder=tmp_path)
    assert len(examples) == 200_000 and examples.features[199_999] == examples.features[0]
    assert resident() - before < 50 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
