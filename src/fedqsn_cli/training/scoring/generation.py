"""Texts that a model writes for prompts, held against those that it should have written: `evaluate --generate`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedqsn_cli.errors import InputError
from fedqsn_cli.options import EvaluateOptions
from fedqsn_cli.progress import Progress
from fedqsn_cli.training.data.examples import Ids
from fedqsn_cli.training.data.language import prompt_ids
from fedqsn_cli.training.data.tables import Table
from fedqsn_cli.training.data.tokenizing import Encoding

_LIBRARIES = ("sacrebleu", "rouge_score")
_COLUMNS = {"causal-lm": ("prompt", "completion"), "seq2seq": ("source", "target")}


def require_libraries() -> None:
    """Refuse to go on without the libraries that measure texts. Raises InputError."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        hint = "install fedqsn-cli[generation]"
        raise InputError(f"needs {' and '.join(missing)}", where="--generate", hint=hint)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Different prompts, as tokens, and all the texts that would be right for each."""

    tokens: Sequence[Ids]
    references: Sequence[list[str]]

    @classmethod
    def of(cls, encoding: Encoding, table: Table, new: int) -> Prompts:
        """The prompts of a file; rows with the same prompt are several right answers to it.

        Args:
            new: longest answer in tokens.

        Raises:
            InputError: the model's task has no prompts. DataError: the file has none, or a row cannot be used.
        """
        if encoding.task not in _COLUMNS:
            what = f"a {encoding.task} model writes no texts"
            raise InputError(what, where="--generate", hint="leave it out")
        prompt, reply = _COLUMNS[encoding.task]
        table.require(prompt, reply, why=f"--generate needs {prompt} and {reply}")
        if new >= encoding.positions:
            what = f"the model takes {encoding.positions} tokens, and {new} new ones leave no room for a prompt"
            raise InputError(what, where="--max-new-tokens", hint="give a smaller number")
        right: dict[str, list[str]] = {}
        for text, answer in zip(table.texts(prompt), table.texts(reply), strict=True):
            right.setdefault(text, []).append(answer)
        first = {text: row for row, text in reversed(list(enumerate(table.columns[prompt])))}
        tokens = encoding.guarded(
            lambda: [prompt_ids(encoding, table, first[text], text, prompt, new) for text in right],
            what=f"tokenizing {table.path.name}",
            rows=len(right),
            table=table,
        )
        return cls(tokens, list(right.values()))


def measure_texts(
    model: Any, encoding: Encoding, prompts: Prompts, options: EvaluateOptions, progress: Progress
) -> dict[str, Any]:
    """BLEU, ROUGE and exact matches of what a model writes; fields of `Evaluation`."""
    texts = written(model, encoding, prompts.tokens, options, progress)
    right = prompts.references
    return {
        "generated": len(texts),
        "exact_match": sum(text in [one.strip() for one in each] for text, each in zip(texts, right, strict=True))
        / len(texts),
        "bleu": _bleu(texts, right),
        **_rouge(texts, right),
    }


def written(
    model: Any, encoding: Encoding, prompts: Sequence[Ids], options: EvaluateOptions, progress: Progress
) -> list[str]:
    """What the model writes for each prompt: the likeliest token each time, without white space around the text."""
    answers = _answers(model, encoding, prompts, options, progress)
    texts: list[str] = encoding.guarded(
        lambda: [text.strip() for text in encoding.tokenizer.batch_decode(answers, skip_special_tokens=True)],
        what="decoding the answers",
        rows=len(answers),
    )
    return texts


@torch.inference_mode()
def _answers(
    model: Any, encoding: Encoding, prompts: Sequence[Ids], options: EvaluateOptions, progress: Progress
) -> list[Ids]:
    """The tokens that the model writes for each prompt.

    Only prompts of the same length go through the model together: nothing is padded, so batches change nothing.
    """
    model.eval()
    progress.start("writing", len(prompts), "texts")
    found: dict[int, Ids] = {}
    for rows in _alike(prompts, options.batch_size):
        ids = torch.tensor([prompts[row] for row in rows], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.answer_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=encoding.pad,
            **({} if encoding.tokenizer.eos_token_id is None else {"eos_token_id": encoding.tokenizer.eos_token_id}),
        )
        new = output if encoding.task == "seq2seq" else output[:, ids.shape[1] :]
        found |= dict(zip(rows, new.tolist(), strict=True))
        progress.advance(len(rows))
    progress.finish()
    return [found[row] for row in range(len(prompts))]


def _alike(prompts: Sequence[Ids], size: int) -> Iterator[list[int]]:
    """Batches of prompts of the same length, the longest first."""
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(row)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _bleu(texts: Sequence[str], right: Sequence[list[str]]) -> float:
    """BLEU of the corpus with all right answers, 0 to 100."""
    import sacrebleu

    most = max(map(len, right))
    streams: Any = [[each[number] if number < len(each) else None for each in right] for number in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), streams).score)


def _rouge(texts: Sequence[str], right: Sequence[list[str]]) -> Mapping[str, float]:
    """Means of ROUGE-1, -2 and -L (F1), each text against the right answer that is nearest to it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(each, text) for text, each in zip(texts, right, strict=True)]
    names = ("rouge1", "rouge2", "rougeL")
    return {name.lower(): sum(float(score[name].fmeasure) for score in scores) / len(scores) for name in names}
