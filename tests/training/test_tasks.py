"""Every task from its data to the next global model: the loss falls, updates merge, hidden units stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedqsn_cli import client_train, evaluate, merge
from fedqsn_cli.errors import DataError, InputError
from fedqsn_cli.models.architecture import task_of
from support.raw_safetensors import read_model
from support.tokenizers import tokenizer
from support.training_jobs import make_proxy, small_model, visible_units, write_lines

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEARN = {"epochs": 10, "lr": 5e-3, "batch_size": 16}
WORDS = ["fox", "dog", "hello", "world"]
TEXTS = [f"{WORDS[row % 4]} says the {WORDS[row % 4]} hello" for row in range(16)]
ENTITIES = {"id2label": {0: "O", 1: "B-x", 2: "I-x", 3: "B-y", 4: "I-y"}}


@dataclass(frozen=True)
class Case:
    """A model, data that it can learn, and the measures that an evaluation of it has."""

    family: str
    head: str
    rows: list[dict[str, Any]]
    measures: set[str]
    options: dict[str, Any] = field(default_factory=dict)
    tokens: str = "byte-level"
    export: dict[str, Any] = field(default_factory=dict)


PROMPTS = [{"prompt": f"say {word}:", "completion": f" {word} {word}"} for word in WORDS * 4]
TURNS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
    for word in WORDS * 4
]
CASES = {
    "regression": Case(
        "roberta",
        "RobertaForSequenceClassification",
        [{"text": text, "label": row % 4 - 1.5} for row, text in enumerate(TEXTS)],
        {"pearson", "spearman"},
        {"problem_type": "regression", "labels": 1},
    ),
    "multi-label": Case(
        "gpt2",
        "GPT2ForSequenceClassification",
        [{"text": text, "label": [[], [0], [1, 4], [2]][row % 4]} for row, text in enumerate(TEXTS)],
        {"accuracy", "macro_f1"},
        {"problem_type": "multi_label_classification"},
    ),
    "pairs": Case(
        "roberta",
        "RobertaForSequenceClassification",
        [{"text": text, "text_pair": "hello", "label": row % 4} for row, text in enumerate(TEXTS)],
        {"accuracy", "macro_f1", "mcc"},
    ),
    "words": Case(
        "roberta",
        "RobertaForTokenClassification",
        [
            {"tokens": text.split(), "tags": [f"B-{'xy'[row % 2]}", "O", "O", "O", "O"]}
            for row, text in enumerate(TEXTS)
        ],
        {"accuracy", "macro_f1", "entity_precision", "entity_recall", "entity_f1"},
        ENTITIES,
    ),
    "masked": Case("roberta", "RobertaForMaskedLM", [{"text": text} for text in TEXTS], {"perplexity"}),
    "chat": Case("llama", "LlamaForCausalLM", TURNS, {"perplexity"}, export={"format": "nf4"}),
    "chat, spaces": Case("qwen3", "Qwen3ForCausalLM", TURNS, {"perplexity"}, tokens="metaspace-first"),
    "completions": Case("gpt2", "GPT2LMHeadModel", PROMPTS, {"perplexity"}),
    "sources": Case(
        "t5",
        "T5ForConditionalGeneration",
        [{"source": row["prompt"], "target": row["completion"]} for row in PROMPTS],
        {"perplexity"},
        tokens="metaspace-always",
    ),
}
MEASURES = ("accuracy", "macro_f1", "mcc", "pearson", "spearman", "perplexity")
ENTITY_MEASURES = ("entity_precision", "entity_recall", "entity_f1")


def make_job(folder: Path, case: Case) -> Path:
    """model/, proxy/, key, proxy.jsonl and data.jsonl of a case."""
    given = tokenizer(case.tokens, chat_template=CHATML)
    options = {"vocab_size": len(given), **case.options}
    small_model(folder / "model", case.family, head=case.head, **options)
    given.save_pretrained(folder / "model")
    make_proxy(folder / "model", folder / "proxy", **case.export)
    write_lines(folder / "data.jsonl", case.rows)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_task_is_learnt_measured_and_merged(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    job = make_job(tmp_path, case)
    data = job / "data.jsonl"
    result = client_train(job / "proxy", job / "update", data=data, eval_data=data, precision="fp32", **LEARN)
    assert result.before is not None and result.after is not None
    assert result.after.loss < 0.95 * result.before.loss
    for measured in (result.before, result.after, evaluate(job / "model", data=data)):
        found = {field for field in (*MEASURES, *ENTITY_MEASURES) if getattr(measured, field) is not None}
        assert found == case.measures
    merge(job / "model", [job / "update"], job / "next", key=job / "key", ledger=job / "proxy.jsonl")
    before, after, shown = read_model(job / "model"), read_model(job / "next"), visible_units(job / "proxy")
    changed = {tensor for tensor in before if not (before[tensor][1] == after[tensor][1]).all()}
    assert changed
    for tensor, units in shown.items():
        if units.axis == "row":
            assert (before[tensor][1][~units.flags] == after[tensor][1][~units.flags]).all()


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({}, "classification"),
        ({"id2label": {"0": "x"}}, "regression"),
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "classification"),
        ({"problem_type": "regression", "num_labels": 3}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi-label"),
    ],
)
def test_the_problem_type_decides_what_a_classifier_learns(config: dict[str, Any], task: str) -> None:
    assert task_of({"architectures": ["BertForSequenceClassification"], **config}, "model")[0] == task


@pytest.mark.parametrize("kind", ["ranking", 3, ["regression"]])
def test_an_unknown_problem_type_is_refused(kind: object) -> None:
    with pytest.raises(InputError, match="problem type .* is unknown"):
        task_of({"architectures": ["BertForSequenceClassification"], "problem_type": kind}, "model")


def test_several_numbers_a_text_are_one_example_each(tmp_path: Path) -> None:
    rows = [{"text": text, "label": [0.1 * row, 1, -2.5]} for row, text in enumerate(TEXTS)]
    case = Case("roberta", "RobertaForSequenceClassification", rows, set(), {"problem_type": "regression", "labels": 3})
    job = make_job(tmp_path, case)
    found = evaluate(job / "model", data=job / "data.jsonl", batch_size=5)
    again = evaluate(job / "model", data=job / "data.jsonl", batch_size=16)
    assert found.loss == pytest.approx(again.loss, rel=1e-6)
    short = write_lines(tmp_path / "short.jsonl", [{"text": "hello", "label": [1, 2]}])
    with pytest.raises(DataError, match="row 1: column 'label' holds 2 numbers, but the model has 3 outputs"):
        evaluate(job / "model", data=short)


@pytest.mark.parametrize("name", ["regression", "multi-label", "masked", "completions", "sources"])
def test_losses_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Its models compute a loss themselves when they are given labels."""
    from fedqsn_cli.checkpoint import Checkpoint
    from fedqsn_cli.models.torch_model import load_model
    from fedqsn_cli.progress import Silent
    from fedqsn_cli.training.data.encoder import Encoder
    from fedqsn_cli.training.steps.batching import collate
    from support.tables import read_table

    job = make_job(tmp_path, CASES[name])
    with Checkpoint.open(job / "model") as checkpoint:
        loaded = load_model(checkpoint)
    encoder = Encoder.of(loaded, 64)
    examples = encoder.encode(read_table(job / "data.jsonl"), Silent())
    batch = collate(examples, range(len(examples)), encoder.padding)
    with torch.no_grad():
        labels = batch.targets.squeeze(-1) if name == "regression" else batch.targets
        expected = loaded.model(**batch.inputs, labels=labels).loss.item()
    assert evaluate(job / "model", data=job / "data.jsonl").loss == pytest.approx(expected, rel=1e-5)
