"""Parts of what commands print that more than one of them needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedqsn_cli import console, text
from fedqsn_cli.artifacts.manifests import Quantization

if TYPE_CHECKING:
    from fedqsn_cli.inspection import TensorTotals
    from fedqsn_cli.training.scoring import Evaluation

_SHIPS = {
    "masked_quantized": "masked and quantized",
    "masked_only": "masked, not quantized",
    "quantized_only": "quantized, not masked",
    "clear": "in the clear",
}


_MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mcc": "MCC",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "entity_f1": "entity F1",
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougel": "ROUGE-L",
    "exact_match": "exact match",
}


def shares(shares: Mapping[str, float]) -> list[tuple[str, object]]:
    """How the parameters of a model ship, as shares of all of them."""
    return [(words, text.percent(shares[name])) for name, words in _SHIPS.items()]


def quantization(quantization: Quantization | None) -> str:
    """A quantization in a few words: `nf4, blocks of 64, layout bnb`."""
    if quantization is None:
        return "none"
    double = ", scales quantized too" if quantization.double_quant else ""
    return f"{quantization.format}, blocks of {quantization.block_size}, layout {quantization.layout}{double}"


def public_base(counts: Mapping[str, int] | None) -> str | None:
    """What of the public base fits: `96 tensors as they are, 2 resized, 1 without (zeros)`."""
    from fedqsn_cli.models.public_base import summary

    return None if counts is None else summary(counts)


def contents(totals: TensorTotals) -> list[tuple[str, object]]:
    """What an artifact holds, in numbers."""
    kinds = ", ".join(totals.dtypes)
    return [
        ("tensors", f"{text.number(totals.tensors)} ({kinds})"),
        ("parameters", text.number(totals.parameters)),
        ("size", text.size(totals.bytes)),
    ]


def evaluations(measured: Sequence[tuple[str, Evaluation]]) -> console.Table:
    """Measurements under each other, with the columns that their task has."""
    columns: dict[str, list[str]] = {
        "model": [name for name, _ in measured],
        "examples": [text.number(evaluation.examples) for _, evaluation in measured],
        "loss": [text.real(evaluation.loss) for _, evaluation in measured],
    }
    for field, title in _MEASURES.items():
        values = [getattr(evaluation, field) for _, evaluation in measured]
        if any(value is not None for value in values):
            columns[title] = [text.real(value) for value in values]
    rows = list(zip(*columns.values(), strict=True))
    return console.Table(tuple(columns), rows, numbers=frozenset(columns) - {"model"})


def rows_left_out(skipped: int, cut: int, unused: Sequence[str]) -> list[tuple[str, object]]:
    """What of a data file was not learnt or measured; nothing where all of it was."""
    return [
        ("rows with nothing to learn", text.number(skipped) if skipped else None),
        ("rows cut at the maximum length", text.number(cut) if cut else None),
        ("columns not used", text.listed(unused) or None),
    ]
