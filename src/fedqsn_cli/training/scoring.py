"""Evaluation of a model on examples: loss, accuracy, macro F1, perplexity."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from fedqsn_cli.errors import InputError
from fedqsn_cli.models.torch_model import Task
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.batching import Examples, Padding, collate, in_order, loss_sum
from fedqsn_cli.training.loop import extra_inputs


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation.

    Args:
        task: classification or causal-lm.
        examples: number of examples.
        loss: mean negative log-likelihood in nats, over examples (classification) or over tokens (causal-lm).
        accuracy, macro_f1: 0 to 1, for classification. Macro F1 averages over the classes that occur in the data or in
            the predictions.
        perplexity: exp(loss), for causal-lm.
    """

    task: Task
    examples: int
    loss: float
    accuracy: float | None
    macro_f1: float | None
    perplexity: float | None


@torch.inference_mode()
def score(model: Any, examples: Examples, *, batch_size: int, padding: Padding, progress: Progress) -> Evaluation:
    """Measure a model, in its own precision and on its own device.

    Raises:
        InputError: the loss is not finite.
    """
    progress.start("evaluating", len(examples), "examples")
    total, count = 0.0, 0
    predictions: list[int] = []
    labels: list[int] = []
    model.eval()
    for rows in in_order(examples.lengths, batch_size):
        batch = collate(examples, rows, padding).to(model.device)
        logits = model(**batch.inputs, **extra_inputs(model)).logits
        total += loss_sum(examples.task, logits, batch.targets).item()
        count += batch.count
        if examples.task == "classification":
            predictions += logits.argmax(dim=-1).tolist()
            labels += batch.targets.tolist()
        progress.advance(len(rows), loss=total / count)
    progress.finish()
    loss = total / count
    if not math.isfinite(loss):
        raise InputError(f"the model's loss is {loss}", hint="its weights may be damaged")
    if examples.task == "classification":
        hits = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
        return Evaluation(examples.task, len(examples), loss, hits / count, macro_f1(labels, predictions), None)
    perplexity = math.exp(min(loss, 700.0))  # exp of more is larger than any float
    return Evaluation(examples.task, len(examples), loss, None, None, perplexity)


def macro_f1(labels: list[int], predictions: list[int]) -> float:
    """Mean of 2 · hits / (times true + times predicted) over the classes that are true or predicted at least once."""
    hits = Counter(label for label, prediction in zip(labels, predictions, strict=True) if label == prediction)
    times = Counter(labels) + Counter(predictions)
    return sum(2 * hits[label] / times[label] for label in times) / len(times)
