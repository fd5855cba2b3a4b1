"""Rows of a data file -> token ids and targets, as `tasks` lists them; docs/data.md says what counts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedqsn_cli.errors import DataError, InputError
from fedqsn_cli.models.architecture import CLASSIFIERS
from fedqsn_cli.models.torch_model import Loaded
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.examples import Examples, Ids, Padding
from fedqsn_cli.training.data.stored_examples import StoredExamples
from fedqsn_cli.training.data.tables import Rows, Table
from fedqsn_cli.training.data.tasks import TASKS
from fedqsn_cli.training.data.tokenizing import Encoding


class Encoder(Encoding):
    """Encodes rows of data for one model."""

    @classmethod
    def of(cls, loaded: Loaded, max_length: int, seed: int = 0) -> Encoder:
        """The encoder for a model; texts are cut to `max_length` tokens, or to what the model takes if that is less.

        Raises:
            InputError: the model has no tokenizer, or no decoder where its task needs one.
        """
        if loaded.tokenizer is None:
            raise InputError("the model has no tokenizer", hint="add the tokenizer's files to its folder")
        config = loaded.model.config
        has_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if loaded.task == "seq2seq" and not has_decoder:
            what = f"{type(loaded.model).__name__} is not an encoder-decoder model"
            raise InputError(what, hint="save it with the head of a causal language model (ForCausalLM)")
        classes = loaded.task in CLASSIFIERS
        return cls(
            task=loaded.task,
            tokenizer=loaded.tokenizer,
            inputs=loaded.inputs,
            vocabulary=loaded.vocabulary,
            label_ids=_label_ids(config),
            labels=int(getattr(config, "num_labels", 0)) if classes else 0,
            max_length=min(max_length, loaded.positions, int(loaded.tokenizer.model_max_length)),
            positions=loaded.positions,
            pad=loaded.pad_id,
            end=config.eos_token_id if classes and has_decoder else None,
            decoder_inputs=_shifted(loaded.model) if loaded.task == "seq2seq" else None,
            seed=seed,
        )

    @property
    def padding(self) -> Padding:
        """Ids to pad batches with."""
        return Padding(self.pad, int(getattr(self.tokenizer, "pad_token_type_id", 0)))

    def encode(self, data: Rows, progress: Progress, *, folder: Path | None = None) -> Examples:
        """Token ids and targets of all rows, a part of them after the other; what is large goes to a file.

        Args:
            folder: where a file of examples goes; None for the system's folder of temporary files.

        Raises:
            DataError: a column is missing, or a row cannot be used.
        """
        progress.start(f"reading {data.path.name}", data.rows, "examples")
        stored = StoredExamples(folder)
        counts = Examples(self.task, [], [])
        for part in data.parts():
            found = self._encoded(part)
            for example in zip(found.features, found.targets, found.lengths, strict=True):
                stored.add(*example)
            self._check_vocabulary(found, data.path)
            counts = counts.and_counts_of(found)
            progress.advance(part.rows)
        progress.finish()
        if not len(stored):
            raise DataError("no row has a text to learn from", where=data.path)
        return replace(counts, features=stored.features, targets=stored.targets)

    def _encoded(self, part: Table) -> Examples:
        """The examples of some rows, tokenized in a child process."""
        kind = TASKS[self.task]
        return Examples.from_plain(
            self.guarded(
                lambda: replace(kind.encode(self, part, SILENT), unused=part.unused).to_plain(),
                what=f"tokenizing {part.path.name}",
                rows=part.rows,
                table=part,
            )
        )

    def _check_vocabulary(self, examples: Examples, path: Path) -> None:
        """Refuse ids that the model does not know. Raises InputError."""
        largest = max((max(ids) for feature in examples.features for ids in _ids(feature)), default=0)
        if largest >= self.vocabulary:
            raise InputError(
                f"the tokenizer turns a text into token {largest}, beyond the model's vocabulary of {self.vocabulary}",
                where=path,
                hint="use the model's own tokenizer, or take special tokens that it does not know out of the texts",
            )


def _label_ids(config: Any) -> dict[str, int]:
    """Class id by label, from both tables of a config: often only one of them has been filled in."""
    names = getattr(config, "id2label", None) or {}
    numbers = getattr(config, "label2id", None) or {}
    return {str(name): int(number) for number, name in names.items()} | {
        str(name): int(number) for name, number in numbers.items()
    }


def _ids(feature: dict[str, Ids]) -> list[Ids]:
    return [ids for name, ids in feature.items() if name.endswith("input_ids")]


def _shifted(model: Any) -> Callable[[Ids], Ids]:
    """What the model's own code feeds its decoder with while it learns to write some tokens. Raises InputError."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or _shift_of_module(model)
    if shift is None:
        raise InputError(f"transformers does not say what the decoder of {type(model).__name__} begins with")

    def inputs(target: Ids) -> Ids:
        ids: Ids = shift(labels=torch.tensor([target]))[0].tolist()
        return ids

    return inputs


def _shift_of_module(model: Any) -> Callable[..., torch.Tensor] | None:
    """The function that some models (M2M100, NLLB, Blenderbot) call themselves for it, in the module of their code."""
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    first = getattr(model.config, "decoder_start_token_id", None)
    if shift is None or type(first) is not int:
        return None
    return lambda labels: shift(labels, model.config.pad_token_id, first)
