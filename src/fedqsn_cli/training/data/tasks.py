"""Everything that differs between tasks, a row a task: a task is added here, and in `models.architecture`.

task                   columns                    target                              loss
classification         text, label                a class id                          cross-entropy
regression             text, label                a number for each output            squared error
multi-label            text, label (a list)       a flag for each label               binary cross-entropy
token-classification   tokens, tags (lists)       a class id for a word's first token cross-entropy
causal-lm              messages; prompt and       the token itself, where it counts   cross-entropy of t from t - 1
completion; text
masked-lm              text                       the token that was masked           cross-entropy
seq2seq                source, target             the tokens to write                 cross-entropy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedqsn_cli.models.architecture import Task
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data import labelled, language, losses, metrics
from fedqsn_cli.training.data.examples import Examples
from fedqsn_cli.training.data.tables import Table
from fedqsn_cli.training.data.tokenizing import Encoding


@dataclass(frozen=True, slots=True)
class TaskKind:
    """How a task is learnt and measured.

    Args:
        encode: rows to examples.
        stack: targets of some examples to a tensor; what is IGNORED in it does not count.
        loss: sum over a batch of logits and targets.
        constant_loss: of a model that gives the best answer that does not depend on the text.
        answers: right and given answers of a batch. measure: the measures of all answers.
        perplexity: whether exp(loss) means something.
    """

    encode: Callable[[Encoding, Table, Progress], Examples]
    stack: Callable[[Sequence[Any]], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    constant_loss: Callable[[Sequence[Any]], float]
    answers: Callable[[Tensor, Tensor], tuple[list[Any], list[Any]]] = metrics.no_answers
    measure: metrics.Measure = metrics.none
    perplexity: bool = False


TASKS: dict[Task, TaskKind] = {
    "classification": TaskKind(
        encode=labelled.classes,
        stack=losses.whole_numbers,
        loss=losses.cross_entropy,
        constant_loss=losses.entropy_of_classes,
        answers=metrics.largest,
        measure=metrics.of_classes,
    ),
    "regression": TaskKind(
        encode=labelled.amounts,
        stack=losses.numbers,
        loss=losses.squared_error,
        constant_loss=losses.variance,
        answers=metrics.outputs,
        measure=metrics.of_numbers,
    ),
    "multi-label": TaskKind(
        encode=labelled.sets,
        stack=losses.numbers,
        loss=losses.binary_cross_entropy,
        constant_loss=losses.entropy_of_labels,
        answers=metrics.likely,
        measure=metrics.of_sets,
    ),
    "token-classification": TaskKind(
        encode=labelled.tags,
        stack=losses.sequences,
        loss=losses.token_cross_entropy,
        constant_loss=losses.entropy_of_tokens,
        answers=metrics.words,
        measure=metrics.of_words,
    ),
    "causal-lm": TaskKind(
        encode=language.language,
        stack=losses.sequences,
        loss=losses.next_token_cross_entropy,
        constant_loss=losses.entropy_of_tokens,
        perplexity=True,
    ),
    "masked-lm": TaskKind(
        encode=language.masked,
        stack=losses.sequences,
        loss=losses.token_cross_entropy,
        constant_loss=losses.entropy_of_tokens,
        perplexity=True,
    ),
    "seq2seq": TaskKind(
        encode=language.sources,
        stack=losses.sequences,
        loss=losses.token_cross_entropy,
        constant_loss=losses.entropy_of_tokens,
        perplexity=True,
    ),
}
