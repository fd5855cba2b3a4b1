"""Examples as the model gets them, for people to look at: `client-train --show-examples`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqsn_cli.artifacts.proxy_folder import verify_proxy
from fedqsn_cli.checkpoint import Checkpoint, resolve
from fedqsn_cli.models.architecture import Task
from fedqsn_cli.models.messages import quiet
from fedqsn_cli.models.torch_model import load_outline
from fedqsn_cli.options import TrainOptions
from fedqsn_cli.progress import SILENT, Progress
from fedqsn_cli.training.data.data_files import open_data
from fedqsn_cli.training.data.encoder import Encoder
from fedqsn_cli.training.data.examples import IGNORED, Examples, Ids


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token.

    Args:
        part: "input", or "target" for what a decoder learns to write.
        id: of the token. token: as the tokenizer writes it.
        counts: whether the loss counts what is to be learnt at this place.
        learns: the token or label to be learnt here, None where nothing counts.
    """

    part: str
    id: int
    token: str
    counts: bool
    learns: str | None


@dataclass(frozen=True, slots=True)
class ShownExample:
    """The tokens of an example; `label` is that of the whole text, None for tasks that learn from single tokens."""

    tokens: tuple[ShownToken, ...]
    label: str | None


@dataclass(frozen=True, slots=True)
class ShownExamples:
    """The first examples of a data file; the counts are those of `TrainResult`, over all of its rows."""

    task: Task
    max_length: int
    examples: int
    skipped: int
    cut: int
    unused_columns: tuple[str, ...]
    shown: tuple[ShownExample, ...]


def show_examples(
    proxy: str | Path, options: TrainOptions, count: int, *, progress: Progress = SILENT
) -> ShownExamples:
    """Encode the training data as `client_train` would, and show the first examples; nothing is trained or written.

    Raises:
        InputError, FormatError, DataError: as from `client_train`.
    """
    data = open_data(options.data)
    folder = resolve(str(proxy)).path
    verify_proxy(folder)
    with Checkpoint.open(folder) as checkpoint, quiet():
        loaded = load_outline(checkpoint)
        encoder = Encoder.of(loaded, options.max_length, options.seed)
        examples = encoder.encode(data, progress)
        names = [str(name) for _, name in sorted((getattr(loaded.model.config, "id2label", None) or {}).items())]
        return ShownExamples(
            task=loaded.task,
            max_length=encoder.max_length,
            examples=len(examples),
            skipped=examples.skipped,
            cut=examples.cut,
            unused_columns=examples.unused,
            shown=tuple(_shown(encoder, examples, row, names) for row in range(min(count, len(examples)))),
        )


def _shown(encoder: Encoder, examples: Examples, row: int, names: list[str]) -> ShownExample:
    ids, target = examples.features[row]["input_ids"], examples.targets[row]
    nothing = [IGNORED] * len(ids)
    match examples.task:
        case "causal-lm" | "masked-lm":
            return ShownExample(_tokens(encoder, "input", ids, _texts(encoder, target)), None)
        case "seq2seq":
            written = _tokens(encoder, "target", target, _texts(encoder, target))
            return ShownExample(_tokens(encoder, "input", ids, _texts(encoder, nothing)) + written, None)
        case "token-classification":
            labels = [None if one == IGNORED else names[one] for one in target]
            return ShownExample(_tokens(encoder, "input", ids, labels), None)
        case _:
            tokens = _tokens(encoder, "input", ids, _texts(encoder, nothing))
            return ShownExample(tokens, _label(examples.task, target, names))


def _label(task: Task, target: Any, names: list[str]) -> str:
    if task == "classification":
        return names[int(target)]
    if task == "multi-label":
        return ", ".join(name for name, flag in zip(names, target, strict=True) if flag) or "none"
    return ", ".join(f"{number:g}" for number in target)


def _texts(encoder: Encoder, targets: Ids) -> list[str | None]:
    return [None if one == IGNORED else str(encoder.tokenizer.convert_ids_to_tokens(one)) for one in targets]


def _tokens(encoder: Encoder, part: str, ids: Ids, learns: list[str | None]) -> tuple[ShownToken, ...]:
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    return tuple(
        ShownToken(part, one, str(token), what is not None, what)
        for one, token, what in zip(ids, tokens, learns, strict=True)
    )
