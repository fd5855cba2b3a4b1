"""`evaluate --generate`: what a model writes, and how it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedqsn_cli import evaluate
from fedqsn_cli.checkpoint import Checkpoint
from fedqsn_cli.errors import DataError, InputError
from fedqsn_cli.models.torch_model import Loaded, load_model
from fedqsn_cli.options import EvaluateOptions
from fedqsn_cli.progress import Silent
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.tables import Table
from fedqsn_cli.training.scoring import generation
from support.tokenizers import tokenizer
from support.training_jobs import labelled, small_model, write_lines

PROMPTS = ["hello", "hello world", "the quick brown fox", "2+2="]


def model(folder: Path, family: str, kind: str) -> Path:
    given = tokenizer(kind)
    small_model(folder, family, vocab_size=len(given))
    given.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("writer") / "model", "llama", "metaspace-first")


def load(folder: Path) -> Loaded:
    with Checkpoint.open(folder) as checkpoint:
        return load_model(checkpoint)


def written(loaded: Loaded, batch_size: int = 4) -> list[str]:
    options = EvaluateOptions(data="data.jsonl", generate=True, max_new_tokens=6, batch_size=batch_size)
    encoder = Encoder.of(loaded, 64)
    name = generation._COLUMNS[loaded.task][0]
    table = Table(Path("data.jsonl"), {name: PROMPTS}, (name,), len(PROMPTS))
    ids = [generation.prompt_ids(encoder, table, row, text, name, 6) for row, text in enumerate(PROMPTS)]
    return list(generation.written(loaded.model, encoder, ids, options, Silent()))


def greedy(loaded: Loaded, text: str) -> str:
    """The likeliest token six times, computed anew from the start each time."""
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    new: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.int64)], dim=1)).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == loaded.tokenizer.eos_token_id:
            break
    return str(loaded.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_the_likeliest_token_is_written_each_time(writer: Path) -> None:
    loaded = load(writer)
    assert written(loaded) == [greedy(loaded, text) for text in PROMPTS]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_batches_change_nothing(tmp_path: Path, family: str) -> None:
    loaded = load(model(tmp_path / "model", family, "metaspace-always"))
    assert written(loaded, 1) == written(loaded, 3) == written(loaded, 64)


def test_texts_are_measured_against_all_right_answers(writer: Path, tmp_path: Path) -> None:
    loaded = load(writer)
    says = [greedy(loaded, text) for text in PROMPTS]
    rows = [{"prompt": text, "completion": " " + text_of} for text, text_of in zip(PROMPTS, says, strict=True)]
    rows += [{"prompt": text, "completion": "quite another"} for text in PROMPTS]
    data = write_lines(tmp_path / "data.jsonl", rows)
    found = evaluate(writer, data=data, generate=True, max_new_tokens=6)
    assert (found.generated, found.exact_match, found.examples) == (4, 1.0, 8)
    assert found.bleu == pytest.approx(100) and found.rouge1 == found.rougel
    wrong = write_lines(tmp_path / "wrong.jsonl", rows[4:])
    found = evaluate(writer, data=wrong, generate=True, max_new_tokens=6)
    assert (found.exact_match, found.rouge2) == (0.0, 0.0)
    assert evaluate(writer, data=wrong).bleu is None


def test_measures_of_texts_are_those_of_the_libraries() -> None:
    texts, right = ["the cat sat on the mat", "a dog"], [["the cat sat on a mat", "cats sit"], ["a dog"]]
    assert generation._bleu(texts, [["the cat sat on the mat"], ["a dog"]]) == pytest.approx(100)
    assert 0 < generation._bleu(texts, right) < 100
    assert generation._rouge(texts, right) == pytest.approx(
        {"rouge1": (5 / 6 + 1) / 2, "rouge2": (3 / 5 + 1) / 2, "rougel": (5 / 6 + 1) / 2}
    )


def test_the_length_of_answers_is_refused_where_there_are_none() -> None:
    with pytest.raises(InputError, match="--max-new-tokens: nothing is generated; add --generate"):
        EvaluateOptions(data="data.jsonl", max_new_tokens=6)


def test_what_writes_no_texts_is_refused(writer: Path, tmp_path: Path) -> None:
    classifier, data = small_model(tmp_path / "model"), labelled(tmp_path / "labelled.jsonl")
    with pytest.raises(InputError, match="--generate: a classification model writes no texts; leave it out"):
        evaluate(classifier, data=data, generate=True)
    plain = write_lines(tmp_path / "plain.jsonl", [{"text": "hello world"}])
    with pytest.raises(DataError, match="column 'prompt' is missing .*--generate needs prompt and completion"):
        evaluate(writer, data=plain, generate=True)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello", "completion": "world"}])
    with pytest.raises(InputError, match="--max-new-tokens: the model takes 64 tokens"):
        evaluate(writer, data=prompts, generate=True, max_new_tokens=64)


def test_libraries_that_are_not_there_are_named(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--generate: needs sacrebleu and rouge_score; install fedqsn-cli.generation"):
        evaluate(writer, data="any.jsonl", generate=True)
