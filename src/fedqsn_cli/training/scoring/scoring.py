"""Evaluation of a model on examples: its loss, and the measures of its task."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fedqsn_cli.errors import InputError
from fedqsn_cli.models.architecture import Task
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data.tasks import TASKS
from fedqsn_cli.training.scoring.one_by_one import OneByOne
from fedqsn_cli.training.steps.batching import Examples, Padding, collate, in_order, loss_sum, of_one_length
from fedqsn_cli.training.steps.loop import extra_inputs


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation; a measure that a task does not have is None.

    Args:
        task: what the model is for.
        examples: number of examples.
        loss: in nats, the mean over examples or, for language models and labels of words, over what counts; for
            regression the mean squared error.
        accuracy: 0 to 1: share of examples with the right label, of texts with exactly the right labels (multi-label),
            of words (token classification).
        macro_f1: 0 to 1, the mean over the classes that occur in the data or in the answers; for multi-label over all.
        perplexity: exp(loss), for language models.
        mcc: Matthews correlation, -1 to 1, for classification.
        pearson, spearman: correlations with the right numbers, -1 to 1, for regression.
        entity_precision, entity_recall, entity_f1: 0 to 1, of whole entities in B- and I- labels (seqeval).
        bleu: 0 to 100, of the corpus (sacrebleu). rouge1, rouge2, rougel: 0 to 1, mean F1. exact_match: 0 to 1.
        generated: how many different prompts were answered for these.
        skipped: rows with nothing that counts. cut: rows that were too long and lost a part.
        unused_columns: columns of the data that nothing was made of.
    """

    task: Task
    examples: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    perplexity: float | None = None
    mcc: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    entity_precision: float | None = None
    entity_recall: float | None = None
    entity_f1: float | None = None
    bleu: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rougel: float | None = None
    exact_match: float | None = None
    generated: int | None = None
    skipped: int = 0
    cut: int = 0
    unused_columns: tuple[str, ...] = ()


@torch.inference_mode()
def score(model: Any, examples: Examples, *, batch_size: int, padding: Padding, progress: Progress) -> Evaluation:
    """Measure a model, in its own precision and on its own device.

    On a CPU, the result does not depend on `batch_size`, to the last bit: see `one_by_one`.

    Raises:
        InputError: the loss is not finite.
    """
    kind = TASKS[examples.task]
    progress.start("evaluating", len(examples), "examples")
    losses: list[float] = []
    total, count = 0.0, 0
    right: list[Any] = []
    given: list[Any] = []
    model.eval()
    on_cpu = model.device.type == "cpu"
    for rows in of_one_length(examples, batch_size) if on_cpu else in_order(examples.lengths, batch_size):
        batch = collate(examples, rows, padding).to(model.device)
        with OneByOne(len(rows)) if on_cpu else nullcontext():
            logits = model(**batch.inputs, **extra_inputs(model)).logits
        each = [loss_sum(examples.task, logits[i : i + 1], batch.targets[i : i + 1]) for i in range(len(rows))]
        losses += torch.stack(each).tolist()
        total, count = total + sum(losses[-len(rows) :]), count + batch.count
        for answers, more in zip((right, given), kind.answers(logits, batch.targets), strict=True):
            answers += more
        progress.advance(len(rows), loss=total / count)
    progress.finish()
    loss = math.fsum(losses) / count
    if not math.isfinite(loss):
        raise InputError(f"the model's loss is {loss}", hint="its weights may be damaged")
    measures: dict[str, Any] = dict(kind.measure(right, given, _names(model)))
    return Evaluation(
        task=examples.task,
        examples=len(examples),
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)) if kind.perplexity else None,  # exp of more is larger than any float
        skipped=examples.skipped,
        cut=examples.cut,
        unused_columns=examples.unused,
        **measures,
    )


def _names(model: Any) -> list[str]:
    """The labels of a classifier, in the order of their ids."""
    names = getattr(model.config, "id2label", None) or {}
    return [str(names[number]) for number in sorted(names)]
