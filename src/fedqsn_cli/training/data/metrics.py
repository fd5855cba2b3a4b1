"""What a model's answers are, and the measures of the field for them; libraries are imported when they are used."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fedqsn_cli.training.data.examples import IGNORED

Answers = list[Any]
Measure = Callable[[Answers, Answers, Sequence[str]], dict[str, float | None]]
"""Takes right answers, given answers and the names of the labels; returns values by their names in `Evaluation`."""


def largest(logits: Tensor, targets: Tensor) -> tuple[Answers, Answers]:
    """Right and given class of each example."""
    return targets.tolist(), logits.argmax(dim=-1).tolist()


def outputs(logits: Tensor, targets: Tensor) -> tuple[Answers, Answers]:
    """Right and given numbers of each example."""
    return targets.tolist(), logits.float().tolist()


def likely(logits: Tensor, targets: Tensor) -> tuple[Answers, Answers]:
    """Right and given flag of each label: 1 if it is there with a probability over one half."""
    return targets.int().tolist(), (logits > 0).int().tolist()


def words(logits: Tensor, targets: Tensor) -> tuple[Answers, Answers]:
    """Right and given class of each word, a list for each text."""
    counts, given = targets != IGNORED, logits.argmax(dim=-1)
    rows = range(len(targets))
    return [targets[row][counts[row]].tolist() for row in rows], [given[row][counts[row]].tolist() for row in rows]


def of_classes(right: Answers, given: Answers, names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy, macro F1 over the classes that occur in the data or the answers, Matthews correlation."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(right, given)),
        "macro_f1": float(f1_score(right, given, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(right, given)),
    }


def of_sets(right: Answers, given: Answers, names: Sequence[str]) -> dict[str, float | None]:
    """Share of texts with exactly the right labels, macro F1 over labels."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(right, given)),
        "macro_f1": float(f1_score(right, given, average="macro", zero_division=0)),
    }


def of_numbers(right: Answers, given: Answers, names: Sequence[str]) -> dict[str, float | None]:
    """Correlations of Pearson and Spearman, means over the outputs; None where one does not vary."""
    from scipy.stats import pearsonr, spearmanr

    with _without_warnings():
        pairs = list(zip(zip(*right, strict=True), zip(*given, strict=True), strict=True))
        enough = len(right) > 1
        return {
            "pearson": _mean(pearsonr(*pair).statistic for pair in pairs) if enough else None,
            "spearman": _mean(spearmanr(*pair).statistic for pair in pairs) if enough else None,
        }


def of_words(right: Answers, given: Answers, names: Sequence[str]) -> dict[str, float | None]:
    """Accuracy and macro F1 over words; precision, recall and F1 of entities if the labels are B-... and I-..."""
    flat_right, flat_given = ([one for row in rows for one in row] for rows in (right, given))
    found = of_classes(flat_right, flat_given, names) | {"mcc": None}
    if not any(name.startswith(("B-", "I-")) for name in names):
        return found
    from seqeval.metrics import f1_score, precision_score, recall_score

    with _without_warnings():
        rows = [[[names[one] for one in row] for row in rows] for rows in (right, given)]
        measures = {"entity_precision": precision_score, "entity_recall": recall_score, "entity_f1": f1_score}
        return found | {name: float(measure(*rows)) for name, measure in measures.items()}


def none(right: Answers, given: Answers, names: Sequence[str]) -> dict[str, float | None]:
    """Nothing but the loss."""
    return {}


def no_answers(logits: Tensor, targets: Tensor) -> tuple[Answers, Answers]:
    """A model of a language gives probabilities, no answers."""
    return [], []


def _mean(values: Iterable[float]) -> float | None:
    found = [float(value) for value in values]
    mean = sum(found) / len(found)
    return mean if math.isfinite(mean) else None


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
