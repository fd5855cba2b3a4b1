"""Texts of language models: what is learnt is the text that inference will see, and only what counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_cli.errors import DataError
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.examples import IGNORED, Examples
from fedqsn_cli.training.data.tables import Table
from support.scenario import few
from support.tokenizers import KINDS, tokenizer

INPUTS = frozenset({"input_ids", "attention_mask"})


def encoder(kind: str, task: Any = "causal-lm", **options: Any) -> Encoder:
    fields = {"label_ids": {}, "labels": 0, "max_length": 64, "positions": 1024, "vocabulary": 10**6, **options}
    return Encoder(task=task, tokenizer=tokenizer(kind), inputs=INPUTS, **fields)


def encode(given: Encoder, **columns: list[Any]) -> Examples:
    rows = len(next(iter(columns.values())))
    return given.encode(Table(Path("data.jsonl"), columns, tuple(columns), rows), Silent())


def learnt(given: Encoder, examples: Examples, row: int = 0) -> str:
    """The text of what counts, without the end of text."""
    return str(given.tokenizer.decode([one for one in examples.targets[row] if one != IGNORED][:-1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), [("2+2=", "4"), ("2+2= ", "4"), ("2+2=", " 4"), ("hello ", "world")])
def test_a_completion_is_trained_as_the_tokens_of_the_joined_text(kind: str, prompt: str, completion: str) -> None:
    given = encoder(kind)
    examples = encode(given, prompt=[prompt], completion=[completion])
    ids = examples.features[0]["input_ids"]
    end = given.tokenizer.eos_token_id
    assert ids == [*(one for one in given.tokenizer(prompt + completion)["input_ids"] if one != end), end]
    assert learnt(given, examples).strip() == completion.strip()


def test_no_space_comes_between_a_prompt_and_its_completion() -> None:
    given = encoder("metaspace-always")
    examples = encode(given, prompt=["2+2="], completion=["4"])
    assert given.tokenizer.decode(examples.features[0]["input_ids"], skip_special_tokens=True).strip() == "2+2=4"


def test_a_token_over_the_boundary_counts() -> None:
    given = encoder("byte-level")
    (ids,) = given.tokenizer(["brown fox"])["input_ids"]
    assert given.tokenizer.convert_ids_to_tokens(ids[-1]) == "Ġfox"
    examples = encode(given, prompt=["brown "], completion=["fox"])
    assert [one for one in examples.targets[0] if one != IGNORED] == [ids[-1], given.tokenizer.eos_token_id]


TEXTS = st.text(st.sampled_from("helo wrd2+=4é世 \n"), max_size=12)


@few(60)
@given(kind=st.sampled_from(KINDS), prompt=TEXTS.filter(bool), completion=TEXTS.filter(str.strip))
def test_what_counts_is_the_end_of_the_text_and_holds_all_of_the_completion(
    kind: str, prompt: str, completion: str
) -> None:
    given = encoder(kind)
    examples = encode(given, prompt=[prompt], completion=[completion])
    ids, targets = examples.features[0]["input_ids"], examples.targets[0]
    first = next(place for place, target in enumerate(targets) if target != IGNORED)
    assert targets[first:] == ids[first:]
    before = given.tokenizer.decode(ids[:first], skip_special_tokens=True)
    assert len("".join(before.split())) <= len("".join(prompt.split()))


@pytest.mark.parametrize("kind", ["metaspace-first", "prepended", "unigram"])
def test_the_boundary_is_found_without_offsets_too(kind: str) -> None:
    given = encoder(kind)
    with_offsets = encode(given, prompt=["2+2= ", "hello "], completion=["4", "world"])
    slow = type("Slow", (), {"is_fast": False, "__getattr__": lambda _, name: getattr(given.tokenizer, name)})()
    type(slow).__call__ = lambda _, *args, **options: given.tokenizer(*args, **options)
    without = dataclasses.replace(given, tokenizer=slow)
    assert encode(without, prompt=["2+2= ", "hello "], completion=["4", "world"]) == with_offsets


def test_cut_rows_are_counted() -> None:
    given = encoder("byte-level", max_length=4)
    texts = encode(given, text=["hello world, hello there!", "hello world"])
    assert (texts.cut, [len(feature["input_ids"]) for feature in texts.features]) == (1, [4, 3])
    replies = encode(given, prompt=["hello world, hello", "2"], completion=[" there", "4"])
    assert replies.cut == 1
    assert encode(dataclasses.replace(given, max_length=64), text=["hello world"]).cut == 0


def test_columns_that_are_not_used_are_named() -> None:
    given = encoder("byte-level")
    assert encode(given, text=["hello world"], label=[1], id=["x"]).unused == ("id", "label")
    assert encode(given, prompt=["2+2="], completion=["4"], text=["hello world"]).unused == ("text",)


def test_a_tenth_and_a_half_of_the_tokens_are_hidden_and_most_of_them_masked() -> None:
    given = encoder("word-piece", "masked-lm", max_length=10**6)
    text = " ".join(["the quick brown fox jumps over the lazy dog"] * 400)
    examples = encode(given, text=[text])
    ids, targets = examples.features[0]["input_ids"], examples.targets[0]
    places = [place for place, target in enumerate(targets) if target != IGNORED]
    whole = given.tokenizer(text)["input_ids"]
    assert [targets[place] for place in places] == [whole[place] for place in places]
    assert all(ids[place] == whole[place] for place in set(range(len(ids))) - set(places))
    assert len(places) == round(0.15 * len(ids))
    masked = sum(ids[place] == given.tokenizer.mask_token_id for place in places) / len(places)
    kept = sum(ids[place] == whole[place] for place in places) / len(places)
    assert masked == pytest.approx(0.8, abs=0.06)
    assert kept == pytest.approx(0.1, abs=0.05)


def test_the_seed_decides_what_is_hidden() -> None:
    given = encoder("word-piece", "masked-lm")
    columns = {"text": ["the quick brown fox jumps over the lazy dog"] * 2}
    first = encode(given, **columns)
    assert encode(given, **columns) == first
    assert encode(dataclasses.replace(given, seed=1), **columns) != first
    assert first.targets[0] != first.targets[1]


def test_special_tokens_are_never_hidden() -> None:
    given = encoder("metaspace-always", "masked-lm")
    examples = encode(given, text=["hello"] * 50)
    assert {ids["input_ids"][0] for ids in examples.features} == {given.tokenizer.convert_tokens_to_ids("<s>")}
    assert {targets[0] for targets in examples.targets} == {IGNORED}


@pytest.mark.parametrize(
    ("task", "columns", "named"),
    [
        ("causal-lm", {"text": ["fox", "bad", "dog"]}, "column 'text'"),
        ("causal-lm", {"prompt": ["fox", "b", "dog"], "completion": ["fox", "ad", "dog"]}, "column 'prompt' with"),
        ("masked-lm", {"text": ["fox", "bad", "dog"]}, "column 'text'"),
    ],
)
@pytest.mark.parametrize("error", [ValueError, BaseException, KeyError])
def test_a_row_that_cannot_be_tokenized_is_named(
    task: str, columns: dict[str, Any], named: str, error: type[BaseException]
) -> None:
    given = encoder("byte-level", task)

    class Fails:
        """Tokenizers written in Rust may end with what is no Exception."""

        def __getattr__(self, name: str) -> Any:
            return getattr(given.tokenizer, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            if "bad" in text:
                raise error("no")
            return given.tokenizer(text, **options)

    with pytest.raises(DataError, match=rf"data\.jsonl: row 2: {named}.* cannot be tokenized \(.*no"):
        encode(dataclasses.replace(given, tokenizer=Fails()), **columns)


def test_rows_that_are_tokenized_in_parts_are_masked_and_numbered_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given, texts = encoder("word-piece", "masked-lm"), [f"hello world fox {number}" for number in range(7)]
    whole = encode(given, text=texts)
    monkeypatch.setattr("fedqsn_cli.training.data.tables.PART_ROWS", 2)
    parts = encode(given, text=texts)
    assert list(parts.features) == list(whole.features) and list(parts.targets) == list(whole.targets)
    with pytest.raises(DataError, match="row 6: column 'text' holds a number"):
        encode(given, text=[*texts[:5], 5])


@pytest.mark.parametrize("family", ["M2M100", "Bart"])
def test_a_decoder_is_fed_with_what_its_own_code_makes_of_the_target(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        decoder_start_token_id=7,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    encoder = Encoder.of(Loaded(model, tokenizer("unigram"), "seq2seq"), 16)
    assert encoder.decoder_inputs is not None
    assert encoder.decoder_inputs([5, 6, 2]) == [7, 5, 6]
